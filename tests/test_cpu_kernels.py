"""What is specific to the native CPU kernels: every instruction-set level, threads, conversions, memory, raw calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pydl import _library, ops  # noqa: F401  (defines the schemas)

ROOT = Path(__file__).resolve().parents[1]
RAW = torch.ops.pydl
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# (kernel, stride, padding, dilation, ceil_mode): both unrolled kernels, strides 1, 2 and 3 (three ways of splitting a
# row), rectangular, dilated, windows past the input, windows without a tap inside it, flat indices (17 x 16 taps).
WINDOWS = [
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 2), (2, 2), (0, 0), (1, 1), True),
    ((3, 3), (1, 1), (1, 1), (1, 1), False),
    ((3, 3), (3, 3), (1, 1), (1, 1), True),
    ((1, 1), (1, 1), (0, 0), (1, 1), False),
    ((5, 2), (3, 1), (2, 1), (1, 2), True),
    ((3, 2), (1, 2), (1, 1), (2, 3), False),
    ((17, 16), (4, 5), (8, 8), (1, 1), True),
]
# Widths around the vectors of 4, 8 and 16 lanes; channels of one partial, one whole, and several vectors.
SHAPES = [(2, 3, 17, 16), (1, 20, 18, 33), (2, 70, 18, 17), (1, 1, 40, 1100)]
ROWS = [(5, 1), (3, 2), (7, 16), (4, 67), (33, 1000), (6, 2049), (2, 5000), (300, 130)]


@pytest.fixture(autouse=True, scope="module")
def library():
    if not _library.cpu_library().loaded:
        pytest.skip(_library.cpu_library().reason)


def mixed(shape, dtype):
    """Ties, NaN and -inf among ordinary values."""
    kind = torch.rand(shape)
    x = torch.where(kind < 0.5, torch.randint(-2, 3, shape).float(), torch.randn(shape))
    x = torch.where(kind > 0.9, float("-inf"), x)
    return torch.where(kind > 0.97, float("nan"), x).to(dtype)


def same(a, b):
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def check_pool(shape, window, dtype, memory_format):
    *lists, ceil_mode = window
    flat_window = [v for pair in lists for v in pair]
    x = mixed(shape, dtype).contiguous(memory_format=memory_format)
    wanted, positions = torch.ops.aten.max_pool2d_with_indices(x, *lists, ceil_mode)
    y, flat = RAW.max_pool_with_indices(x, flat_window, ceil_mode, True)
    _, taps = RAW.max_pool_with_indices(x, flat_window, ceil_mode, False)
    assert same(RAW.max_pool_values(x, flat_window, ceil_mode), wanted) and same(y, wanted)
    assert torch.equal(flat, positions)
    assert y.stride() == wanted.stride() or y.is_contiguous() == wanted.is_contiguous()
    dy = torch.randn(wanted.shape).to(dtype)
    dx = RAW.max_pool_bwd(dy, flat, shape[2:], flat_window)
    assert torch.equal(dx, RAW.max_pool_bwd(dy, taps, shape[2:], flat_window))
    exact = torch.zeros(*shape[:2], shape[2] * shape[3], dtype=torch.float64)
    exact = exact.scatter_add_(2, positions.flatten(2), dy.double().flatten(2)).view(shape)
    torch.testing.assert_close(dx, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
    picked = x.flatten(2).gather(2, positions.flatten(2)).view(wanted.shape)
    assert same(RAW.max_pool_gather(x, taps, flat_window), picked)
    assert same(RAW.max_pool_gather(x, flat, flat_window), picked)


def check_layer_norm(rows, cols, dtype):
    x = (torch.randn(rows, cols) + 8).to(dtype)
    weight, bias, dy = torch.randn(cols).to(dtype), torch.randn(cols).to(dtype), torch.randn(rows, cols).to(dtype)
    y, mean, rstd = RAW.layer_norm_fwd(x, [cols], weight, bias, 1e-5)
    grads = RAW.layer_norm_bwd(dy, x, [cols], mean, rstd, weight, [True] * 3)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    wanted = F.layer_norm(exact[0], [cols], *exact[1:], eps=1e-5)
    wanted_grads = torch.autograd.grad(wanted, exact, dy.double())
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for name, got, want in zip(("y", "dx", "dweight", "dbias"), (y, *grads), (wanted, *wanted_grads)):
        # rows of two elements cancel: xhat is +-1 but for eps, and rstd multiplies what is left
        scale = max(1.0, rstd.max().item()) * (8 if cols < 4 else 1) * (rows**0.5 if name[:2] in ("dw", "db") else 1)
        bound = (2 * torch.finfo(dtype).eps + 16 * scale * torch.finfo(compute).eps) * max(1, want.abs().max().item())
        assert (got.double() - want).abs().max() <= bound, name


def check_rounding(dtype):
    """An fp16 or bf16 result is the fp32 result rounded to nearest even, subnormal and overflowing values included."""
    x = torch.randn(64, 1000).to(dtype)
    for factor in (1.0, 3e-6, 4e4):
        weight = torch.linspace(-2, 2, 1000) * factor
        args = ([1000], weight, None, 1e-5)
        assert torch.equal(RAW.layer_norm_fwd(x, *args)[0], RAW.layer_norm_fwd(x.float(), *args)[0].to(dtype))
    everything = torch.arange(65536).to(torch.uint16).view(dtype).reshape(1, 1, 256, 256)
    assert same(RAW.max_pool_values(everything, [1, 1, 1, 1, 0, 0, 1, 1], False), everything)


def check_everything():
    """All kernels against torch at this process's level, in memory that is NaN before it is written."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for window in WINDOWS:
            for shape in SHAPES:
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    check_pool(shape, window, dtype, memory_format)
        for rows, cols in ROWS:
            check_layer_norm(rows, cols, dtype)
    for dtype in (torch.float16, torch.bfloat16):
        check_rounding(dtype)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_level(level):
    """PYDL_CPU_CAPABILITY is read when the library is loaded: a process for each."""
    env = dict(os.environ, PYDL_CPU_CAPABILITY=level, PYDL_POISON_MEMORY="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    code = "import test_cpu_kernels; test_cpu_kernels.check_everything()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def everything_once():
    x, dy = torch.randn(700, 300), torch.randn(700, 300)  # 44 chunks of rows
    weight = torch.randn(300)
    y, mean, rstd = RAW.layer_norm_fwd(x, [300], weight, None, 1e-5)
    results = [y, mean, rstd, *RAW.layer_norm_bwd(dy, x, [300], mean, rstd, weight, [True] * 3)]
    window = [3, 3, 2, 2, 1, 1, 1, 1]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        image = torch.randn(3, 40, 31, 45).contiguous(memory_format=memory_format)
        pooled, taps = RAW.max_pool_with_indices(image, window, False, False)
        dx = RAW.max_pool_bwd(torch.randn_like(pooled), taps, (31, 45), window)
        results += [pooled, taps, dx, RAW.max_pool_gather(image, taps, window)]
    return results


def test_threads_do_not_change_results():
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            runs.append(everything_once())
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("flat", [False, True])
def test_window_of_mostly_padding(memory_format, flat):
    """Such windows take the plain loop: 127 columns of padding around 3, then 70,000 taps over 5 x 6."""
    x = mixed((2, 3, 4, 3), torch.float32).contiguous(memory_format=memory_format)
    y, indices = RAW.max_pool_with_indices(x, [1, 255, 1, 1, 0, 127, 1, 1], False, flat)
    wanted, positions = torch.ops.aten.max_pool2d_with_indices(x, [1, 255], [1, 1], [0, 127], [1, 1])
    row = torch.arange(4)[:, None] * 3
    column = torch.arange(y.shape[3]) - 127 + indices.long()
    assert same(y, wanted) and torch.equal(indices if flat else row + column, positions)
    wide = mixed((1, 2, 5, 6), torch.float32).contiguous(memory_format=memory_format)
    y, indices = RAW.max_pool_with_indices(wide, [280, 250, 1, 1, 140, 125, 1, 1], False, flat)
    wanted, positions = torch.ops.aten.max_pool2d_with_indices(wide, [280, 250], [1, 1], [140, 125], [1, 1])
    assert same(y, wanted) and torch.equal(indices, positions)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_indices_out_of_range_are_skipped(memory_format):
    window = [3, 3, 2, 2, 1, 1, 1, 1]
    x = torch.randn(2, 19, 9, 10)
    shape = (2, 19, 5, 5)
    dy = torch.ones(shape)
    offsets = torch.full(shape, 9, dtype=torch.uint8)  # a 3 x 3 window has taps 0 to 8
    positions = torch.tensor([-1, 90, 2**62, -(2**63)]).repeat(2 * 19 * 25 // 4 + 1)[: 2 * 19 * 25].view(shape)
    for indices in (offsets, positions, torch.zeros(shape, dtype=torch.uint8)):
        kept = indices.dtype == torch.uint8 and not indices.any()
        indices = indices.contiguous(memory_format=memory_format)
        dx = RAW.max_pool_bwd(dy, indices, (9, 10), window)
        # tap 0 lies in the padding for the first row and column of windows and inside the input for the other 16
        assert dx.sum() == (2 * 19 * 16 if kept else 0)
        y = RAW.max_pool_gather(x, indices, window)
        assert y.count_nonzero() == (2 * 19 * 16 if kept else 0)


@pytest.mark.parametrize("scale", [1e-30, 1e19, 1e37])
def test_layer_norm_keeps_the_range_of_fp32(scale):
    """Squares and sums of such rows leave fp32; they are computed again in double."""
    x = torch.randn(5, 333) * scale
    y, mean, rstd = RAW.layer_norm_fwd(x, [333], None, None, 0.0 if scale < 1 else 1e-5)
    want = (x.double() - x.double().mean(1, keepdim=True)) / x.double().std(1, correction=0, keepdim=True)
    if scale < 1:  # the squares are zero in fp32: as in torch, the variance is
        assert rstd.isinf().all()
    else:
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-4, atol=1e-6 * scale)


def test_large_mean():
    x = torch.randn(64, 5000) + 1e4
    y, _, _ = RAW.layer_norm_fwd(x, [5000], None, None, 1e-5)
    torch.testing.assert_close(y.double(), F.layer_norm(x.double(), [5000]), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RAW.max_pool_values(torch.zeros(1, 1, 4, 4), [2, 2, 1, 1, 0, 0, 1], False), "window must have 2 or 8"),
        (lambda: RAW.max_pool_values(torch.zeros(1, 4), [2] * 4 + [0, 0, 1, 1], False), "3 to 5 dimensions, got 2"),
        (lambda: RAW.max_pool_values(torch.zeros(1, 1, 4, 4), [2, 2, 0, 1, 0, 0, 1, 1], False), "stride must"),
        (lambda: RAW.max_pool_values(torch.zeros(1, 1, 4, 4), [2, 2, 1, 1, 0, 2, 1, 1], False), "padding must"),
        (lambda: RAW.max_pool_values(torch.zeros(1, 1, 4, 4), [5, 5, 1, 1, 0, 0, 1, 1], False), "too small"),
        (
            lambda: RAW.max_pool_values(torch.zeros(1, 1, 4, 4).int(), [2] * 4 + [0, 0, 1, 1], False),
            "x must be float",
        ),
        (lambda: RAW.layer_norm_fwd(torch.zeros(2, 3), [4], None, None, 1e-5), "got 4 where x has 3"),
        (lambda: RAW.layer_norm_fwd(torch.zeros(2, 3), [3], torch.zeros(4), None, 1e-5), "weight must have 3 elements"),
        (lambda: RAW.layer_norm_fwd(torch.zeros(2, 3), [3], torch.zeros(3).double(), None, 1e-5), "weight must be"),
    ],
)
def test_raw_calls_are_checked(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
