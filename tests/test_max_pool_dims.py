"""max_pool1d and 3d and the adaptive ones on every backend; max_pool2d has a file of its own."""

from __future__ import annotations

import itertools

import _opinfo
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _backends import available, backends_for
from _checks import (
    assert_same_bits,
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
from pydl.reference.max_pool import max_pool, max_pool_grad

WINDOWED = ("max_pool1d", "max_pool3d")
ADAPTIVE = ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
OPS = (*WINDOWED, *ADAPTIVE)
DIMS = {op: int(op[-2]) for op in OPS}
SIZES = {1: (37,), 2: (7, 19), 3: (5, 6, 9)}
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
TORCH = ("torch",)
HALVES = (torch.float16, torch.bfloat16)


def pairs(names=OPS, without=(), dtypes=True):
    """pytest parameters: (backend, dtype), or the backend, of several ops."""
    return [
        pytest.param(*(b, dtype) if dtypes else (b,), id=f"{b.op}-{b}" + (f"-{dtype}"[6:] if dtypes else ""), marks=m)
        for op in names
        for b, m in ((p.values[0], p.marks) for p in backends_for(op, torch.float32, without=without))
        for dtype in (b.dtypes if dtypes else (None,))
    ]


def last(x):
    """The same values with the channels innermost, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def torchs(backend):
    return getattr(F, backend.op)


def distinct(*shape, dtype=torch.float32, device="cpu"):
    """No two values are equal, so that the gradient is the same whatever rule breaks ties."""
    return (torch.randperm(int(np.prod(shape))).reshape(shape) - 7).to(device, dtype)


# values, positions and gradients against the oracle


@pytest.mark.parametrize("level", ["values", "gradients", "second"])
@pytest.mark.parametrize(("backend", "dtype"), pairs())
def test_cases(backend, dtype, level):
    # the slow runner takes the oracle's largest case, of 256 taps, in one dtype only
    small = backend.slow and dtype != torch.float32
    check_cases(backend, dtype, level, keep=lambda case: not (small and case.name == "256 taps"))


def grid(dims):
    """k, s, p, d, ceil_mode: what torch accepts, and its CPU kernel too, which must have a tap inside each window."""
    sizes = (1, 2, 3, (2, 3, 1)[:dims])
    for k, s, p, d, ceil_mode in itertools.product(sizes, (1, 2, 3, (1, 3, 2)[:dims]), (0, 1), (1, 2), (False, True)):
        if 2 * p <= (k if isinstance(k, int) else min(k)):
            yield k, s, p, d, ceil_mode


@pytest.mark.parametrize("backend", pairs(WINDOWED, TORCH, dtypes=False))
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_grid_of_windows(backend, layout):
    # rounded values: ties everywhere; the slow runner takes every seventh window
    dims = DIMS[backend.op]
    x = layout(torch.randn(2, 5, *SIZES[dims]).mul(2).round()).to(backend.device)
    array = x.double().cpu().numpy()
    for window in list(grid(dims))[:: 7 if backend.slow else 2 if dims == 3 else 1]:
        oracle, places = max_pool(dims, array, *window)
        y, indices = backend(x, *window, return_indices=True)
        assert np.array_equal(y.double().cpu().numpy(), oracle), window
        assert indices.dtype == torch.int64 and np.array_equal(indices.cpu().numpy(), places), window
        assert torch.equal(backend(x, *window), y), window
        leaf = x.clone().requires_grad_()
        out = backend(leaf, *window)
        dy = torch.arange(out.numel(), device=x.device).reshape(out.shape).float() % 31
        (dx,) = torch.autograd.grad(out, leaf, dy)
        # sums of up to 27 integers below 31: exact in float32
        assert np.array_equal(dx.cpu().numpy(), max_pool_grad(dy.cpu().numpy(), places, *SIZES[dims])), window
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("backend", pairs(ADAPTIVE, TORCH, dtypes=False))
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_grid_of_parts(backend, layout):
    # one part, halves, parts of two lengths, single elements, more parts than elements; 17: more than a vector's lanes
    dims = DIMS[backend.op]
    channels = 3 if backend.slow else 17
    for sizes in ((6, 8, 12)[:dims], SIZES[dims]):
        x = layout(torch.randn(2, channels, *sizes).mul(2).round()).to(backend.device)
        for size in (1, 2, 3, 5, (4, 3, 7)[:dims], tuple(sizes), 11):
            y, indices = backend(x, size, return_indices=True)
            expected, places = torchs(backend)(x, size, return_indices=True)
            assert torch.equal(y, expected) and torch.equal(indices, places), size
            leaf, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            out = backend(leaf, size)
            dy = (torch.arange(out.numel(), device=x.device) % 31).reshape(out.shape).float()
            (dx,) = torch.autograd.grad(out, leaf, dy)
            assert torch.equal(dx, torch.autograd.grad(torchs(backend)(theirs, size), theirs, dy)[0]), size
            assert dx.stride() == x.stride()


@pytest.mark.parametrize("backend", pairs(dtypes=False))
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_which_tap_wins(backend, layout):
    # a window of two in each dimension whose taps are all equal, all -inf, or NaN but one: 17 channels, a vector's tail
    dims = DIMS[backend.op]
    nan, taps = float("nan"), 2**dims
    mixed = torch.arange(taps).float()
    mixed[[0, taps // 2]] = nan
    for values, place in (
        (torch.ones(taps), 0),
        (torch.full((taps,), -torch.inf), 0),
        (mixed, taps // 2),  # the last of several NaN
        (torch.where(torch.arange(taps) == taps - 1, 3.0, -torch.inf), taps - 1),
    ):
        x = layout(values.reshape(1, 1, *([2] * dims)).expand(2, 17, *([2] * dims))).to(backend.device)
        window = (1,) if backend.op in ADAPTIVE else (2,)
        y, indices = backend(x, *window, return_indices=True)
        assert indices.eq(place).all()
        torch.testing.assert_close(y.flatten(), values[place].to(y).expand(34), equal_nan=True, rtol=0, atol=0)
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(backend(leaf, *window).sum(), leaf)
        assert dx.flatten(2).sum(-1).eq(1).all() and dx.flatten(2)[..., place].eq(1).all()


@pytest.mark.parametrize("backend", pairs(("max_pool3d",), TORCH, dtypes=False))
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_a_window_with_no_tap_inside(backend, layout):
    # D = 1, k = 2, p = 1, d = 2: both depths of the window are outside; torch's CPU kernel writes outside of its planes
    x = layout(torch.ones(1, 9, 1, 4, 4)).to(backend.device).requires_grad_()
    for indices in (False, True):
        y = backend(x, (2, 1, 1), 1, (1, 0, 0), (2, 1, 1), return_indices=indices)
        y = y[0] if indices else y
        assert y.shape == (1, 9, 1, 4, 4) and y.eq(-torch.inf).all()
        assert not torch.autograd.grad(y, x, torch.ones_like(y))[0].any()


# gradcheck


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_gradcheck(backend):
    dims = DIMS[backend.op]
    x = distinct(1, 2, *(5, 4, 4)[:dims], dtype=torch.float64, device=backend.device).requires_grad_()
    for window in ((3,), (1,)) if backend.op in ADAPTIVE else ((2,), (3, 2, 1, 1, True)):
        check_gradcheck(lambda t, w=window: backend(t, *w), [x])


# layouts and edge sizes


@pytest.mark.parametrize(("backend", "dtype"), pairs(without=TORCH))
def test_layouts(backend, dtype):
    (case,) = [case for case in spec_of(backend.op).cases() if case.layouts]
    check_layouts(backend, dtype, case)


@pytest.mark.parametrize("backend", pairs(without=TORCH, dtypes=False))
@pytest.mark.parametrize("channels", [1, 8, 33])  # both layouts at once; whole vectors; a tail
def test_layout_is_kept(backend, channels):
    dims = DIMS[backend.op]
    x = torch.randn(2, channels, *(7, 6, 5)[:dims], device=backend.device)
    window = (3,) if backend.op in ADAPTIVE else (3, 2, 1)
    plain = backend(x, *window)
    leaf = last(x).requires_grad_()
    y, indices = backend(leaf, *window, return_indices=True)
    assert plain.is_contiguous()
    if channels > 1:
        assert y.movedim(1, -1).is_contiguous() and indices.movedim(1, -1).is_contiguous()
    assert_same_bits(y.detach(), plain)
    for dy in (torch.randn(y.shape, device=x.device), torch.ones((), device=x.device).expand(y.shape)):
        other = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(torchs(backend)(other, *window), other, dy)
        for out in (y, backend(leaf, *window)):
            (dx,) = torch.autograd.grad(out, leaf, dy, retain_graph=True)
            assert dx.stride() == leaf.stride()
            torch.testing.assert_close(dx, wanted)


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_edge_sizes(backend):
    # every size around 1, 8, 16 and 32 in the last axis: vector bodies, tails and neither; 1100: three tiles
    dims = DIMS[backend.op]
    for width in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, *(() if backend.slow else (1100,))):
        x = torch.randn(1, 2, *(4, 5)[: dims - 1], width, device=backend.device)
        for window in ((1,), (2,), (3,)) if backend.op in ADAPTIVE else ((3, 1, 1), (3, 2, 1), (2, 2, 1, 1, True)):
            y, indices = backend(x, *window, return_indices=True)
            expected = torchs(backend)(x, *window, return_indices=True)
            assert_same_bits(y, expected[0])
            assert_same_bits(indices, expected[1])


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_unbatched_and_empty(backend):
    dims = DIMS[backend.op]
    x = torch.randn(3, *([8] * dims), device=backend.device, requires_grad=True)
    window = (3,) if backend.op in ADAPTIVE else (3, 2, 1)
    y, indices = backend(x, *window, return_indices=True)
    expected = torchs(backend)(x, *window, return_indices=True)
    assert torch.equal(y, expected[0]) and torch.equal(indices, expected[1])
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected[0])))
    empty = torch.zeros(0, 3, *([8] * dims), device=backend.device, requires_grad=True)
    y = backend(empty, *window)
    assert y.shape == (0, *expected[0].shape)
    assert torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize("backend", pairs(ADAPTIVE, TORCH, dtypes=False))
def test_no_parts(backend):
    dims = DIMS[backend.op]
    for layout in (torch.Tensor.contiguous, last):
        x = layout(torch.randn(2, 3, *([4] * dims))).to(backend.device).requires_grad_()
        y, indices = backend(x, 0, return_indices=True)
        assert y.shape == indices.shape == (2, 3, *([0] * dims)) and indices.dtype == torch.int64
        for out in (y, backend(x, 0)):
            assert not torch.autograd.grad(out.sum(), x)[0].any()


@pytest.mark.parametrize("op", WINDOWED)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_gives_the_same_bits(op, threads):
    x = torch.randn(3, 7, *{1: (1900,), 3: (9, 19, 23)}[DIMS[op]], requires_grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            y = getattr(ops, op)(x, 3, 2, 1)
            results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), x)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


# torch's own samples


@pytest.mark.parametrize("backend", pairs(without=TORCH, dtypes=False))
def test_samples_of_torchs_own_tests(backend):
    theirs, ran = torchs(backend), 0
    for x, args, kwargs in itertools.islice(_opinfo.samples(backend.op), 40 if backend.slow else None):
        y, expected = backend(x, *args, **kwargs), theirs(x, *args, **kwargs)
        y, expected = (out if isinstance(out, tuple) else (out,) for out in (y, expected))
        for a, b in zip(y, expected, strict=True):
            assert torch.equal(a, b)
        dy = torch.randn_like(expected[0])
        torch.testing.assert_close(*(torch.autograd.grad(out[0], x, dy)[0] for out in (y, expected)))
        ran += 1
    assert ran > 3
    for x, args, kwargs in _opinfo.errors(backend.op):
        check_same_error(getattr(ops, backend.op), theirs, x, *args, **kwargs)


# errors


def errors():
    one, two, three = (torch.zeros(1, 1, *([8] * dims)) for dims in (1, 2, 3))
    for size in ((2, 2), None, (None,), -1, 2.5, True, "2", ()):
        yield "adaptive_max_pool1d", dict(input=one, output_size=size), ["output_size", str(size)]
    for size in ((2,), (2, 2, 2), None, (None,), -1, 2.5, True, "2", (), (2, None, 2, 2), 2**62):
        yield "adaptive_max_pool2d", dict(input=two, output_size=size), ["output_size", str(size)]
    for size in ((2, 2), (None, 2), -1, True):
        yield "adaptive_max_pool3d", dict(input=three, output_size=size), ["output_size", str(size)]
    for op, x in (("adaptive_max_pool1d", one), ("adaptive_max_pool2d", two), ("adaptive_max_pool3d", three)):
        for bad in (x[0, 0], x[None], x[:, :0], x[..., :0]):
            yield op, dict(input=bad, output_size=2), ["input", str(list(bad.shape))]
    for op, x in (("max_pool1d", one), ("max_pool3d", three)):
        for bad in (x[0, 0], x[None], x[:, :0], x[..., :0]):
            yield op, dict(input=bad, kernel_size=2), ["input", str(list(bad.shape))]
        yield op, dict(input=[[1.0]], kernel_size=2), ["input", "list"]
        # torch takes any stride for a sequence; products of larger ones than 2^31 would leave 64 bits
        for name, value in (
            *(("stride", 2**31) if op == "max_pool3d" else ("stride", -1),),
            *(("kernel_size", 0), ("kernel_size", 9), ("kernel_size", (2, 2)), ("kernel_size", ()), ("stride", 0)),
            *(("padding", 2), ("padding", -1), ("dilation", 0), ("kernel_size", 2.5), ("kernel_size", True)),
            *(("ceil_mode", 1), ("kernel_size", 2**31)),
        ):
            yield op, {"input": x, "kernel_size": 2, name: value}, [name]


@pytest.mark.parametrize(("op", "arguments", "says"), list(errors()))
def test_errors_are_torchs(op, arguments, says):
    check_same_error(getattr(ops, op), getattr(F, op), says=[op, *says], **arguments)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_do_what_torch_does(op, dtype):
    x = torch.ones(1, 1, *([4] * DIMS[op]), dtype=dtype)
    try:
        expected = getattr(F, op)(x, 2)
    except Exception as error:
        with pytest.raises(type(error)):
            getattr(ops, op)(x, 2)
    else:
        assert_same_bits(getattr(ops, op)(x, 2), expected)


@pytest.mark.parametrize("backend", pairs(("max_pool3d",), TORCH, dtypes=False))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_indices_from_elsewhere_never_leave_the_planes(backend, dtype):
    low, high = (0, 256) if dtype == torch.uint8 else (-(2**40), 2**40)
    namespace = NAMESPACES[backend.name]
    for shape, window in (((2, 9, 4, 4, 4), [3] * 3 + [2] * 3 + [1] * 6), ((2, 9, 4, 3, 5), [4, 3, 5])):
        for layout in (torch.Tensor.contiguous, last):
            indices = layout(torch.randint(low, high, shape, dtype=dtype).to(backend.device))
            dy, x = (layout(torch.ones(s, device=backend.device)) for s in (shape, (2, 9, 7, 7, 7)))
            with backend.use():
                dx = namespace.max_pool_bwd(dy, indices, (7, 7, 7), window)
                y = namespace.max_pool_gather(x, indices, window)
            assert dx.shape == x.shape and dx.isfinite().all() and 0 <= dx.sum() <= dy.numel()
            assert y.shape == dy.shape and (y.eq(0) | y.eq(1)).all()


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available("max_pool3d") if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    with backend.use():
        for x, window in (
            (distinct(2, 3, 13), [3, 2, 1, 1]),
            (last(distinct(2, 3, 5, 6, 4)), [3] * 3 + [2] * 3 + [1] * 6),
            (distinct(2, 3, 5, 6, 4), [2, 3, 4]),
        ):
            leaf = x.clone().requires_grad_()
            check_opcheck(namespace.max_pool_values.default, leaf, window, False)
            check_opcheck(namespace.max_pool_with_indices.default, leaf, window, False, False)
            y, indices = namespace.max_pool_with_indices(x, window, False, False)
            dy = torch.randn_like(y).requires_grad_()
            check_opcheck(namespace.max_pool_bwd.default, dy, indices, x.shape[2:], window)
            check_opcheck(namespace.max_pool_gather.default, leaf, indices, window)


@pytest.mark.compile
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("op", OPS)
def test_compile(op, layout):
    dims = DIMS[op]
    window = (3,) if op in ADAPTIVE else (3, 2, 1)
    shapes = [[layout(distinct(*s[: dims + 2]))] for s in ((2, 3, 8, 8, 4), (1, 3, 11, 6, 5))]
    check_compile(lambda x: getattr(ops, op)(x, *window) * 2, shapes)


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_autocast(backend):
    x = torch.randn(1, 2, *([6] * DIMS[backend.op]), device=backend.device)
    for given in (x, x.bfloat16()):
        check_autocast(backend, torchs(backend), given, 2, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", pairs(without=TORCH, dtypes=False))
def test_deterministic(backend):
    x = torch.randn(2, 5, *(8, 9, 6)[: DIMS[backend.op]], device=backend.device)
    window = (5,) if backend.op in ADAPTIVE else (3, 1, 1)
    check_deterministic(lambda t: backend(t, *window), x)
