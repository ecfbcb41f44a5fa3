"""adaptive_avg_pool1d, 2d and 3d on every backend; avg_pool's file tests the kernels that they share."""

from __future__ import annotations

import _opinfo
import pytest
import torch
import torch.nn.functional as F
from _backends import backends_for
from _checks import (
    check_autocast,
    check_cases,
    check_compile,
    check_deterministic,
    check_gradcheck,
    check_layouts,
    check_opcheck,
    check_same_error,
)

from pydl import ops
from pydl.reference import spec as spec_of

OPS = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
DIMS = {op: int(op[-2]) for op in OPS}
SIZES = {1: (37,), 2: (7, 19), 3: (5, 6, 9)}
TORCH = ("torch",)
HALVES = (torch.float16, torch.bfloat16)


def pairs(without=(), dtypes=True):
    """pytest parameters: (backend, dtype), or the backend, of all three ops."""
    return [
        pytest.param(*(b, dtype) if dtypes else (b,), id=f"{b.op}-{b}" + (f"-{dtype}"[6:] if dtypes else ""), marks=m)
        for op in OPS
        for b, m in ((p.values[0], p.marks) for p in backends_for(op, torch.float32, without=without))
        for dtype in (b.dtypes if dtypes else (None,))
    ]


def last(x):
    """The same values with the channels innermost, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def torchs(backend):
    return getattr(F, backend.op)


# values and gradients against the oracle


@pytest.mark.parametrize("level", ["values", "gradients", "second"])
@pytest.mark.parametrize(("backend", "dtype"), pairs())
def test_cases(backend, dtype, level):
    check_cases(backend, dtype, level)


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_grid_of_parts(backend, layout):
    # no part, one, halves, parts of two lengths, single elements, more parts than elements; 17: a vector and one more
    dims = DIMS[backend.op]
    channels = 3 if backend.slow else 17
    for sizes in ((6, 8, 12)[:dims], SIZES[dims], (1, 600) if dims == 2 else SIZES[dims]):
        x = layout(torch.randn(2, channels, *sizes, dtype=torch.float64)).to(backend.device).requires_grad_()
        for size in (0, 1, 2, 3, 5, (4, 3, 7)[:dims], tuple(sizes), 11):
            y, expected = backend(x, size), torchs(backend)(x, size)
            torch.testing.assert_close(y, expected)
            dy = torch.randn_like(expected)
            (dx,) = torch.autograd.grad(y, x, dy)
            # torch refuses the backward of no part
            wanted = torch.autograd.grad(expected, x, dy)[0] if size else torch.zeros_like(dx)
            torch.testing.assert_close(dx, wanted)
            assert dx.stride() == x.stride()


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_the_mean_of_many_stays_accurate(backend):
    # 65536 values near 8 in each plane: float32 added one by one would be off by 1e-5
    x = 8 + torch.rand(1, 2 if backend.slow else 9, *{1: (65536,), 2: (256, 256), 3: (64, 32, 32)}[DIMS[backend.op]])
    exact = x.double().flatten(2).mean(-1)
    for layout in (torch.Tensor.contiguous, last):
        y = backend(layout(x).to(backend.device), 1).double().flatten(1).cpu()
        limit = 2e-6 if layout is torch.Tensor.contiguous or DIMS[backend.op] > 1 else 2e-5
        torch.testing.assert_close(y, exact, rtol=limit, atol=0)


# gradcheck, layouts, edge sizes


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_gradcheck(backend):
    x = torch.randn(1, 2, *(5, 4, 4)[: DIMS[backend.op]], dtype=torch.float64, device=backend.device)
    for size in (3, 1):
        check_gradcheck(lambda t, size=size: backend(t, size), [x.requires_grad_()])


@pytest.mark.parametrize(("backend", "dtype"), pairs(TORCH))
def test_layouts(backend, dtype):
    (case,) = [case for case in spec_of(backend.op).cases() if case.layouts]
    check_layouts(backend, dtype, case)


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))  # torch refuses the backward of no channel
def test_unbatched_and_empty(backend):
    dims = DIMS[backend.op]
    x = torch.randn(3, *([8] * dims), device=backend.device, requires_grad=True)
    y = backend(x, 3)
    torch.testing.assert_close(y, torchs(backend)(x, 3))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    for shape in ((0, 3), (2, 0)) if dims < 3 else ((0, 3),):
        empty = torch.zeros(*shape, *([8] * dims), device=backend.device, requires_grad=True)
        y = backend(empty, 3)
        assert y.shape == (*shape, *([3] * dims))
        assert torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


# torch's own samples, and errors


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_samples_of_torchs_own_tests(backend):
    theirs, ran = torchs(backend), 0
    for x, args, kwargs in _opinfo.samples(backend.op):
        y, expected = backend(x, *args, **kwargs), theirs(x, *args, **kwargs)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(expected)
        torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, expected)))
        ran += 1
    assert ran > 3
    for x, args, kwargs in _opinfo.errors(backend.op):
        check_same_error(getattr(ops, backend.op), theirs, x, *args, **kwargs)


def errors():
    one, two, three = (torch.zeros(1, 1, *([8] * dims)) for dims in (1, 2, 3))
    for size in ((2, 2), None, (None,), -1, 2.5, True, "2", ()):
        yield "adaptive_avg_pool1d", dict(input=one, output_size=size), ["output_size", str(size)]
    for size in ((2,), (2, 2, 2), None, (None,), -1, 2.5, True, "2", (), (2, None, 2, 2), 2**62):
        yield "adaptive_avg_pool2d", dict(input=two, output_size=size), ["output_size", str(size)]
    for size in ((2, 2), (None, 2), -1, True):
        yield "adaptive_avg_pool3d", dict(input=three, output_size=size), ["output_size", str(size)]
    for op, x in (("adaptive_avg_pool1d", one), ("adaptive_avg_pool2d", two), ("adaptive_avg_pool3d", three)):
        for bad in (x[0, 0], x[None], x[..., :0]):
            yield op, dict(input=bad, output_size=2), ["input", str(list(bad.shape))]
    yield "adaptive_avg_pool3d", dict(input=three[:, :0], output_size=2), ["input", "[1, 0, 8, 8, 8]"]


@pytest.mark.parametrize(("op", "arguments", "says"), list(errors()))
def test_errors_are_torchs(op, arguments, says):
    check_same_error(getattr(ops, op), getattr(F, op), says=[op, *says], **arguments)


# torch's machinery


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_opcheck(dims):
    x = last(torch.randn(2, 3, *(7, 6, 5)[:dims])).requires_grad_()
    check_opcheck(torch.ops.pydl.avg_pool_fwd.default, x, [3] * dims, False, None)
    dy = torch.randn(2, 3, *([3] * dims), requires_grad=True)
    check_opcheck(torch.ops.pydl.avg_pool_bwd.default, dy, x.shape[2:], False, None, True)


@pytest.mark.compile
@pytest.mark.parametrize("op", OPS)
def test_compile(op):
    dims = DIMS[op]
    shapes = [[last(torch.randn(*s[: dims + 2]))] for s in ((2, 3, 8, 8, 4), (1, 3, 11, 6, 5))]
    check_compile(lambda x: getattr(ops, op)(x, 3) * 2, shapes)
    if dims > 1:
        check_compile(lambda x: getattr(ops, op)(x, (None, *[2] * (dims - 1))) * 2, shapes)


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_autocast(backend):
    x = torch.randn(1, 2, *([6] * DIMS[backend.op]), device=backend.device)
    for given in (x, x.bfloat16()):
        check_autocast(backend, torchs(backend), given, 2, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_deterministic(backend):
    x = torch.randn(2, 5, *(8, 9, 6)[: DIMS[backend.op]], device=backend.device)
    check_deterministic(lambda t: backend(t, 5), x)
