"""Layer normalisation of few and very wide rows: a row is cut into pieces, so that more programs than rows take part.

How a row is cut depends on its shape alone, and every program adds the pieces in one order: the same bits on every run,
whatever the number of multiprocessors. Traffic, in units of rows x columns elements:

- forward: each piece's statistics (read x), then y (read x, write y): 2 reads and 1 write;
- backward: sums over columns for dx and over rows for dweight and dbias (read x and dy once for both), then dx (read x
  and dy, write dx): 4 reads and 1 write, where one program per row and a kernel for dweight and dbias take 6 and 1.

The second kernel begins with the pieces that the first read last, which the L2 cache still holds: as far as they fit
it, device memory serves 1 read forward and 2 backward. Of up to 31 rows the first kernel finishes dweight and dbias;
more rows leave partial sums in a few groups, which the kernel of unsplit rows adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._layer_norm_bwd import dx_columns
from ._layer_norm_fwd import join_statistics, normalise_columns, row_statistics


@triton.jit
def last_piece_first(N, piece):
    """Row, first column and end of this program's piece, in the opposite order of program ids."""
    index = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    begin = index * piece
    return row, begin, tl.minimum(begin + piece, N)


@triton.jit
def sum_of_parts(parts_ptr, row, S, BLOCK_S: tl.constexpr):
    """Sum of the S partial sums of a row, in a fixed order."""
    offs_s = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    parts_ptr += row * S
    for start in range(0, S, BLOCK_S):
        total += tl.load(parts_ptr + start + offs_s, mask=start + offs_s < S, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _layer_norm_fwd_split_statistics_kernel(x_ptr, parts_ptr, N, piece, stride_xm, BLOCK_N: tl.constexpr):
    """Mean, remainder of the mean and sum of squared deviations of one piece of one row."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    begin = index * piece
    mean, rest, m2 = row_statistics(x_ptr + row * stride_xm, begin, tl.minimum(begin + piece, N), BLOCK_N)
    parts_ptr += row * tl.num_programs(0) + index
    tl.store(parts_ptr, mean)
    tl.store(parts_ptr + size, rest)
    tl.store(parts_ptr + 2 * size, m2)


@triton.jit
def _layer_norm_fwd_split_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    parts_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    piece,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the statistics of the row's pieces, at most BLOCK_S, and normalise one piece."""
    row, begin, end = last_piece_first(N, piece)
    S = tl.num_programs(0)
    size = S.to(tl.int64) * tl.num_programs(1)
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    count = tl.where(mask_s, tl.minimum(N - offs_s.to(tl.int64) * piece, piece), 0).to(tl.float32)
    parts_ptrs = parts_ptr + row * S + offs_s
    part_mean = tl.load(parts_ptrs, mask=mask_s, other=0.0)
    part_rest = tl.load(parts_ptrs + size, mask=mask_s, other=0.0)
    part_m2 = tl.load(parts_ptrs + 2 * size, mask=mask_s, other=0.0)
    mean, rest, m2 = join_statistics(count, part_mean, part_rest, part_m2, N)
    rstd = tl.rsqrt(m2 / N + eps)
    if begin == 0:
        tl.store(mean_ptr + row, mean + rest)
        tl.store(rstd_ptr + row, rstd)
    normalise_columns(
        x_ptr + row * stride_xm, weight_ptr, bias_ptr, y_ptr + row * N, begin, end, mean, rest, rstd,
        HAS_WEIGHT, HAS_BIAS, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _layer_norm_bwd_split_sums_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    parts_ptr,
    dweight_ptr,
    dbias_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    HAS_WEIGHT: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns: each row's sums of g and g xhat, and dweight and dbias over every axis-1-th block of rows."""
    pid_n = tl.program_id(0).to(tl.int64)
    pid_m = tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(1).to(tl.int64)
    S = tl.num_programs(0).to(tl.int64)
    begin = pid_n * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N - begin
    weight = tl.full((1, BLOCK_N), 1.0, dtype=tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + begin + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(pid_m * BLOCK_M, M, groups * BLOCK_M):
        offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy_ptrs = dy_ptr + begin + offs_m[:, None] * stride_dym + offs_n[None, :]
        x_ptrs = x_ptr + begin + offs_m[:, None] * stride_xm + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        dweight += dy * xhat
        dbias += dy
        g = dy * weight
        parts_ptrs = parts_ptr + offs_m * 2 * S + pid_n
        tl.store(parts_ptrs, tl.sum(g, axis=1), mask=mask_m)
        tl.store(parts_ptrs + S, tl.sum(g * xhat, axis=1), mask=mask_m)
    if HAS_DWEIGHT:
        result = tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + pid_m * N + begin + offs_n, result, mask=mask_n)
    if HAS_DBIAS:
        result = tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + pid_m * N + begin + offs_n, result, mask=mask_n)


@triton.jit
def _layer_norm_bwd_split_dx_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    parts_ptr,
    dx_ptr,
    N,
    S,
    piece,
    stride_dym,
    stride_xm,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the row's S sums of g and of g xhat, then dx of one piece."""
    row, begin, end = last_piece_first(N, piece)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    g_mean = sum_of_parts(parts_ptr, 2 * row, S, BLOCK_S) / N
    slope = sum_of_parts(parts_ptr, 2 * row + 1, S, BLOCK_S) / N * rstd
    dx_columns(
        dy_ptr + row * stride_dym, x_ptr + row * stride_xm, weight_ptr, dx_ptr + row * N, begin, end, mean, rstd,
        g_mean, slope, HAS_WEIGHT, BLOCK_N,
    )  # fmt: skip
