"""pydl.verify must fail what is wrong: each function here has one fault of a kind that real kernels have had."""

from __future__ import annotations

import contextlib
import ctypes
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pydl
from pydl._grading import grade, rounding_bias, to_numpy
from pydl._problems import LAYOUTS, MARGIN, Guarded, Problem, poisoned_memory
from pydl._verify import levels, main, verify, verify_problem
from pydl.reference import Case, Spec

FP32 = ["float32"]


def failed(report, check=None, case=""):
    return [row for row in report.failures if check in (None, row.check) and case in row.case]


# what is right passes


@pytest.mark.parametrize("op", ["layer_norm", "max_pool2d", "relu", "gelu"])
def test_torch_itself_passes(op):
    report = verify(getattr(F, op), op=op, dtype=["float32", "bf16"])
    assert report.ok, report
    assert {row.check for row in report} == {"values", "gradients", "second", "re-run"}
    assert {row.dtype for row in report} == {"float32", "bfloat16"}


def test_the_public_name_is_the_function():
    assert pydl.verify is verify
    assert pydl.verify(F.relu, op="relu", dtype="fp32")


# what is wrong fails, and the report says where


def truncating(x, shape, weight=None, bias=None, eps=1e-5):
    """Casts to bfloat16 by cutting the low bits off, not by rounding."""
    y = F.layer_norm(x.float(), shape, *(None if t is None else t.float() for t in (weight, bias)), eps)
    cut = (y.detach().view(torch.int32) & -65536).view(torch.float32)
    return (y + (cut - y.detach())).to(x.dtype)


def low_precision_statistics(x, shape, weight=None, bias=None, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True) - mean * mean
    y = (x - mean) * torch.rsqrt(variance.clamp_min(0) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def reads_past_the_end(x, *args, **kwargs):
    """The mask of the last tile is missing: takes memory behind the tensor into its sum."""
    n = x.numel()
    if n == 0 or not x.is_contiguous():
        return F.relu(x)
    tile = -(-n // 16) * 16
    room = torch.as_strided(x.detach(), (tile,), (1,), x.storage_offset())
    return F.relu(x) + (room.sum() * 0 if tile > n else 0)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * torch.sigmoid(x)  # forgets x s (1 - s)


class ConstantGradient(torch.autograd.Function):
    """First derivative right, but made of numbers: nothing to differentiate again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x.detach())
        return dy * s * (1 + x.detach() * (1 - s))


def leaves_the_tail_unwritten(x):
    y = torch.empty_like(x)
    whole = x.numel() // 8 * 8
    y.view(-1)[:whole] = F.relu(x.reshape(-1)[:whole]) if x.is_contiguous() else 0
    return y if not x.requires_grad else F.relu(x)


def other_on_every_call(x):
    return F.relu(x) * (1 + 1e-7 * torch.rand(()))


def overwrites_its_input(x):
    y = F.relu(x)
    with torch.no_grad():
        x.detach().mul_(1.0000001)
    return y


def ignores_strides(x):
    if x.is_contiguous():
        return F.silu(x)
    flat = torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset())
    return F.silu(flat)


def last_of_equal_maxima(x, k, s=None, p=0, d=1, ceil_mode=False, return_indices=False):
    """Comparing with >= instead of >: values right, positions wrong where there are ties."""
    y, indices = F.max_pool2d(x.flip(-1, -2), k, s, p, d, ceil_mode, True)
    if not return_indices:
        return F.max_pool2d(x, k, s, p, d, ceil_mode)
    flipped = (x.shape[-1] * x.shape[-2] - 1 - indices).flip(-1, -2)
    good = F.max_pool2d(x, k, s, p, d, ceil_mode, True)
    return good[0], flipped if flipped.shape == good[1].shape else good[1]


def swallows_nan(x, *args):
    return F.max_pool2d(torch.nan_to_num(x, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), *args)


@pytest.mark.parametrize(
    ("fn", "op", "dtype", "check", "case"),
    [
        (truncating, "layer_norm", "bf16", "values", ""),
        (low_precision_statistics, "layer_norm", "fp32", "values", "mean 1e4"),
        (reads_past_the_end, "relu", "fp32", "values", "31"),
        (WrongGradient.apply, "silu", "fp32", "gradients", ""),
        (ConstantGradient.apply, "silu", "fp32", "second", ""),
        (leaves_the_tail_unwritten, "relu", "fp32", "values", "31"),
        (other_on_every_call, "relu", "fp32", "re-run", ""),
        (overwrites_its_input, "relu", "fp32", "inputs", ""),
        (ignores_strides, "silu", "fp32", "values", "transposed"),
        (ignores_strides, "silu", "fp32", "values", "channels_last"),
        (last_of_equal_maxima, "max_pool2d", "fp32", "values", "ties"),
        (swallows_nan, "max_pool2d", "fp32", "values", "NaN"),
        (lambda x: F.relu(x).float(), "relu", "bf16", "values", ""),
        (lambda x: F.relu(x)[..., :1], "relu", "fp32", "values", "31"),
        (lambda x: F.relu(x).detach(), "relu", "fp32", "gradients", ""),
        (lambda x: (F.relu(x), x), "relu", "fp32", "values", ""),
        (lambda x: 1 / 0, "relu", "fp32", "values", ""),
    ],
    ids=lambda v: getattr(v, "__qualname__", str(v)) if callable(v) else "",
)
def test_a_fault_is_found(fn, op, dtype, check, case):
    report = verify(fn, op=op, dtype=dtype)
    assert not report and failed(report, check, case), f"{check} of {case!r} should have failed:\n{report}"
    assert "WRONG" in str(report)


def test_a_fault_in_bfloat16_alone_leaves_float32_alone():
    def fn(x, *args):
        return truncating(x, *args) if x.dtype == torch.bfloat16 else F.layer_norm(x, *args)

    report = verify(fn, op="layer_norm", dtype=["fp32", "bf16"])
    assert {row.dtype for row in failed(report, "values")} == {"bfloat16"}
    assert "rounded to one side" in str(report)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op must be one of .*layer_norm.* 'layernorm'"):
        verify(F.relu, op="layernorm")
    with pytest.raises(ValueError, match="dtype must be one of .* 'fp8'"):
        verify(F.relu, op="relu", dtype="fp8")
    with pytest.raises(ValueError, match="holds relu"):
        verify(F.relu, op="activations")


# the rule


def test_grade_allows_what_torch_gets_wrong_and_no_more():
    oracle = np.array([3.0, -4.0, 5.0, 0.0])
    eps = torch.finfo(torch.float32).eps
    rms = float(np.sqrt(50 / 4))
    near = oracle + np.array([0, 0, 3.9 * eps * rms, 0])
    far = oracle + np.array([0, 0, 4.1 * eps * rms, 0])
    assert grade(near, oracle, dtype=torch.float32).ok and not grade(far, oracle, dtype=torch.float32).ok
    torchs = oracle + np.array([0, 1e-3, 0, 0])
    assert grade(oracle + 1.9e-3, oracle, torchs, dtype=torch.float32).ok
    assert not grade(oracle + 2.1e-3, oracle, torchs, dtype=torch.float32).ok
    assert grade(oracle + 2.9e-3, oracle, torchs, dtype=torch.float32, gradient=True).ok
    assert not grade(oracle + 3.1e-3, oracle, torchs, dtype=torch.float32, gradient=True).ok
    # the floor of a sum of 100 terms is ten times as high
    assert grade(oracle + 39 * eps * rms, oracle, dtype=torch.float32, reduction=100).ok
    assert not grade(oracle + 41 * eps * rms, oracle, dtype=torch.float32, reduction=100).ok


def test_grade_of_what_is_not_finite():
    inf, nan = np.inf, np.nan
    oracle = np.array([1.0, nan, inf, -inf])
    assert grade(oracle, oracle).ok
    for wrong in (
        [1, 1, inf, -inf],
        [1, nan, -inf, -inf],
        [1, nan, nan, -inf],
        [nan, nan, inf, -inf],
        [1, nan, inf, 1e308],
    ):
        assert not grade(np.array(wrong, dtype=np.float64), oracle).ok
    # what float16 cannot hold is infinite there
    assert grade(torch.tensor([inf, 1.0], dtype=torch.float16), np.array([1e6, 1.0])).ok
    assert not grade(torch.tensor([65504.0, 1.0], dtype=torch.float16), np.array([1e6, 1.0])).ok


def test_grade_of_zeros_shapes_and_integers():
    assert grade(np.zeros(3), np.zeros(3)).ok
    assert not grade(np.array([0, 1e-30, 0]), np.zeros(3)).ok
    assert not grade(np.zeros((3, 1)), np.zeros(3)).ok
    assert grade(np.zeros(0), np.zeros(0)).ok
    assert grade(np.array([1, 2]), np.array([1, 2])).ok and not grade(np.array([1, 2]), np.array([1, 3])).ok


def test_rounding_to_nearest_has_no_bias_and_truncation_has():
    exact = np.random.default_rng(0).standard_normal(1000)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = torch.from_numpy(exact).to(dtype)
        below = torch.from_numpy(np.nextafter(exact, 0)).to(dtype)
        assert (
            abs(rounding_bias(to_numpy(rounded), exact, dtype))
            < 0.05
            > abs(rounding_bias(to_numpy(below), exact, dtype))
        )
        unit = torch.finfo(dtype).eps * 2.0 ** np.floor(np.log2(np.abs(exact)))
        cut = np.trunc(exact / unit) * unit
        assert rounding_bias(cut, exact, dtype) == pytest.approx(-0.5, abs=0.05)
        assert grade(rounded, exact).ok and not grade(torch.from_numpy(cut).to(dtype), exact).ok
    assert rounding_bias(exact, exact, torch.float32) == 0


# the rig itself


@pytest.mark.parametrize("layout", LAYOUTS)
def test_guarded_tensors_hold_their_values_and_notice_writes(layout):
    values = np.arange(24.0).reshape(2, 3, 2, 2)
    guarded = Guarded(values, layout, torch.float32, torch.device("cpu"))
    expected = np.broadcast_to(values[:1], values.shape) if layout == "expanded" else values
    assert np.array_equal(to_numpy(guarded.tensor), expected)
    assert guarded.tensor.is_contiguous() == (layout in ("contiguous", "misaligned"))
    assert guarded.intact()
    guarded.buffer[-1 if layout != "contiguous" else MARGIN - 1] = 0.0
    assert not guarded.intact()


def test_integers_keep_their_dtype_between_canaries():
    for values in (np.arange(6).reshape(2, 3), np.array([[True, False, True]]), np.array(3)):
        guarded = Guarded(values, "contiguous", torch.bfloat16, torch.device("cpu"))
        assert guarded.tensor.dtype == torch.from_numpy(values).dtype and np.array_equal(
            to_numpy(guarded.tensor), values
        )
        assert guarded.intact()
        guarded.buffer[0] = 0
        assert not guarded.intact()


def gather_cases():
    yield Case("rows", (np.arange(12.0).reshape(3, 4) / 7, np.array([2, 0, 2])), second=True, layouts=True)


def test_integer_arguments_have_no_gradient_and_results_may_be_wider():
    """A gather of rows, with its positions as a second, integer result, float32 for half-precision input."""

    def forward(x, rows):
        return x[rows], rows

    def gradient(dy, x, rows):
        dx = np.zeros(x.shape)
        np.add.at(dx, rows, dy)
        return (dx,)

    def right(x, rows):
        return (x.float() if x.dtype.itemsize < 4 else x)[rows], rows

    spec = Spec("gather", "", forward, gradient, gather_cases, widened=True)
    (problem,) = (Problem(spec, case, torch.bfloat16) for case in gather_cases())
    for level in levels(problem):
        assert all(g.ok for _, _, g in verify_problem(right, problem, torch.device("cpu"), level))
    narrow = verify_problem(lambda x, rows: (x[rows], rows), problem, torch.device("cpu"), "values")
    assert not all(g.ok for _, _, g in narrow)
    moved = verify_problem(lambda x, rows: (right(x, rows)[0], rows + 1), problem, torch.device("cpu"), "values")
    assert not all(g.ok for _, _, g in moved)
    plain = Spec("gather", "", forward, None, gather_cases)
    assert levels(Problem(plain, next(gather_cases()), torch.float32)) == ["values"]


def test_constants_are_rounded_to_the_dtype_and_have_no_gradient():
    def cases():
        yield Case("scaled", (np.arange(1.0, 5.0), np.array([1 / 3, 2.0, 1 / 7, 5.0])), second=True, layouts=True)

    spec = Spec("scale", "", lambda x, k: x * k, lambda dy, x, k: (dy * k,), cases, constants=(1,))
    # positions count every argument: where k is absent, what follows it is no constant
    assert Problem(spec, Case("absent", (np.ones(2), None, np.ones(2))), torch.float32).varies == [True, True]
    for problem in (Problem(spec, next(cases()), torch.bfloat16), Problem(spec, next(cases()), torch.float64)):
        assert len(problem.arrays) == 2 and len(problem.floating) == 1
        for level in levels(problem):
            assert all(
                g.ok for _, _, g in verify_problem(lambda x, k: x * k.detach(), problem, torch.device("cpu"), level)
            )
        wrong = verify_problem(lambda x, k: x * k.detach() ** 2, problem, torch.device("cpu"), "gradients")
        assert not all(g.ok for _, _, g in wrong)


def test_poison_reaches_python_and_the_stable_abi():
    """The C++ libraries allocate through aoti_torch_empty_strided, which torch's own switch does not cover."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert torch.empty(1000, dtype=dtype).isnan().all()
    assert torch.empty(100, dtype=torch.uint8).eq(255).all()
    assert torch.empty(100, dtype=torch.int64).ne(0).all()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for n in (1, 16, 1000, 300_000):  # a small chunk, a cached one, the heap, a mapping of its own
        one, handle, data = ctypes.c_int64 * 1, ctypes.c_void_p(), ctypes.c_void_p()
        code = library.aoti_torch_empty_strided(
            ctypes.c_int64(1),
            one(n),
            one(1),
            ctypes.c_int32(6),
            ctypes.c_int32(0),
            ctypes.c_int32(0),
            ctypes.byref(handle),
        )
        assert code == 0 and library.aoti_torch_get_data_ptr(handle, ctypes.byref(data)) == 0
        values = np.ctypeslib.as_array(ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), (n,)).copy()
        library.aoti_torch_delete_tensor_object(handle)
        assert np.isnan(values).all(), n


def test_poison_is_undone():
    before = torch.are_deterministic_algorithms_enabled()
    with contextlib.suppress(ZeroDivisionError), poisoned_memory():
        1 / 0  # noqa: B018
    assert torch.are_deterministic_algorithms_enabled() == before


# the command


def test_command_writes_what_it_prints(tmp_path, capsys):
    target = tmp_path / "out.json"
    assert main(["layer_norm", "--dtype", "fp32", "--backend", "torch", "--json", str(target)]) == 0
    text = capsys.readouterr().out
    assert "layer_norm" in text and "torch" in text and "ok" in text
    records = json.loads(target.read_text())
    assert {r["check"] for r in records} >= {"values", "gradients", "second"} and all(r["ok"] for r in records)
    assert {"op", "backend", "device", "dtype", "case", "err", "bound", "torch_err"} <= set(records[0])


def test_command_says_what_cannot_run(capsys):
    status = main(["max_pool2d", "--dtype", "fp32", "--backend", "triton"])
    text = capsys.readouterr().out
    assert status == 1 and "not run on triton" in text and "max_pool2d" in text


@pytest.mark.parametrize("argv", [["no_such_op"], ["relu", "--dtype", "fp12"], ["--backend", "abacus"]])
def test_command_refuses_unknown_names(argv):
    with pytest.raises(SystemExit, match=r"no_such_op|fp12|abacus"):
        main(argv)
