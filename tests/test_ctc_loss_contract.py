"""ctc_loss and torch's machinery: errors, checked mode, opcheck, compilation, autocast, transforms, the module."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from _backends import HAS_GPU, backends_for
from _checks import check_autocast, check_compile, check_opcheck, check_same_error
from _ctc import NAMESPACES, OPS, TORCH, batch

import pydl
from pydl import ops
from pydl.ops import ctc_loss as _function

# errors


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(frames=(30, 31, 30, 30)), "item 1: input length 31 must be in [0, T=30]"),
        (dict(frames=(30, 30, -1, 30)), "item 2: input length -1"),
        (dict(lengths=(7, 8, 7, 7)), "item 1: target length 8 must be in [0, S=7]"),
        (dict(lengths=(7, 7, 7, -2)), "item 3: target length -2"),
        (dict(label=(2, 5, 12)), "item 2: label 12 at position 5 must be in [0, C=12) and not the blank 0"),
        (dict(label=(1, 6, -3)), "item 1: label -3 at position 6"),
        (dict(label=(0, 0, 0)), "item 0: label 0 at position 0"),
        (dict(label=(0, 0, 2**40)), f"item 0: label {2**40} at position 0"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("grad", [False, True])
def test_bad_labels_and_lengths_are_named(op, change, says, backend, grad):
    x, targets, frames, lengths = batch()
    if "label" in change:
        n, position, value = change["label"]
        targets[n, position] = value
    arguments = (targets, change.get("frames", frames), change.get("lengths", lengths))
    with pytest.raises(ValueError) as raised, pydl.backend(backend) if backend == "torch" else pydl.trace():
        getattr(ops, op)(x.requires_grad_(grad), *arguments)
    assert str(raised.value).startswith(f"{op}: ") and says in str(raised.value)


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=(*TORCH, "cpu")))
def test_bad_items_on_a_gpu_are_nan_alone(backend):
    x, targets, _, _ = batch(n=6, device=backend.device)
    targets[1, 2], targets[2, 6], targets[3, 0] = 0, 12, -(2**40)
    frames, lengths = (30, 30, 30, 30, 31, 30), (7, 7, 7, 7, 7, 8)
    leaf = x.log_softmax(-1).requires_grad_()
    with backend.use():
        loss = ops.ctc_loss(leaf, targets, frames, lengths, reduction="none")
        (dx,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.isnan().tolist() == [False, True, True, True, True, True]
    assert dx[:, 0].isfinite().all() and dx[:, 1:].isnan().any(dim=(0, 2)).all()


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=(*TORCH, "cpu")))
def test_checked_mode_names_the_item_on_a_gpu(backend, monkeypatch):
    monkeypatch.setattr(sys.modules["pydl.ops.ctc_loss"], "_CHECKED", True)
    x, targets, frames, lengths = batch(device=backend.device)
    backend(x.log_softmax(-1), targets, frames, lengths)
    targets[1, 2] = 12
    with pytest.raises(RuntimeError, match="item 1: label 12 at position 2"):
        backend(x.log_softmax(-1), targets, frames, lengths)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(5), torch.ones(1, 1), (5,), (1,)), ("ctc_loss", "'log_probs'", "[5]")),
        ((torch.zeros(5, 2, 3), torch.ones(2, 1, 1), (5, 5), (1, 1)), ("'targets'", "[2, 1, 1]")),
        ((torch.zeros(5, 2, 3), torch.ones(3, 1), (5, 5), (1, 1)), ("'targets'", "[3, 1]")),
        ((torch.zeros(5, 2, 3), torch.ones(2, 1), (5,), (1, 1)), ("'input_lengths'", "2")),
        ((torch.zeros(5, 2, 3), torch.ones(2, 1), (5, 5), (1, 1, 1)), ("'target_lengths'", "3")),
        ((torch.zeros(5, 2, 3), torch.ones(2, 1), (5, 5), (1, 1), 3), ("'blank'", "[0, C=3)", "3")),
        ((torch.zeros(5, 2, 3), torch.ones(2, 1), (5, 5), (1, 1), -1), ("'blank'", "-1")),
        ((torch.zeros(5, 0, 3), torch.ones(0, 1), (), ()), ("must not be empty", "[5, 0, 3]")),
        ((torch.zeros(0, 2, 3), torch.ones(2, 1), (0, 0), (1, 1)), ("must not be empty",)),
        ((torch.zeros(5, 2, 3), torch.ones(2, 1), (5, 5), (1, 1), 0, "average"), ("'reduction'", "'average'")),
        ((torch.zeros(5, 2, 3), torch.ones(3), (5, 5), (1, 1)), ("'targets'", "2", "3")),
        ((5, torch.ones(2, 1), (5, 5), (1, 1)), ("'log_probs'", "int")),
        ((torch.zeros(5, 2, 3), [[1], [1]], (5, 5), (1, 1)), ("'targets'", "list")),
        ((torch.zeros(5, 2, 3), torch.ones(2, 1), 5, (1, 1)), ("'input_lengths'", "5")),
        ((torch.zeros(5, 2, 3), torch.ones(2, 1), (5, 5), (1, 1), 0.0), ("'blank'", "0.0")),
        ((torch.zeros(5, 2, 3), torch.ones(2, 1), torch.ones(2), torch.ones(2)), ("'input_lengths'", "float32")),
    ],
)
def test_errors(arguments, says):
    check_same_error(ops.ctc_loss, F.ctc_loss, *arguments, says=says)


def test_integer_input_goes_to_torch_and_is_refused_there():
    x, targets, frames, lengths = batch()
    check_same_error(ops.ctc_loss, F.ctc_loss, x.int(), targets, frames, lengths)


# torch's machinery


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=TORCH))
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_opcheck(backend, flat, logits):
    x, targets, frames, lengths = batch(6, 2, 4, 2, device=backend.device)
    frames, lengths = frames.to(x.device), lengths.to(x.device)
    targets = targets.flatten() if flat else targets
    most = targets.shape[-1]
    flags = (logits, True, 1)
    with backend.use():
        namespace = NAMESPACES[backend.name]
        leaf = x.clone().requires_grad_()
        for op in (namespace.ctc_loss_fwd.default, namespace.ctc_loss_value.default):
            check_opcheck(op, leaf, targets, frames, lengths, 0, most, *flags)
        kept = namespace.ctc_loss_fwd.default(x, targets, frames, lengths, 0, most, *flags)[1:]
        dloss = torch.ones((), device=x.device, requires_grad=True)
        check_opcheck(namespace.ctc_loss_bwd.default, dloss, leaf, targets, frames, lengths, *kept, 0, *flags)


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=TORCH))
@pytest.mark.parametrize("op", OPS)
def test_compile(backend, op):
    x, targets, frames, lengths = batch(8, 2, 5, 3, device=backend.device)
    other = batch(11, 2, 5, 3, seed=1, device=backend.device)[0]
    function = getattr(ops, op)
    with backend.use():
        check_compile(lambda x: function(x, targets, (8, 7), lengths), [(x,), (other,)])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low):
    """Torch computes the loss in float32 under autocast; so do we, from whatever arrives."""
    x, targets, frames, lengths = batch(dtype=low)
    arguments = (x.float().log_softmax(-1).to(low), targets, frames, lengths)
    check_autocast(ops.ctc_loss, F.ctc_loss, *arguments, low=torch.bfloat16)
    assert ops.ctc_loss(*arguments).dtype == torch.float32


def test_transforms():
    x, targets, frames, lengths = batch(6, 2, 4, 2, dtype=torch.float64)

    def loss(x):
        return ops.ctc_loss_from_logits(x, targets, frames, lengths)

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)


def test_direct_call_of_the_value_operator_is_differentiable():
    x, targets, frames, lengths = batch(6, 2, 4, 2)
    leaf = x.log_softmax(-1).requires_grad_()
    loss = torch.ops.pydl.ctc_loss_value(leaf, targets, frames, lengths, 0, 2, False, False, 2)
    expected = F.ctc_loss(leaf, targets, frames, lengths, reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf))


def test_module_is_torchs_with_our_forward():
    x, targets, frames, lengths = batch()
    module = pydl.nn.CTCLoss(blank=3, reduction="sum", zero_infinity=True)
    assert isinstance(module, torch.nn.CTCLoss)
    targets[targets == 3] = 4
    x = x.log_softmax(-1)
    with pydl.trace() as seen:
        got = module(x, targets, frames, lengths)
    assert [r.backend for r in seen] == ["cpu"]
    torch.testing.assert_close(got, F.ctc_loss(x, targets, frames, lengths, 3, "sum", True))
    model = torch.nn.ModuleDict({"loss": torch.nn.CTCLoss()})
    pydl.accelerate(model)
    assert type(model["loss"]) is pydl.nn.CTCLoss


@pytest.mark.skipif(HAS_GPU, reason="the torch backend is on the CPU")
def test_half_precision_on_the_torch_backend():
    """Torch's op takes none: the composition widens first, and the trace says that it was torch."""
    x, targets, frames, lengths = batch(dtype=torch.bfloat16)
    with pydl.backend("torch"):
        got = _function(x.log_softmax(-1), targets, frames, lengths)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.ctc_loss(x.log_softmax(-1).float(), targets, frames, lengths))
