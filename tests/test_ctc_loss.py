"""ctc_loss and ctc_loss_from_logits on every backend: values, gradients, sizes, lengths in every form, what runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _backends import backends_and_dtypes, backends_for
from _checks import (
    assert_same_bits,
    check_cases,
    check_deterministic,
    check_gradcheck,
    check_layouts,
    ops_called,
)
from _ctc import NAMESPACES, OPS, TORCH, batch, every_op

import pydl
from pydl import ops
from pydl.ops._ctc_second import ctc_second
from pydl.reference.ctc_loss import cases, ctc_item, ctc_loss_grad, log_softmax, logits_cases

NAN, INF = float("nan"), float("inf")

# the oracle by brute force


@pytest.mark.parametrize(
    ("steps", "classes", "labels"), [(1, 2, (1,)), (4, 3, (1, 2)), (5, 3, (2, 2)), (4, 3, ()), (6, 2, (1,))]
)
@pytest.mark.parametrize("blank", [0, "last"])
def test_oracle_adds_up_every_path(steps, classes, labels, blank):
    """All C^T sequences of classes, those that collapse to the labels added up in plain probabilities."""
    last = blank == "last"
    labels = tuple(label - 1 for label in labels) if last else labels
    blank = classes - 1 if last else 0
    x = log_softmax(np.random.default_rng(steps).standard_normal((steps, classes)))
    total, share = 0.0, np.zeros((steps, classes))
    for path in itertools.product(range(classes), repeat=steps):
        collapsed = tuple(c for c, _ in itertools.groupby(path) if c != blank)
        if collapsed == labels:
            p = np.exp(sum(x[t, c] for t, c in enumerate(path)))
            total += p
            share[np.arange(steps), path] += p
    loss, posterior = ctc_item(x, labels, blank)
    np.testing.assert_allclose(loss, -np.log(total), rtol=1e-12)
    np.testing.assert_allclose(posterior, share / total, rtol=1e-12, atol=1e-15)


# values and gradients


@pytest.mark.parametrize(("backend", "dtype"), every_op(backends_and_dtypes))
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), every_op(backends_and_dtypes))
def test_gradients(backend, dtype):
    # torch's own gradient is NaN where a log-probability is -inf
    torchs = backend.name == "torch"
    check_cases(backend, dtype, "gradients", lambda case: not (torchs and case.name == "impossible class"))


@pytest.mark.parametrize(("backend", "dtype"), every_op(lambda op: backends_and_dtypes(op, without=TORCH)))
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


@pytest.mark.parametrize(("backend",), every_op(lambda op: backends_for(op, torch.float64, without=TORCH)))
def test_gradcheck(backend):
    """Through log_softmax, where torch's gradient is the derivative; 5 frames: two labels with a choice of paths."""
    x = torch.randn(5, 2, 4, dtype=torch.float64, device=backend.device, requires_grad=True)
    targets = torch.tensor([[1, 2], [3, 3]], device=backend.device)

    def loss(x):
        x = x if backend.op == "ctc_loss_from_logits" else x.log_softmax(-1)
        return backend(x, targets, (5, 4), (2, 2), reduction="none")

    check_gradcheck(loss, [x])


def test_third_gradients():
    x = torch.randn(4, 1, 3, dtype=torch.float64, requires_grad=True)

    def gradient(x):
        loss = ops.ctc_loss_from_logits(x, torch.tensor([[1, 2]]), (4,), (2,))
        return torch.autograd.grad(loss, x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, (x,))


@pytest.mark.parametrize("logits", [False, True])
def test_second_gradient_of_ragged_items_and_infinite_losses(logits):
    """The composed second derivative beside differences of the oracle's gradient: repeats, an infinite loss."""
    rng = np.random.default_rng(5)
    x = log_softmax(rng.standard_normal((7, 4, 5)))
    targets, lengths = np.array([[1, 1, 2], [3, 4, 0], [2, 2, 2], [1, 2, 3]]), (3, 2, 3, 0)
    frames = (7, 4, 4, 6)  # item 2 has three equal labels and needs five frames
    v, dloss = rng.standard_normal(x.shape), rng.standard_normal(4)

    def gradient(x, dy):
        x = log_softmax(x) if logits else x
        return ctc_loss_grad(dy, x, targets, frames, lengths, 0, "none", True)[0]

    h = 1e-5
    expected = (gradient(x + h * v, dloss) - gradient(x - h * v, dloss)) / (2 * h)
    tensors = [torch.from_numpy(np.asarray(a)) for a in (v, dloss, x, targets, frames, lengths)]
    nll = torch.tensor([1.0, 1.0, INF, 1.0], dtype=torch.float64)
    ddloss, dx = ctc_second(*tensors, nll, 0, logits, True, 0)
    np.testing.assert_allclose(dx.numpy(), expected, atol=1e-8)
    along = [(v * gradient(x, unit)).sum() for unit in np.eye(4)]
    np.testing.assert_allclose(ddloss.numpy(), along, atol=1e-12)


@pytest.mark.parametrize(("backend", "dtype"), every_op(lambda op: backends_and_dtypes(op, without=TORCH)))
def test_layouts(backend, dtype):
    if backend.name == "simt" and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("the addresses are those of float32 and bfloat16")
    case = next(c for c in (cases() if backend.op == "ctc_loss" else logits_cases()) if c.layouts)
    check_layouts(backend, dtype, case)


@pytest.mark.parametrize(("backend",), every_op(lambda op: backends_for(op, torch.float32, without=TORCH)))
def test_batch_first_input_keeps_its_layout(backend):
    """The transpose of a contiguous [N, T, C], as models write it: the same bits, and a gradient of that layout."""
    x, targets, frames, lengths = batch(device=backend.device)
    rows = x.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for leaf in (x.clone().requires_grad_(), rows.detach().requires_grad_()):
        loss = backend(leaf, targets, frames, lengths)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert_same_bits(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][1].stride() == rows.stride()


# sizes: both sides of a warp (31 labels), of a block's register tile (255 to 257), and many states per thread


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=TORCH))
@pytest.mark.parametrize("labels", [1, 2, 31, 32, 63, 64, 65, 255, 256, 257, 1024])
def test_label_counts(backend, labels):
    steps = labels + 40 if labels < 300 else labels + 8
    if backend.slow and labels > 257:
        steps = labels + 1
    x, targets, frames, lengths = batch(steps, 2, 40, labels, seed=labels)
    targets = 1 + (torch.arange(labels) * torch.tensor([[1], [2]]) + torch.tensor([[0], [1]])) % 39  # no repeats
    lengths[1] = max(labels - 1, 0)
    exact = x.double().log_softmax(-1).requires_grad_()
    expected = F.ctc_loss(exact, targets, frames, lengths, reduction="none")
    (want,) = torch.autograd.grad(expected.sum(), exact)
    leaf = exact.detach().float().to(backend.device).requires_grad_()
    loss = backend(leaf, targets.to(backend.device), frames, lengths, reduction="none")
    (got,) = torch.autograd.grad(loss.sum(), leaf)
    plain = exact.detach().float().requires_grad_()
    theirs = F.ctc_loss(plain, targets, frames, lengths, reduction="none")
    (torchs,) = torch.autograd.grad(theirs.sum(), plain)
    assert (loss.detach().cpu() - expected).abs().max() <= 2 * (theirs - expected).abs().max() + 1e-6 * expected.max()
    assert (got.cpu() - want).abs().max() <= 3 * (torchs - want).abs().max() + 1e-6
    with torch.no_grad():
        value = backend(leaf, targets.to(backend.device), frames, lengths, reduction="none")
    torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=(*TORCH, "simt")))
def test_float32_does_not_drift_over_2600_frames(backend):
    """Rows of log-probabilities grow with T; offsets are taken out, so that the gradient is as good as torch's."""
    x, targets, frames, lengths = batch(2600, 2, 32, 200, seed=3)
    exact = x.double().log_softmax(-1).requires_grad_()
    (want,) = torch.autograd.grad(F.ctc_loss(exact, targets, frames, lengths, reduction="sum"), exact)
    errors = []
    for run, device in ((backend, backend.device), (F.ctc_loss, "cpu")):
        leaf = exact.detach().float().to(device).requires_grad_()
        loss = run(leaf, targets.to(device), frames, lengths, reduction="sum")
        errors.append((torch.autograd.grad(loss, leaf)[0].cpu() - want).abs().max().item())
    assert errors[0] <= errors[1], errors


# lengths and targets in every form


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=TORCH))
def test_forms_of_targets_and_lengths_give_the_same_bits(backend):
    x, targets, _, _ = batch(device=backend.device)
    x = x.log_softmax(-1)
    frames, lengths = (30, 22, 30, 9), (7, 3, 0, 4)
    reference = backend(x, targets, frames, lengths, reduction="none")
    flat = torch.cat([targets[i, :length] for i, length in enumerate(lengths)])
    padded = torch.full((4, 11), -7, device=x.device)
    padded[:, :7] = targets
    padded[torch.arange(11, device=x.device) >= torch.tensor(lengths, device=x.device).unsqueeze(1)] = 999
    tensors = torch.tensor(frames), torch.tensor(lengths, dtype=torch.int32)
    for given in (flat, padded, targets.int(), targets.t().contiguous().t(), targets.double()):
        for f, t in ((frames, lengths), tensors, [v.to(x.device) for v in tensors], ([*frames], torch.tensor(lengths))):
            assert_same_bits(backend(x, given, f, t, reduction="none"), reference)
    assert torch.allclose(reference.cpu(), F.ctc_loss(x.cpu(), targets.cpu(), frames, lengths, reduction="none"))


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=TORCH))
def test_unbatched(backend):
    x, targets, _, _ = batch(device=backend.device)
    x = x[:, 0].log_softmax(-1)
    for frames, lengths in (
        ((30,), (7,)),
        (torch.tensor(30), torch.tensor(7)),
        (torch.tensor([30]), torch.tensor([7])),
    ):
        for reduction in ("none", "mean", "sum"):
            got = backend(x, targets[0], frames, lengths, reduction=reduction)
            expected = F.ctc_loss(x.cpu(), targets[0].cpu(), frames, lengths, reduction=reduction)
            assert got.shape == expected.shape == ()
            torch.testing.assert_close(got.cpu(), expected)


@pytest.mark.parametrize(("backend",), every_op(lambda op: backends_for(op, torch.float32, without=TORCH)))
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions_and_upstream_gradients(backend, reduction):
    """An upstream gradient that is expanded (from sum) or strided, not one number per item in a row."""
    x, targets, frames, lengths = batch(device=backend.device)
    lengths[2] = 0
    leaf = x.log_softmax(-1).requires_grad_()
    loss = backend(leaf, targets, frames, lengths, reduction=reduction)
    expected_leaf = leaf.detach().cpu().double().requires_grad_()  # torch's float32 drifts by more than the bound
    run = F.ctc_loss if backend.op == "ctc_loss" else (lambda x, *a, **k: F.ctc_loss(x.log_softmax(-1), *a, **k))
    expected = run(expected_leaf, targets.cpu(), frames, lengths, reduction=reduction)
    torch.testing.assert_close(loss.cpu().double(), expected)
    weights = [torch.ones(()).expand(loss.shape), torch.arange(8.0)[::2].reshape(loss.shape)] if loss.dim() else []
    for dy in (*weights, torch.full((), -2.5).expand(loss.shape)):
        (dx,) = torch.autograd.grad(loss, leaf, dy.to(x.device), retain_graph=True)
        (want,) = torch.autograd.grad(expected, expected_leaf, dy.double(), retain_graph=True)
        torch.testing.assert_close(dx.cpu().double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=TORCH))
def test_padded_frames_have_gradient_zero(backend):
    """Also where the log-probabilities there are NaN: nobody reads them."""
    x, targets, _, lengths = batch(device=backend.device)
    x = x.log_softmax(-1)
    x[20:, 1] = NAN
    x[5:, 3] = INF
    leaf = x.requires_grad_()
    loss = backend(leaf, targets, (30, 20, 30, 5), (7, 7, 7, 2), reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.isfinite().all() and dx.isfinite().all()
    assert dx[20:, 1].eq(0).all() and dx[5:, 3].eq(0).all() and dx[:20, 1].ne(0).any()


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=TORCH))
def test_nan_stays_in_its_item(backend):
    x, targets, frames, lengths = batch(device=backend.device)
    x = x.log_softmax(-1)
    x[3, 2] = NAN
    loss = backend(x, targets, frames, lengths, reduction="none", zero_infinity=True)
    assert loss.isnan().tolist() == [False, False, True, False]


# what runs, and how often


def test_which_operators_run():
    x, targets, frames, lengths = batch()
    with ops_called() as called:
        ops.ctc_loss(x, targets, frames, lengths)
    assert called.pydl() == ["ctc_loss_value"]
    with ops_called() as called:
        ops.ctc_loss(x.requires_grad_(), targets, frames, lengths).backward()
    assert called.pydl() == ["ctc_loss_fwd", "ctc_loss_bwd"]
    with pydl.trace() as seen:
        ops.ctc_loss(x, targets, frames, lengths)
    assert [(r.op, r.backend) for r in seen] == [("ctc_loss", "cpu")]


@pytest.mark.parametrize("backend", backends_for("ctc_loss", torch.float32, without=TORCH))
def test_memory_beside_input_and_gradient(backend):
    """Less than 1.1 times one float32 buffer of T x N x (2 L + 1)."""
    x, targets, frames, lengths = batch(200, 4, 12, 60, device=backend.device)
    with backend.use():
        overload = NAMESPACES[backend.name].ctc_loss_fwd.default
        moved = [t.to(x.device) for t in (frames, lengths)]
        kept = overload(x, targets, *moved, 0, 60, False, False, 1)[1:]
    assert sum(t.numel() * t.element_size() for t in kept) < 1.1 * 4 * 200 * 4 * 121


@pytest.mark.parametrize(("backend",), every_op(lambda op: backends_for(op, torch.float32, without=TORCH)))
def test_the_same_bits_on_every_run(backend):
    x, targets, frames, lengths = batch(40, 3, 9, 12, device=backend.device)
    targets[0, 3:9] = 4  # repeated labels: their posteriors are added up in a fixed order
    check_deterministic(lambda x: backend(x, targets, frames, lengths, reduction="none"), x.log_softmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_cuda_graph_and_no_sync(op):
    x, targets, frames, lengths = batch(device="cuda")
    frames, lengths, flat = frames.cuda(), lengths.cuda(), targets.flatten()
    x = x.log_softmax(-1).requires_grad_()
    function = getattr(ops, op)

    def step():
        return torch.autograd.grad(function(x, flat, frames, lengths), x)[0]

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert_same_bits(captured, expected)
