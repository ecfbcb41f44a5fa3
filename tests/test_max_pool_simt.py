"""The CUDA sources of max pooling, run by the SIMT host runner: every kernel variant against torch on CPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from _simt import UNDER_ASAN, check_sanitized, load_simt_library

from pydl import ops  # noqa: F401  (defines the schemas of pydl_simt)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
if UNDER_ASAN:  # about ten times slower: bf16 has fp16's addresses
    DTYPES = [torch.float32, torch.float16]
# (kernel, stride, padding, dilation, ceil_mode): the four unrolled windows in both rounding modes, then the general
# kernels: rectangular, dilated, gaps between windows, one tap, windows over the whole plane.
WINDOWS = [
    (3, 2, 1, 1, False),
    (3, 2, 1, 1, True),
    (3, 2, 0, 1, False),
    (3, 2, 0, 1, True),
    (2, 2, 0, 1, False),
    (2, 2, 0, 1, True),
    (3, 1, 1, 1, False),
    ((2, 5), (1, 3), (1, 2), 1, False),
    ((3, 2), (2, 1), (1, 0), (2, 3), True),
    (3, 2, 1, 2, False),
    (2, 3, 0, 1, False),
    (1, 1, 0, 1, False),
    (7, 7, 3, 1, True),
]
# Widths 16 and 32 are multiples of every 16-byte chunk, 10 of none, 13 is odd; heights leave rows of a group over.
SHAPES = [(2, 3, 9, 16), (1, 2, 13, 32), (1, 3, 8, 10), (2, 1, 7, 13)]
# For channels_last: 16 channels are whole vectors in every dtype, 5 in none.
CHANNELS = [(2, 16, 9, 8), (1, 8, 7, 13), (1, 5, 9, 8)]


@pytest.fixture(scope="module", autouse=True)
def simt():
    load_simt_library()
    return torch.ops.pydl_simt


def pair(value):
    return [value, value] if isinstance(value, int) else list(value)


def window_args(window):
    kernel, stride, padding, dilation, ceil_mode = window
    return [*pair(kernel), *pair(stride), *pair(padding), *pair(dilation)], ceil_mode


def inputs(shape, dtype, kind, layout):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    if kind == "special":
        x = x.mul(2).round()  # ties
        chance = torch.rand(shape, generator=generator)
        x[chance < 0.1] = float("nan")
        x[chance > 0.5] = float("-inf")
    return x.to(dtype).to(memory_format=layout)


def expected(x, window):
    """torch's y and flat indices, computed in fp64 on contiguous planes: exact, as a maximum is one of its inputs."""
    kernel, stride, padding, dilation, ceil_mode = window
    y, indices = F.max_pool2d(x.double().contiguous(), kernel, stride, padding, dilation, ceil_mode, True)
    return y.to(x.dtype), indices


def taps_of(flat, x, window):
    args, _ = window_args(window)
    kernel, stride, padding, dilation = (args[i : i + 2] for i in (0, 2, 4, 6))
    rows = torch.arange(flat.shape[2])[:, None] * stride[0] - padding[0]
    cols = torch.arange(flat.shape[3]) * stride[1] - padding[1]
    kh = (flat // x.shape[3] - rows) // dilation[0]
    kw = (flat % x.shape[3] - cols) // dilation[1]
    return (kh * kernel[1] + kw).to(torch.uint8)


def assert_same(actual, wanted):
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
    assert torch.equal(actual.nan_to_num(nan=12345.0), wanted.nan_to_num(nan=12345.0))


def cases():
    every = 2 if UNDER_ASAN else 1
    layouts = [(shape, torch.contiguous_format) for shape in SHAPES[::every]]
    layouts += [(shape, torch.channels_last) for shape in CHANNELS[::every]]
    for window, (shape, layout) in itertools.product(WINDOWS, layouts):
        yield pytest.param(window, shape, layout, id=f"{window}-{shape}-{str(layout).split('.')[1]}".replace(" ", ""))


@pytest.mark.parametrize("window, shape, layout", list(cases()))
def test_values_against_torch(simt, window, shape, layout):
    args, ceil_mode = window_args(window)
    for dtype, kind in itertools.product(DTYPES, ("normal", "special")):
        x = inputs(shape, dtype, kind, layout)
        y, flat = expected(x, window)
        assert_same(simt.max_pool_values(x, args, ceil_mode), y)
        for wants_flat in (False, True):
            out, indices = simt.max_pool_with_indices(x, args, ceil_mode, wants_flat)
            assert_same(out, y)
            assert_same(indices, flat if wants_flat else taps_of(flat, x, window))
            assert out.is_contiguous(memory_format=layout) and indices.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("window, shape, layout", list(cases()))
def test_values_of_gradients_against_torch(simt, window, shape, layout):
    args, _ = window_args(window)
    for dtype, wants_flat in itertools.product(DTYPES, (False, True)):
        x = inputs(shape, dtype, "normal", layout)
        _, flat = expected(x, window)
        # Small integers: sums of a few are exact in every dtype, so the order of torch's additions does not matter.
        dy = torch.randint(-8, 9, flat.shape).to(dtype).to(memory_format=layout)
        indices = flat if wants_flat else taps_of(flat, x, window)
        indices = indices.to(memory_format=layout)
        dx = simt.max_pool_bwd(dy, indices, shape[2:], args)
        wanted = torch.zeros(shape[0], shape[1], shape[2] * shape[3]).double()
        wanted.scatter_add_(2, flat.flatten(2), dy.double().flatten(2))
        assert_same(dx, wanted.view(shape).to(dtype))
        assert dx.is_contiguous(memory_format=layout)
        picked = simt.max_pool_gather(x, indices, args)
        assert_same(picked, x.flatten(2).gather(2, flat.flatten(2)).view(flat.shape))
        assert picked.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_accumulate_in_fp32(simt, dtype, flat, layout):
    # One input wins all nine windows around it: 2048 + 8 * 1 stays 2048 when added in fp16 one by one, is 2056 in fp32.
    x = torch.zeros(1, 8, 8, 16, dtype=dtype).to(memory_format=layout)
    x[:, :, 4, 8] = 1
    args = [3, 3, 1, 1, 1, 1, 1, 1]
    _, taps = simt.max_pool_with_indices(x, args, False, flat)
    dy = torch.zeros_like(x)
    dy[:, :, 3:6, 7:10] = 1
    dy[:, :, 3, 7] = 2048
    dx = simt.max_pool_bwd(dy, taps, (8, 16), args)
    assert (dx[:, :, 4, 8] == torch.tensor(2056.0).to(dtype)).all()


def test_values_of_views_and_empty_batches(simt):
    args = [3, 3, 2, 2, 1, 1, 1, 1]
    base = torch.randn(2, 3, 9, 40)
    for x in (base[..., 1:33], base[..., ::2], base.transpose(2, 3), base[:, :, 2:, 3:], base.expand(2, 3, 9, 40)):
        assert_same(simt.max_pool_values(x, args, False), F.max_pool2d(x, 3, 2, 1))
    misaligned = torch.randn(1 + 2 * 3 * 8 * 16)[1:].view(2, 3, 8, 16)  # contiguous, 4 bytes past an aligned address
    assert_same(simt.max_pool_values(misaligned, args, False), F.max_pool2d(misaligned, 3, 2, 1))
    y, taps = simt.max_pool_with_indices(torch.zeros(0, 3, 8, 8), args, False, False)
    assert y.shape == taps.shape == (0, 3, 4, 4)
    assert simt.max_pool_bwd(y, taps, (8, 8), args).shape == (0, 3, 8, 8)
    assert simt.max_pool_gather(torch.zeros(0, 3, 8, 8), taps, args).shape == (0, 3, 4, 4)


def test_values_of_windows_that_no_byte_can_number(simt):
    x = torch.randn(1, 2, 40, 40)
    args = [16, 16, 5, 5, 8, 8, 1, 1]
    y, indices = simt.max_pool_with_indices(x, args, False, False)
    wanted, flat = F.max_pool2d(x, 16, 5, 8, return_indices=True)
    assert_same(y, wanted)
    assert_same(indices, flat)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_values_with_wild_indices_stay_in_memory(simt, dtype, layout):
    # Under ASan this is the proof: taps outside the window and positions outside the plane.
    args = [3, 3, 2, 2, 1, 1, 1, 1]
    values = [0, 9, 200, 255] if dtype == torch.uint8 else [-1, 10**9, -(2**62), 2**62, 128]
    for value in values:
        indices = torch.full((2, 8, 4, 8), value, dtype=dtype).to(memory_format=layout)
        dx = simt.max_pool_bwd(torch.ones(2, 8, 4, 8), indices, (8, 16), args)
        y = simt.max_pool_gather(torch.ones(2, 8, 8, 16), indices, args)
        if value != 0:
            assert not dx.any() and not y.any()
        else:
            assert dx.any() and y.any()


def test_errors_of_raw_calls(simt):
    args = [3, 3, 2, 2, 1, 1, 1, 1]
    x = torch.zeros(1, 1, 8, 8)
    taps = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="window must have 1 or 4"):
        simt.max_pool_values(x[0], args, False)
    with pytest.raises(RuntimeError, match="float32, float64"):
        simt.max_pool_values(x.long(), args, False)
    with pytest.raises(RuntimeError, match="too small"):
        simt.max_pool_values(x, [30, 30, *args[2:]], False)
    with pytest.raises(RuntimeError, match="shape of indices"):
        simt.max_pool_bwd(torch.zeros(1, 1, 5, 4), taps, (8, 8), args)
    with pytest.raises(RuntimeError, match="uint8 or int64"):
        simt.max_pool_gather(x, taps.int(), args)
    with pytest.raises(RuntimeError, match="below 2\\^31"):
        simt.max_pool_bwd(torch.zeros(1, 1, 4, 4), taps, (2**31, 8), args)
    with pytest.raises(RuntimeError, match="2\\^31 taps"):
        simt.max_pool_gather(x, taps, [50000, 50000, *args[2:]])


@pytest.mark.no_poison
@pytest.mark.skipif(UNDER_ASAN, reason="8 GiB of address space would need 1 GiB of shadow memory")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_beyond_2_to_31_elements(simt, layout):
    # 2^31 + 2^17 elements of which few are touched: one tap every 16,384 pixels. The pages in between stay unmapped.
    shape = (1, 2, 32770, 32768)
    x = torch.empty(shape, dtype=torch.float16, memory_format=layout)
    picked = x[:, :, ::16384, ::16384]
    picked.copy_(torch.arange(1, picked.numel() + 1).view(picked.shape))
    args = [1, 1, 16384, 16384, 0, 0, 1, 1]
    y, flat = simt.max_pool_with_indices(x, args, False, True)
    assert torch.equal(y, picked)
    assert flat[0, 1, 2, 1] == 32768 * 32768 + 16384
    assert torch.equal(simt.max_pool_gather(x, flat, args), picked)


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.skipif(UNDER_ASAN, reason="4 GiB of address space would need 512 MiB of shadow memory")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_of_vector_kernels_beyond_2_to_31_elements(simt, layout):
    # 2^31 + 2^17 zeros that are only read, so that they share one page; the last window holds the largest value.
    x = torch.zeros(1, 8, 16385, 16384, dtype=torch.float16).as_strided_(
        (1, 8, 16385, 16384), torch.empty(1, 8, 16385, 16384, device="meta").to(memory_format=layout).stride()
    )
    x[0, 7, 16383, 16383] = 3
    x[0, 6, 16382, 16380] = 2
    y = simt.max_pool_values(x, [2, 2, 2, 2, 0, 0, 1, 1], False)
    assert y[0, 7, 8191, 8191] == 3 and y[0, 6, 8191, 8190] == 2
    assert float(y.sum(dtype=torch.float32)) == 5


@pytest.mark.slow
@pytest.mark.skipif(UNDER_ASAN, reason="starts the sanitized process itself")
def test_all_of_the_above_under_the_sanitizers():
    check_sanitized(__file__)
