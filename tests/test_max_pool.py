"""max_pool2d on every backend: values, positions, gradients, layouts, which operator runs, errors, compilation."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _backends import Backend, available, backends_and_dtypes, backends_for
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
    ops_called,
)

import pydl
from pydl import ops
from pydl.reference import spec as spec_of
from pydl.reference.max_pool import max_pool, max_pool_grad

OP = "max_pool2d"
CASES = {case.name: case for case in spec_of(OP).cases()}
TORCH, NAN, INF = ("torch",), float("nan"), float("inf")
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
CHANNELS_LAST = torch.channels_last


def distinct(*shape, dtype=torch.float32, device="cpu"):
    """No two values of a plane are equal, so that the gradient is the same whatever rule breaks ties."""
    planes = [torch.randperm(shape[-1] * shape[-2]) for _ in range(int(np.prod(shape[:-2])))]
    return (torch.stack(planes).reshape(shape) - 7).to(device, dtype)


# values, positions and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_gradients(backend, dtype):
    check_cases(backend, dtype, "gradients")


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


def grid():
    """k, s, p, d, ceil_mode for a plane of 9 x 7: every combination that torch accepts."""
    for k, s, p, d, ceil_mode in itertools.product((1, 2, 3, (2, 3)), (1, 2, 3, (3, 1)), (0, 1), (1, 2), (False, True)):
        smallest = k if isinstance(k, int) else min(k)
        if 2 * p <= smallest:
            yield k, s, p, d, ceil_mode


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_grid_of_windows(backend, memory_format):
    # 5 channels: a partial vector; 9 x 7: odd and not square; rounded values: ties everywhere
    x = torch.randn(2, 5, 9, 7).mul(2).round().to(backend.device).contiguous(memory_format=memory_format)
    array = x.double().cpu().numpy()
    for window in grid():
        y, indices = backend(x, *window, return_indices=True)
        oracle, places = max_pool(2, array, *window)
        assert np.array_equal(y.double().cpu().numpy(), oracle), window
        assert indices.dtype == torch.int64 and np.array_equal(indices.cpu().numpy(), places), window
        # values alone come from a maximum that may order zeros by sign
        assert torch.equal(backend(x, *window), y), window
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = backend(leaf, *window)
        assert torch.equal(out.detach(), y), window
        dy = torch.arange(out.numel(), device=x.device).reshape(out.shape).float() % 31
        (dx,) = torch.autograd.grad(out, leaf, dy)
        # sums of up to nine integers below 31: exact in float32
        assert np.array_equal(dx.cpu().numpy(), max_pool_grad(dy.cpu().numpy(), places, 9, 7)), window


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize(
    "k", [15, 16, (1, 255), (1, 256)]
)  # 225, 256, 255, 256 taps: both sides of what a byte numbers
def test_windows_beyond_one_byte(backend, k):
    x = distinct(1, 2, 16, 256).to(backend.device).requires_grad_()
    y = backend(x, k, 1 if isinstance(k, int) else (1, 64))
    expected = F.max_pool2d(x, k, 1 if isinstance(k, int) else (1, 64))
    assert_same_bits(y.detach(), expected.detach())
    dy = torch.ones_like(y)
    assert_same_bits(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize(
    ("plane", "place"),
    [
        ([[1.0, 1.0], [1.0, 1.0]], 0),  # the first of equal maxima
        ([[0.0, 3.0], [3.0, 1.0]], 1),
        ([[-0.0, 0.0], [0.0, -0.0]], 0),  # zeros of both signs are equal
        ([[NAN, 9.0], [INF, 1.0]], 0),  # NaN wins over everything
        ([[9.0, NAN], [1.0, INF]], 1),
        ([[NAN, 1.0], [NAN, 2.0]], 2),  # torch: a later NaN replaces an earlier one
        ([[-INF, -INF], [-INF, -INF]], 0),
        ([[-INF, -INF], [-INF, -1e30]], 3),
        ([[INF, 1.0], [INF, INF]], 0),
    ],
    ids=["ties", "tie later", "zeros", "NaN first", "NaN second", "two NaN", "all -inf", "-inf", "inf"],
)
def test_which_tap_wins(backend, memory_format, plane, place):
    # 17 channels: one more than an AVX-512 vector, so that the vector and the tail both answer
    x = torch.tensor(plane).expand(2, 17, 2, 2).to(backend.device).contiguous(memory_format=memory_format)
    y, indices = backend(x, 2, return_indices=True)
    assert indices.eq(place).all()
    torch.testing.assert_close(y.flatten(), x.flatten(2)[..., place].flatten(), equal_nan=True, rtol=0, atol=0)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(backend(leaf, 2).sum(), leaf)
    expected = torch.zeros(4, device=x.device)
    expected[place] = 1
    assert torch.equal(dx.flatten(2), expected.expand(2, 17, 4))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_a_window_with_no_tap_inside(backend):
    # H = 1, k = 2, p = 1, d = 2: rows -1 and 1 are both outside; torch answers -inf and an index outside the plane
    x = torch.ones(1, 3, 1, 4, device=backend.device, requires_grad=True)
    y = backend(x, 2, 1, 1, 2)
    assert y.eq(-INF).all()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not dx.any()


@pytest.mark.parametrize("backend", backends_for(OP, torch.float16, without=TORCH))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_low_precision_are_summed_in_float32(backend, low):
    # 49 windows share one maximum; adding 1/16 to a sum near 200 one by one would stop in bfloat16
    x = torch.zeros(1, 1, 13, 13, device=backend.device, dtype=low)
    x[..., 6, 6] = 1
    x.requires_grad_()
    y = backend(x, 7, 1)
    dy = torch.full_like(y, 1 / 16)
    dy[..., 0, 0] = 200
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[0, 0, 6, 6] == torch.tensor(203.0).to(low)
    assert dx.count_nonzero() == 1


# gradcheck


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
@pytest.mark.parametrize("window", [(2,), (3, 2, 1), (2, 1, 1, 2), (3, 2, 1, 1, True)], ids=str)
def test_gradcheck(backend, window):
    x = distinct(1, 2, 5, 4, dtype=torch.float64, device=backend.device).requires_grad_()
    check_gradcheck(lambda t: backend(t, *window), [x])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
def test_gradient_penalty_through_a_pool(backend):
    x = distinct(2, 2, 6, 6, dtype=torch.float64, device=backend.device).requires_grad_()
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, device=backend.device, requires_grad=True)

    def penalty(pool):
        y = pool(F.conv2d(x, weight).tanh(), 2)
        (slope,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), (x, weight))

    for a, b in zip(penalty(backend), penalty(F.max_pool2d), strict=True):
        torch.testing.assert_close(a, b)


# layouts and edge sizes


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, CASES["k3 s2 p1"])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize("channels", [1, 2, 3, 16, 31, 32, 33, 65])  # 1 has both layouts at once; vector widths +- 1
def test_layout_is_kept(backend, channels):
    x = torch.randn(2, channels, 7, 6, device=backend.device)
    plain = backend(x, 3, 2, 1)
    assert plain.is_contiguous()
    last = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    y, indices = backend(last, 3, 2, 1, return_indices=True)
    assert y.is_contiguous(memory_format=CHANNELS_LAST) and indices.is_contiguous(memory_format=CHANNELS_LAST)
    assert_same_bits(y.detach(), plain)
    for out in (y, backend(last, 3, 2, 1)):
        for dy in (
            torch.randn(y.shape, device=x.device),
            torch.ones_like(y),
            torch.ones((), device=x.device).expand(y.shape),
        ):
            (dx,) = torch.autograd.grad(out, last, dy, retain_graph=True)
            assert dx.is_contiguous(memory_format=CHANNELS_LAST)
            leaf = x.clone().requires_grad_()
            (expected,) = torch.autograd.grad(F.max_pool2d(leaf, 3, 2, 1), leaf, dy)
            torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_edge_sizes(backend):
    # every size around 1, 8, 16 and 32 in one axis: vector bodies, tails and neither
    for width in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65):
        for shape in ((1, 1, 3, width), (1, 2, width, 3)):
            x = torch.randn(shape, device=backend.device)
            y, indices = backend(x, 3, 1, 1, return_indices=True)
            expected = F.max_pool2d(x, 3, 1, 1, return_indices=True)
            assert_same_bits(y, expected[0])
            assert_same_bits(indices, expected[1])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_unbatched_and_empty(backend):
    x = torch.randn(3, 8, 8, device=backend.device, requires_grad=True)
    y, indices = backend(x, 2, return_indices=True)
    assert y.shape == indices.shape == (3, 4, 4)
    assert_same_bits(y.detach(), F.max_pool2d(x, 2).detach())
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    empty = torch.zeros(0, 3, 8, 8, device=backend.device, requires_grad=True)
    y = backend(empty, 3, 2, 1)
    assert y.shape == (0, 3, 4, 4)
    assert torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


def test_arguments_as_torch_takes_them():
    x = torch.randn(1, 1, 6, 6)
    for stride in (None, [], (), (2,), 2):
        assert_same_bits(ops.max_pool2d(x, 2, stride), F.max_pool2d(x, 2))
    for two in (np.int64(2), np.uint8(2), torch.tensor(2), (np.int32(2), 2), [2]):
        assert_same_bits(ops.max_pool2d(x, two), F.max_pool2d(x, 2))
    whole = torch.compile(lambda t: ops.max_pool2d(t, t.shape[-2:]), backend="eager", fullgraph=True, dynamic=True)
    assert_same_bits(whole(x), F.max_pool2d(x, 6))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    x = torch.randn(3, 7, 19, 23).contiguous(memory_format=CHANNELS_LAST if threads == 2 else torch.contiguous_format)
    try:
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        y = ops.max_pool2d(leaf, 3, 2, 1)
        assert_same_bits(y.detach(), F.max_pool2d(x, 3, 2, 1))
        oracle = max_pool_grad(np.ones(y.shape), max_pool(2, x.numpy(), 3, 2, 1)[1], 19, 23)
        assert np.array_equal(torch.autograd.grad(y.sum(), leaf)[0].numpy(), oracle)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.skipif(os.environ.get("PYDL_TEST_LARGE") != "1", reason="two minutes and 12 GB: set PYDL_TEST_LARGE=1")
@pytest.mark.parametrize("backend", backends_for(OP, torch.float16, without=(*TORCH, "simt")))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_more_elements_than_an_int_counts(backend, memory_format):
    # 2^31 + 2^16 elements; all zero but the last of the last channel, whose address a 32-bit sum would wrap
    x = torch.empty(1, 2, 2**15, 2**15 + 1, dtype=torch.float16, device=backend.device, memory_format=memory_format)
    x.zero_()[0, 1, -1, -2] = 3
    y = backend(x.requires_grad_(), 2)
    assert y[0, 1, -1, -1] == 3 and y.count_nonzero() == 1
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert dx[0, 1, -1, -2] == 3 and dx.count_nonzero() == 1


# which operator runs


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_no_indices_are_made_when_nobody_needs_them(backend):
    x = torch.randn(1, 2, 6, 6, device=backend.device)
    with ops_called() as called:
        backend(x, 3, 2, 1)
        with torch.no_grad():
            backend(x.clone().requires_grad_(), 3, 2, 1)
    assert set(called.pydl()) == {"max_pool_values"}
    with ops_called() as called:
        leaf = x.clone().requires_grad_()
        backend(leaf, 3, 2, 1).sum().backward()
    assert "max_pool_values" not in called.pydl()
    assert {"max_pool_with_indices", "max_pool_bwd"} <= set(called.pydl())


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_offsets_are_bytes_where_the_window_allows(backend):
    op = NAMESPACES[backend.name].max_pool_with_indices
    x = distinct(1, 3, 16, 16, device=backend.device).contiguous(memory_format=CHANNELS_LAST)
    with backend.use():
        y, offsets = op(x, [3, 3, 2, 2, 1, 1, 1, 1], False, False)
        _, flat = op(x, [3, 3, 2, 2, 1, 1, 1, 1], False, True)
        _, wide = op(x, [16, 16, 1, 1, 0, 0, 1, 1], False, False)
    assert (offsets.dtype, flat.dtype, wide.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert offsets.is_contiguous(memory_format=CHANNELS_LAST)
    row, column = (torch.arange(n, device=x.device) * 2 - 1 for n in y.shape[2:])
    places = (row[:, None] + offsets // 3) * 16 + column + offsets % 3
    assert torch.equal(places, flat)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_indices_from_elsewhere_never_leave_the_planes(backend, dtype):
    # the raw operators can be called with anything: what points outside is dropped, and memory beside stays as it is
    low, high = (0, 256) if dtype == torch.uint8 else (-(2**40), 2**40)
    window = [3, 3, 2, 2, 1, 1, 1, 1]
    namespace = NAMESPACES[backend.name]
    for memory_format in (torch.contiguous_format, CHANNELS_LAST):
        indices = torch.randint(low, high, (2, 3, 4, 4), dtype=dtype).to(backend.device)
        indices = indices.contiguous(memory_format=memory_format)
        dy = torch.ones(2, 3, 4, 4, device=backend.device).contiguous(memory_format=memory_format)
        with backend.use():
            dx = namespace.max_pool_bwd(dy, indices, (7, 7), window)
            x = torch.ones(2, 3, 7, 7, device=backend.device).contiguous(memory_format=memory_format)
            y = namespace.max_pool_gather(x, indices, window)
        assert dx.shape == (2, 3, 7, 7) and dx.isfinite().all() and 0 <= dx.sum() <= dy.numel()
        assert y.shape == dy.shape and y.isfinite().all() and (y.eq(0) | y.eq(1)).all()


# errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(input=torch.zeros(8, 8), kernel_size=2), ["max_pool2d", "input", "[8, 8]"]),
        (dict(input=torch.zeros(1, 1, 1, 8, 8), kernel_size=2), ["max_pool2d", "input", "[1, 1, 1, 8, 8]"]),
        (dict(input=torch.zeros(1, 0, 8, 8), kernel_size=2), ["max_pool2d", "input", "[1, 0, 8, 8]"]),
        (dict(input=torch.zeros(1, 1, 0, 8), kernel_size=2), ["max_pool2d", "input", "[1, 1, 0, 8]"]),
        (dict(kernel_size=0), ["max_pool2d", "kernel_size", "0"]),
        (dict(kernel_size=2, stride=0), ["max_pool2d", "stride", "0"]),
        (dict(kernel_size=2, dilation=0), ["max_pool2d", "dilation", "0"]),
        (dict(kernel_size=2, padding=-1), ["max_pool2d", "padding", "-1"]),
        (dict(kernel_size=2, padding=2), ["max_pool2d", "padding", "half", "2"]),
        (dict(kernel_size=3, padding=2, dilation=2), ["max_pool2d", "padding", "half", "2"]),  # of k, not of the span
        (dict(kernel_size=9), ["max_pool2d", "kernel_size", "9", "8"]),
        (dict(kernel_size=5, dilation=3), ["max_pool2d", "kernel_size", "8"]),
        (dict(kernel_size=(2, 2, 2)), ["max_pool2d", "kernel_size", "(2, 2, 2)"]),
        (dict(kernel_size=2.5), ["max_pool2d", "kernel_size", "2.5"]),
        (dict(kernel_size="2"), ["max_pool2d", "kernel_size", "'2'"]),
        (dict(kernel_size=True), ["max_pool2d", "kernel_size", "True"]),
        (dict(kernel_size=2, ceil_mode=1), ["max_pool2d", "ceil_mode", "1"]),
        (dict(input=[[1.0]], kernel_size=1), ["max_pool2d", "input", "list"]),
    ],
    ids=lambda v: ",".join(v),
)
def test_errors_are_torchs(arguments, says):
    arguments = {"input": torch.zeros(1, 1, 8, 8), **arguments}
    check_same_error(ops.max_pool2d, F.max_pool2d, says=says, **arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_do_what_torch_does(dtype):
    x = torch.zeros(1, 1, 4, 4, dtype=dtype)
    try:
        expected = F.max_pool2d(x, 2)
    except Exception as error:
        with pytest.raises(type(error)):
            ops.max_pool2d(x, 2)
    else:
        assert_same_bits(ops.max_pool2d(x, 2), expected)


def test_huge_arguments_are_refused_not_crashed():
    for name in ("kernel_size", "stride", "padding", "dilation"):
        for value in (2**31, 2**62, 2**63 - 1):
            check_same_error(ops.max_pool2d, F.max_pool2d, torch.zeros(1, 1, 4, 4), **{"kernel_size": 2, name: value})
    assert ops.max_pool2d(torch.ones(1, 1, 4, 4), 2, 2**31 - 1).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    namespace = NAMESPACES[backend.name]
    x, window = torch.zeros(1, 1, 4, 4, device=backend.device), [2, 2, 2, 2, 0, 0, 1, 1]
    indices = torch.zeros(1, 1, 2, 2, dtype=torch.uint8, device=backend.device)
    dy = torch.zeros(1, 1, 2, 2, device=backend.device)
    calls = [
        lambda: namespace.max_pool_values(x, window[:7], False),
        lambda: namespace.max_pool_values(x[0], window, False),
        lambda: namespace.max_pool_values(x, [0, 0, 2, 2, 0, 0, 1, 1], False),
        lambda: namespace.max_pool_values(x, [2, 2, 0, 1, 0, 0, 1, 1], False),
        lambda: namespace.max_pool_values(x, [2, 2, 2, 2, -1, -1, 1, 1], False),
        lambda: namespace.max_pool_with_indices(x, [2, 2, 2, 2, 0, 0, 0, 0], False, False),
        lambda: namespace.max_pool_bwd(dy[..., :1], indices, (4, 4), window),
        lambda: namespace.max_pool_bwd(dy, indices.float(), 4, 4, window),
        lambda: namespace.max_pool_bwd(dy, indices, (-4, 4), window),
        lambda: namespace.max_pool_gather(x[:, :, 0], indices, window),
    ]
    with backend.use():
        for call in calls:
            with pytest.raises(RuntimeError):
                call()


def test_a_forced_backend_that_cannot_run_says_why():
    with pydl.backend("triton"), pytest.raises(RuntimeError, match=r"max_pool2d.*triton"):
        ops.max_pool2d(torch.zeros(1, 1, 4, 4), 2)


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available(OP) if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend: Backend):
    namespace = NAMESPACES[backend.name]
    window = [3, 2, 2, 2, 1, 1, 1, 1]
    with backend.use():
        for memory_format in (torch.contiguous_format, CHANNELS_LAST):
            x = distinct(2, 3, 6, 5).contiguous(memory_format=memory_format)
            leaf = x.clone().requires_grad_()
            check_opcheck(namespace.max_pool_values.default, leaf, window, False)
            check_opcheck(namespace.max_pool_with_indices.default, leaf, window, True, False)
            y, indices = namespace.max_pool_with_indices(x, window, True, False)
            check_opcheck(namespace.max_pool_bwd.default, torch.randn_like(y).requires_grad_(), indices, (6, 5), window)
            check_opcheck(namespace.max_pool_gather.default, leaf, indices, window)


@pytest.mark.compile
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_compile(memory_format):
    def fn(x):
        return ops.max_pool2d(x, 3, 2, 1) * 2

    check_compile(fn, [[distinct(*s).contiguous(memory_format=memory_format)] for s in ((2, 3, 8, 8), (1, 3, 11, 6))])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_autocast(backend):
    x = torch.randn(1, 2, 6, 6, device=backend.device)
    for given in (x, x.bfloat16()):
        check_autocast(backend, F.max_pool2d, given, 2, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_deterministic(backend):
    # stride 1: nine windows overlap at each input, the case that atomics would reorder
    x = torch.randn(2, 5, 12, 13, device=backend.device)
    check_deterministic(lambda t: backend(t, 3, 1, 1), x)
