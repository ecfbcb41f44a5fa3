"""avg_pool1d, 2d and 3d on every backend: values, gradients, layouts, edge sizes, errors, torch's machinery."""

from __future__ import annotations

import functools
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

OPS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
DIMS = {op: int(op[-2]) for op in OPS}
# sizes by dimensions: odd ones, with a vector's tail in the last
SIZES = {1: (37,), 2: (7, 37), 3: (5, 6, 19)}
TORCH = ("torch",)
HALVES = (torch.float16, torch.bfloat16)


def pairs(without=(), dtypes=True):
    """pytest parameters: (backend, dtype), or the backend, of all three ops."""
    return [
        pytest.param(*(b, dtype) if dtypes else (b,), id=f"{b.op}-{b}" + (f"-{dtype}"[6:] if dtypes else ""), marks=m)
        for op in OPS
        for b, m in ((p.values[0], p.marks) for p in backends_for(op, torch.float32, without=without))
        for dtype in (b.dtypes if dtypes else (None,))
        if not (op == "avg_pool3d" and b.name == "torch" and dtype in HALVES)  # which torch's CPU kernel refuses
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


@functools.cache
def grid(dims):
    """k, s, p, ceil_mode, count_include_pad that torch accepts; strides on both sides of what is vectorised."""
    sizes = (1, 2, 3, 5, (4, 2, 3)[:dims])
    return [
        (k, s, p, ceil_mode, inside)
        for k, s, p in itertools.product(sizes, (1, 2, 3, (2, 1, 3)[:dims]), (0, 1, 2))
        if 2 * p <= (k if isinstance(k, int) else min(k))
        for ceil_mode, inside in ((False, True), (True, False), (True, True))
    ]


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_grid_of_windows(backend, layout):
    dims = DIMS[backend.op]
    # 17 channels: one more than a vector has lanes; the slow runner takes every seventh window
    x = layout(torch.randn(1, 3 if backend.slow else 17, *SIZES[dims], dtype=torch.float64)).to(backend.device)
    for window in grid(dims)[:: 7 if backend.slow else 1]:
        leaf, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = backend(leaf, *window), torchs(backend)(theirs, *window)
        torch.testing.assert_close(y, expected, msg=lambda m, w=window: f"{w}: {m}")
        dy = torch.randn_like(expected)
        (dx,), (wanted,) = torch.autograd.grad(y, leaf, dy), torch.autograd.grad(expected, theirs, dy)
        torch.testing.assert_close(dx, wanted, msg=lambda m, w=window: f"{w}: {m}")
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_half_precision_is_summed_in_float32(backend):
    # 2048 + 15 * 1 added in float16 one by one stays 2048
    dims = DIMS[backend.op]
    for layout in (torch.Tensor.contiguous, last):
        x = torch.ones(1, 8, *([16] * dims), dtype=torch.float16)
        x[..., 0] = 2048
        y = backend(layout(x).to(backend.device), (*([1] * (dims - 1)), 16), 1)
        assert y.eq(torch.tensor((2048 + 15) / 16).half()).all()
        leaf = layout(torch.zeros(1, 8, *([16] * dims), dtype=torch.float16)).to(backend.device).requires_grad_()
        y = backend(leaf, (*([1] * (dims - 1)), 16), 1, (*([0] * (dims - 1)), 8))
        dy = torch.full_like(y, 16)
        dy[..., 0] = 2048 * 16
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert dx[..., 0].eq(2048 + 8).all()


# gradcheck


@pytest.mark.parametrize("backend", pairs(dtypes=False))
@pytest.mark.parametrize("window", [(2,), (3, 2, 1, True), (3, 2, 1, True, False)], ids=str)
def test_gradcheck(backend, window):
    dims = DIMS[backend.op]
    x = torch.randn(1, 2, *(5, 4, 4)[:dims], dtype=torch.float64, device=backend.device, requires_grad=True)
    check_gradcheck(lambda t: backend(t, *window), [x])


# layouts and edge sizes


@pytest.mark.parametrize(("backend", "dtype"), pairs(TORCH))
def test_layouts(backend, dtype):
    (case,) = [case for case in spec_of(backend.op).cases() if case.layouts]
    check_layouts(backend, dtype, case)


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
@pytest.mark.parametrize("channels", [1, 3, 16, 33, 130])  # both layouts at once; a tail; whole vectors; several blocks
def test_layout_is_kept(backend, channels):
    dims = DIMS[backend.op]
    x = torch.randn(2, channels, *(7, 6, 5)[:dims], device=backend.device)
    expected = torchs(backend)(x, 3, 2, 1)
    y = backend(x, 3, 2, 1)
    assert y.is_contiguous()
    leaf = last(x).requires_grad_()
    z = backend(leaf, 3, 2, 1)
    if channels > 1:
        assert z.movedim(1, -1).is_contiguous() and not z.is_contiguous()
    for out in (y, z):
        torch.testing.assert_close(out, expected)
    for dy in (torch.randn(z.shape, device=x.device), torch.ones((), device=x.device).expand(z.shape)):
        (dx,) = torch.autograd.grad(z, leaf, dy, retain_graph=True)
        assert dx.stride() == leaf.stride()
        other = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(torchs(backend)(other, 3, 2, 1), other, dy)
        torch.testing.assert_close(dx, wanted)


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_edge_sizes(backend):
    # every size around 1, 8, 16, 32 and 64 in the last axis: vector bodies, tails and neither; 1100: three tiles
    dims = DIMS[backend.op]
    for width in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, *(() if backend.slow else (1100,))):
        x = torch.randn(1, 2, *(4, 5)[: dims - 1], width, device=backend.device)
        for window in ((3, 1, 1), (3, 2, 1), (2, 2, 1, True), (4, 3, 2)):
            if dims == 3 and width < window[0]:  # torch wants a volume to be as large as the window without padding
                continue
            leaf, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = backend(leaf, *window), torchs(backend)(theirs, *window)
            torch.testing.assert_close(y, expected)
            dy = torch.randn_like(expected)
            torch.testing.assert_close(*(torch.autograd.grad(*a, dy)[0] for a in ((y, leaf), (expected, theirs))))


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_windows_as_large_as_the_input(backend):
    # one window, rows of 3, 40 and 300 elements: added up one by one, by the vector, by the block; a part of each plane
    dims = DIMS[backend.op]
    for width in (3, 40, *(() if backend.slow else (5000,))):
        for layout in (torch.Tensor.contiguous, last):
            x = layout(torch.randn(2, 5, *(2, 3)[: dims - 1], width)).to(backend.device).requires_grad_()
            whole = x.shape[2:]
            for kernel in (whole, (*whole[:-1], width - 1), (*([1] * (dims - 1)), width)):
                y, expected = backend(x, tuple(kernel)), torchs(backend)(x, tuple(kernel))
                torch.testing.assert_close(y, expected)
                dy = torch.randn_like(expected)
                torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, expected)))


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_unbatched_and_empty(backend):
    dims = DIMS[backend.op]
    x = torch.randn(3, *([8] * dims), device=backend.device, requires_grad=True)
    y = backend(x, 3, 2, 1)
    torch.testing.assert_close(y, torchs(backend)(x, 3, 2, 1))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    empty = torch.zeros(0, 3, *([8] * dims), device=backend.device, requires_grad=True)
    y = backend(empty, 3, 2, 1)
    assert y.shape == (0, 3, *([4] * dims))
    assert torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize("op", OPS)
def test_arguments_as_torch_takes_them(op):
    ours, theirs = getattr(ops, op), getattr(F, op)
    x = torch.randn(1, 1, *([6] * DIMS[op]))
    for stride in (None, [], (), (2,), 2):
        torch.testing.assert_close(ours(x, 2, stride), theirs(x, 2, stride))
    for two in (np.int64(2), np.uint8(2), torch.tensor(2), [2], (2,)):
        torch.testing.assert_close(ours(x, two), theirs(x, 2))
    whole = torch.compile(lambda t: ours(t, t.shape[2:]), backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(whole(x), theirs(x, 6))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_every_thread_count_gives_the_same_bits(threads, layout):
    x = layout(torch.randn(3, 7, 49, 123))
    one = x.clone().requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            y = ops.avg_pool2d(one, 3, 2, 1)
            results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), one)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


# torch's own samples


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


# errors


def errors():
    two = torch.zeros(1, 1, 8, 8)
    yield "avg_pool2d", dict(input=torch.zeros(8, 8), kernel_size=2), ["input", "[8, 8]"]
    yield "avg_pool2d", dict(input=torch.zeros(1, 1, 1, 8, 8), kernel_size=2), ["input", "[1, 1, 1, 8, 8]"]
    yield "avg_pool1d", dict(input=torch.zeros(8), kernel_size=2), ["input", "[8]"]
    yield "avg_pool3d", dict(input=torch.zeros(8, 8, 8), kernel_size=2), ["input", "[8, 8, 8]"]
    yield "avg_pool2d", dict(input=torch.zeros(1, 0, 8, 8), kernel_size=2), ["input", "[1, 0, 8, 8]"]
    yield "avg_pool2d", dict(input=torch.zeros(1, 1, 0, 8), kernel_size=2), ["input", "[1, 1, 0, 8]"]
    yield "avg_pool2d", dict(input=[[1.0]], kernel_size=1), ["input", "list"]
    for name, value in (("kernel_size", 0), ("kernel_size", (2, 2, 2)), ("kernel_size", 9), ("kernel_size", ())):
        yield "avg_pool2d", dict(input=two, kernel_size=value), [name]
    for name, value in (
        *(("kernel_size", 2.5), ("kernel_size", "2"), ("kernel_size", True), ("stride", 0), ("padding", -1)),
        *(("padding", 2), ("ceil_mode", 1), ("count_include_pad", 0), ("divisor_override", 0)),
        *(("divisor_override", 1.5), ("divisor_override", True), ("kernel_size", 2**31), ("stride", 2**62)),
    ):
        yield "avg_pool2d", {"input": two, "kernel_size": 2, name: value}, [name, str(value)]
    yield "avg_pool3d", dict(input=torch.zeros(1, 1, 4, 4, 4), kernel_size=2, divisor_override=0), ["divisor_override"]
    yield "avg_pool3d", dict(input=torch.zeros(1, 1, 4, 4, 2), kernel_size=3, padding=1), ["kernel_size", "2"]
    yield "avg_pool3d", dict(input=torch.zeros(1, 1, 4, 4, 4), kernel_size=(2, 2)), ["kernel_size", "(2, 2)"]
    yield "avg_pool1d", dict(input=torch.zeros(1, 1, 4), kernel_size=(2, 2)), ["kernel_size", "(2, 2)"]
    yield "avg_pool1d", dict(input=torch.zeros(1, 1, 4), kernel_size=5), ["kernel_size", "5"]


@pytest.mark.parametrize(("op", "arguments", "says"), list(errors()))
def test_errors_are_torchs(op, arguments, says):
    check_same_error(getattr(ops, op), getattr(F, op), says=[op, *says], **arguments)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_do_what_torch_does(op, dtype):
    x = torch.ones(1, 1, *([4] * DIMS[op]), dtype=dtype)
    try:
        expected = getattr(F, op)(x, 2)
    except Exception as error:
        with pytest.raises(type(error)):
            getattr(ops, op)(x, 2)
    else:
        assert_same_bits(getattr(ops, op)(x, 2), expected)


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_raw_operators_refuse_or_survive_anything(backend):
    namespace = NAMESPACES[backend.name]
    x = torch.ones(1, 1, 4, 4, device=backend.device)
    calls = [
        lambda: namespace.avg_pool_fwd(x, [2, 2, 2, 2, 2, 2, 0], True, None),
        lambda: namespace.avg_pool_fwd(x[0, 0], [2, 2], True, None),
        lambda: namespace.avg_pool_fwd(x.long(), [2, 2], True, None),
        lambda: namespace.avg_pool_fwd(x, [2, 2, 0, 2, 2, 2, 0, 0], True, None),
        lambda: namespace.avg_pool_fwd(x, [2, 2, 2, 2, 0, 2, 0, 0], True, None),
        lambda: namespace.avg_pool_fwd(x, [2, 2, 2, 2, 2, 2, 2, 0], True, None),
        lambda: namespace.avg_pool_fwd(x, [3, 2, 2, 2, 2, 2, 0, 0], True, None),
        lambda: namespace.avg_pool_fwd(x, [2, 2, 2, 2, 2, 2, 0, 0], True, 0),
        lambda: namespace.avg_pool_bwd(x, [0, 4], True, None, False),
        lambda: namespace.avg_pool_bwd(x, [2, 2, 2, 2, 2, 2, 0, 0], True, None, False),
        lambda: namespace.avg_pool_bwd(x, [2**31, 2], True, None, False),
    ]
    with backend.use():
        for call in calls:
            with pytest.raises(RuntimeError):
                call()
        # fewer windows than fit, and gradients for an input that they do not reach
        assert namespace.avg_pool_fwd(x, [1, 1, 2, 2, 1, 1, 0, 0], True, None).eq(1).all()
        for stride in (1, 2, 3):
            window = [300, 300, 3, 3, stride, stride, 1, 1]
            for channels_last in (False, True):
                dx = namespace.avg_pool_bwd(x, window, True, None, channels_last)
                assert dx.isfinite().all() and dx[..., 20:].eq(0).all()


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available("avg_pool2d") if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    with backend.use():
        for x in (torch.randn(2, 3, 6, 5), last(torch.randn(2, 3, 6, 5)), last(torch.randn(2, 3, 6, 5, 4))):
            dims = x.dim() - 2
            rest = [*[3] * dims, *[2] * dims, *[1] * dims]
            y = getattr(F, f"avg_pool{dims}d")(x, 3, 2, 1)
            check_opcheck(namespace.avg_pool_fwd.default, x.requires_grad_(), [*y.shape[2:], *rest], True, None)
            dy = torch.randn_like(y).requires_grad_()
            check_opcheck(namespace.avg_pool_bwd.default, dy, [*x.shape[2:], *rest], False, 5, dims == 2)


@pytest.mark.compile
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("op", OPS)
def test_compile(op, layout):
    dims = DIMS[op]
    shapes = [[layout(torch.randn(*s[: dims + 2]))] for s in ((2, 3, 8, 8, 4), (1, 3, 11, 6, 5))]
    check_compile(lambda x: getattr(ops, op)(x, 3, 2, 1) * 2, shapes)


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_autocast(backend):
    x = torch.randn(1, 2, *([6] * DIMS[backend.op]), device=backend.device)
    for given in (x, x.bfloat16()):
        check_autocast(backend, torchs(backend), given, 2, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_deterministic(backend):
    # stride 1: all windows overlap, the case that atomics would reorder
    x = torch.randn(2, 5, *(8, 9, 6)[: DIMS[backend.op]], device=backend.device)
    check_deterministic(lambda t: backend(t, 3, 1, 1), x)
