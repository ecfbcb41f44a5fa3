"""Forward kernels of layer normalisation: a row in one tile, or in a loop over chunks when it is wider than a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    N,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M whole rows per program; statistics in two passes over registers, shifted by each row's first element.

    The shift makes the sum's rounding error relative to the row's spread, not to its mean.
    """
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    x_ptrs = x_ptr + offs_m * stride_xm
    shift = tl.load(x_ptrs, mask=mask_m, other=0.0).to(tl.float32)
    x = tl.load(x_ptrs[:, None] + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x - shift[:, None], 0.0)
    mean = tl.sum(x, axis=1) / N
    x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
    tl.store(mean_ptr + offs_m, shift + mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_statistics(x_ptr, begin, end, BLOCK_N: tl.constexpr):
    """Statistics of the row's columns from begin to end: (mean, rest, m2), m2 the sum of squared deviations.

    The mean is a rounded sum and the remainder that the sum lost. Welford's recurrence in every lane, lanes joined by
    Chan's formula: no reduction inside the loop, and no cancellation whatever the mean or outliers. Welford, "Note on a
    method for calculating corrected sums of squares and products" (1962); Chan, Golub and LeVeque, "Algorithms for
    computing the sample variance" (1983).
    """
    n = end - begin
    offs = tl.arange(0, BLOCK_N)
    lane_mean = tl.zeros((BLOCK_N,), dtype=tl.float32)
    lane_m2 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i in range(0, tl.cdiv(n, BLOCK_N)):
        cols = begin + i * BLOCK_N + offs
        mask = cols < end
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        delta = tl.where(mask, x - lane_mean, 0.0)
        lane_mean += delta * (1.0 / (i + 1))
        lane_m2 += delta * (x - lane_mean)
    count = ((n - offs + (BLOCK_N - 1)) // BLOCK_N).to(tl.float32)
    return join_statistics(count, lane_mean, 0.0, lane_m2, n)


@triton.jit
def join_statistics(count, part_mean, part_rest, part_m2, N):
    """Chan's formula for all parts of N elements at once; a part without elements counts 0 and has mean and m2 0."""
    mean = tl.sum(part_mean * count, axis=0) / N
    rest = tl.sum(((part_mean - mean) + part_rest) * count, axis=0) / N
    spread = ((part_mean - mean) + part_rest) - rest
    return mean, rest, tl.sum(part_m2 + spread * spread * count, axis=0)


@triton.jit
def normalise_columns(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    begin,
    end,
    mean,
    rest,
    rstd,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y of the row's columns from begin to end."""
    offs = tl.arange(0, BLOCK_N)
    for i in range(0, tl.cdiv(end - begin, BLOCK_N)):
        cols = begin + i * BLOCK_N + offs
        mask = cols < end
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = ((x - mean) - rest) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_fwd_looped_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One wide row per program: a pass for the statistics, a pass for y."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * N
    mean, rest, m2 = row_statistics(x_ptr, 0, N, BLOCK_N)
    rstd = tl.rsqrt(m2 / N + eps)
    tl.store(mean_ptr + row, mean + rest)
    tl.store(rstd_ptr + row, rstd)
    normalise_columns(x_ptr, weight_ptr, bias_ptr, y_ptr, 0, N, mean, rest, rstd, HAS_WEIGHT, HAS_BIAS, BLOCK_N)
