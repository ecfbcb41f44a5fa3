"""RMS normalisation of few and very wide rows, cut into pieces as _layer_norm_split.py describes, with its traffic."""

from __future__ import annotations

import triton
import triton.language as tl

from ._layer_norm_split import last_piece_first, sum_of_parts
from ._rms_norm import dx_columns, scale_columns, sum_of_squares


@triton.jit
def _rms_norm_fwd_split_squares_kernel(x_ptr, parts_ptr, N, piece, stride_xm, BLOCK_N: tl.constexpr):
    """Sum of squares of one piece of one row."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    begin = index * piece
    total = sum_of_squares(x_ptr + row * stride_xm, begin, tl.minimum(begin + piece, N), BLOCK_N)
    tl.store(parts_ptr + row * tl.num_programs(0) + index, total)


@triton.jit
def _rms_norm_fwd_split_kernel(
    x_ptr,
    weight_ptr,
    parts_ptr,
    y_ptr,
    rstd_ptr,
    N,
    piece,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the squares of the row's pieces and scale one piece."""
    row, begin, end = last_piece_first(N, piece)
    rstd = tl.rsqrt(sum_of_parts(parts_ptr, row, tl.num_programs(0), BLOCK_S) / N + eps)
    if begin == 0:
        tl.store(rstd_ptr + row, rstd)
    scale_columns(x_ptr + row * stride_xm, weight_ptr, y_ptr + row * N, begin, end, rstd, HAS_WEIGHT, BLOCK_N)


@triton.jit
def _rms_norm_bwd_split_sums_kernel(
    dy_ptr,
    x_ptr,
    rstd_ptr,
    weight_ptr,
    parts_ptr,
    dweight_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    HAS_WEIGHT: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns: each row's sum of g xhat, and dweight over every axis-1-th block of rows."""
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
    for start in range(pid_m * BLOCK_M, M, groups * BLOCK_M):
        offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy_ptrs = dy_ptr + begin + offs_m[:, None] * stride_dym + offs_n[None, :]
        x_ptrs = x_ptr + begin + offs_m[:, None] * stride_xm + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        product = dy * (x * rstd[:, None])
        dweight += product
        tl.store(parts_ptr + offs_m * S + pid_n, tl.sum(product * weight, axis=1), mask=mask_m)
    if HAS_DWEIGHT:
        result = tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + pid_m * N + begin + offs_n, result, mask=mask_n)


@triton.jit
def _rms_norm_bwd_split_dx_kernel(
    dy_ptr,
    x_ptr,
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
    """Add the row's S sums of g xhat, then dx of one piece."""
    row, begin, end = last_piece_first(N, piece)
    rstd = tl.load(rstd_ptr + row)
    gx_mean = sum_of_parts(parts_ptr, row, S, BLOCK_S) / N
    dx_columns(
        dy_ptr + row * stride_dym, x_ptr + row * stride_xm, weight_ptr, dx_ptr + row * N, begin, end, rstd, gx_mean,
        HAS_WEIGHT, BLOCK_N,
    )  # fmt: skip
