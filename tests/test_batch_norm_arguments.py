"""What batch_norm, batch_norm_act and their raw operators refuse, and how they say so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _backends import backends_for
from _checks import check_same_error

import pydl
from pydl import ops

OP = "batch_norm"
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}


def bad(**changes):
    arguments = {"input": torch.zeros(4, 3, 2), "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (bad(input=torch.zeros(1, 3, 1), training=True), ["batch_norm", "input", "more than one value", "[1, 3, 1]"]),
        (bad(input=torch.zeros(1, 3), training=True), ["batch_norm", "input", "more than one value", "[1, 3]"]),
        (bad(running_mean=None), ["batch_norm", "running_mean", "evaluation"]),
        (bad(running_var=None), ["batch_norm", "running_var", "evaluation"]),
        (bad(running_var=None, training=True), ["batch_norm", "running_mean", "running_var", "both"]),
        (bad(running_mean=torch.zeros(4)), ["batch_norm", "running_mean", "[3]", "[4]"]),
        (bad(running_mean=torch.zeros(3, 1)), ["batch_norm", "running_mean", "[3]", "[3, 1]"]),
        (bad(weight=torch.ones(2)), ["batch_norm", "weight", "[3]", "[2]"]),
        (bad(bias=torch.ones(5)), ["batch_norm", "bias", "[3]", "[5]"]),
        (bad(weight=torch.ones(3).double()), ["batch_norm", "weight", "float32", "float64"]),
        (bad(running_var=torch.ones(3).half()), ["batch_norm", "running_var", "float16"]),
        (bad(running_mean=torch.zeros(3, requires_grad=True)), ["batch_norm", "running_mean", "derivative"]),
        (bad(input=torch.zeros(4, 3).long()), ["batch_norm", "input", "floating point", "int64"]),
        (bad(input=torch.zeros(3), training=True), ["batch_norm", "input", "[N, C, *]", "[3]"]),
        (bad(input=torch.zeros(3)), ["batch_norm", "input", "[N, C, *]", "[3]"]),
        (bad(eps=0.0, training=True), ["batch_norm", "eps", "positive", "0.0"]),
        (bad(eps="1e-5"), ["batch_norm", "eps", "number", "'1e-5'"]),
        (bad(momentum=None), ["batch_norm", "momentum", "number", "None"]),
        (bad(training=1), ["batch_norm", "training", "bool", "1"]),
        (bad(weight=1.0), ["batch_norm", "weight", "Tensor", "float"]),
        (bad(running_mean=[0.0, 0.0, 0.0]), ["batch_norm", "running_mean", "Tensor", "list"]),
        (bad(weight=torch.ones(3, device="meta")), ["batch_norm", "weight", "cpu", "meta"]),
    ],
    ids=lambda v: ",".join(v[1:]) if isinstance(v, list) else "",
)
def test_errors_are_torchs(arguments, says):
    check_same_error(ops.batch_norm, F.batch_norm, says=says, **arguments)


def test_half_precision_parameters_must_agree():
    x, half, wide = torch.zeros(4, 3).bfloat16(), torch.ones(3).bfloat16(), torch.ones(3)
    for weight, bias in ((half, wide), (wide, half)):
        check_same_error(ops.batch_norm, F.batch_norm, x, None, None, weight, bias, True, says=["weight", "bias"])


@pytest.mark.parametrize(
    ("tail", "error", "says"),
    [
        ({"activation": "gelu"}, ValueError, "'activation' must be None or 'relu', got 'gelu'"),
        ({"residual": torch.zeros(4, 3, 1)}, RuntimeError, r"'residual' must be \[4, 3, 2\] .*got \[4, 3, 1\]"),
        ({"residual": torch.zeros(4, 3, 2).half()}, RuntimeError, "'residual' must be .*got .*float16"),
        ({"residual": 1.0}, TypeError, "'residual' must be a Tensor or None, got float"),
    ],
)
def test_what_is_wrong_with_the_tail(tail, error, says):
    x, *running = bad().values()
    with pytest.raises(error, match=f"batch_norm_act: argument {says}"):
        ops.batch_norm_act(x, *running, **tail)


def test_a_forced_backend_that_cannot_run_says_why():
    with pydl.backend("triton"), pytest.raises(RuntimeError, match=r"batch_norm.*triton"):
        ops.batch_norm(torch.zeros(4, 3), None, None, training=True)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("torch",)))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    # reached without the public checks: an exception, never a read outside the tensors
    raw = NAMESPACES[backend.name]
    x, dy = torch.zeros(4, 3, 5, device=backend.device), torch.zeros(4, 3, 5, device=backend.device)
    three, two = torch.ones(3, device=backend.device), torch.ones(2, device=backend.device)
    bits = torch.zeros(12, dtype=torch.uint8, device=backend.device)
    mask = [True] * 4
    calls = [
        lambda: raw.batch_norm_train(x[0, 0], None, None, None, False, 1e-5),
        lambda: raw.batch_norm_train(x.long(), None, None, None, False, 1e-5),
        lambda: raw.batch_norm_train(x, two, None, None, False, 1e-5),
        lambda: raw.batch_norm_train(x, None, two, None, False, 1e-5),
        lambda: raw.batch_norm_train(x, three.long(), None, None, False, 1e-5),
        lambda: raw.batch_norm_train(x, None, None, dy[:, :, :4], False, 1e-5),
        lambda: raw.batch_norm_train(x, None, None, dy.half(), False, 1e-5),
        lambda: raw.batch_norm_eval(x, two, three, None, None, None, False, 1e-5, False),
        lambda: raw.batch_norm_eval(x, three, two, None, None, None, False, 1e-5, False),
        lambda: raw.batch_norm_bwd(dy[:3], x, three, three, None, None, True, 1e-5, [True, True, True, False]),
        lambda: raw.batch_norm_bwd(dy.double(), x, three, three, None, None, True, 1e-5, [True, True, True, False]),
        lambda: raw.batch_norm_bwd(dy, x, two, three, None, bits, True, 1e-5, mask),
        lambda: raw.batch_norm_bwd(dy, x, three, three, None, bits[:11], True, 1e-5, mask),
        lambda: raw.batch_norm_bwd(dy, x, three, three, None, bits.float(), True, 1e-5, mask),
        lambda: raw.batch_norm_bwd(dy, x, three, three, None, None, True, 1e-5, mask),
        lambda: raw.batch_norm_update(two, None, three, three, 0.1, 1.0),
        lambda: raw.batch_norm_update(None, three.long(), three, three, 0.1, 1.0),
        lambda: raw.batch_norm_dx(dy, x, three, three, None, two, three, 1e-5),
        lambda: raw.batch_norm_stats(x.bool()),
    ]
    with backend.use():
        for call in calls:
            with pytest.raises(RuntimeError):
                call()
