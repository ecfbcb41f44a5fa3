"""Backward kernels of layer normalisation.

With xhat = (x - mean) rstd and g = dy weight: dx = rstd (g - mean(g) - xhat mean(g xhat)), dweight = sum over rows of
dy xhat, dbias = sum over rows of dy. The sums over rows are fp32 partials, one per program, added in a fixed order by a
second kernel: no atomics, so a re-run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every read of x and dy serves dx, dweight and dbias; a program strides over blocks of rows."""
    pid_m = tl.program_id(0).to(tl.int64)
    num_programs = tl.num_programs(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = tl.full((1, BLOCK_N), 1.0, dtype=tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(pid_m * BLOCK_M, M, num_programs * BLOCK_M):
        offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :]
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        dweight += dy * xhat
        dbias += dy
        g = dy * weight
        g_mean = tl.sum(g, axis=1) / N
        gx_mean = tl.sum(g * xhat, axis=1) / N
        dx = (g - g_mean[:, None] - xhat * gx_mean[:, None]) * rstd[:, None]
        dx_ptrs = dx_ptr + offs_m[:, None] * N + offs_n[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial_ptrs = partial_ptr + pid_m * N + offs_n
    tl.store(partial_ptrs, tl.sum(dweight, axis=0), mask=mask_n)
    tl.store(partial_ptrs + num_programs * N, tl.sum(dbias, axis=0), mask=mask_n)


@triton.jit
def _layer_norm_bwd_dx_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M whole rows per program, dx only."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    g = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
    if HAS_WEIGHT:
        g *= tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    g_mean = tl.sum(g, axis=1) / N
    gx_mean = tl.sum(g * xhat, axis=1) / N
    dx = (g - (g_mean[:, None] + xhat * gx_mean[:, None])) * rstd[:, None]
    tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dx_columns(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    begin,
    end,
    mean,
    rstd,
    g_mean,
    slope,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx of the row's columns from begin to end, with slope = mean(g xhat) rstd."""
    offs = tl.arange(0, BLOCK_N)
    for i in range(0, tl.cdiv(end - begin, BLOCK_N)):
        cols = begin + i * BLOCK_N + offs
        mask = cols < end
        g = tl.load(dy_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dx = (g - (g_mean + (x - mean) * slope)) * rstd
        tl.store(dx_ptr + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_dx_looped_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    N,
    stride_dym,
    stride_xm,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One wide row per program: a pass for the two means, a pass for dx."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * stride_dym
    x_ptr += row * stride_xm
    dx_ptr += row * N
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    offs = tl.arange(0, BLOCK_N)
    g_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    gx_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i in range(0, tl.cdiv(N, BLOCK_N)):
        cols = i * BLOCK_N + offs
        mask = cols < N
        g = tl.load(dy_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        g_sum += g
        gx_sum += g * tl.where(mask, (x - mean) * rstd, 0.0)
    g_mean = tl.sum(g_sum, axis=0) / N
    slope = tl.sum(gx_sum, axis=0) / N * rstd
    dx_columns(dy_ptr, x_ptr, weight_ptr, dx_ptr, 0, N, mean, rstd, g_mean, slope, HAS_WEIGHT, BLOCK_N)


@triton.jit
def _layer_norm_bwd_dwdb_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Partial dweight and dbias of BLOCK_N columns; a program strides over blocks of rows."""
    pid_n = tl.program_id(0).to(tl.int64)
    pid_m = tl.program_id(1).to(tl.int64)
    num_programs = tl.num_programs(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(pid_m * BLOCK_M, M, num_programs * BLOCK_M):
        offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        dweight += dy * tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        dbias += dy
    partial_ptrs = partial_ptr + pid_m * N + offs_n
    tl.store(partial_ptrs, tl.sum(dweight, axis=0), mask=mask_n)
    tl.store(partial_ptrs + num_programs * N, tl.sum(dbias, axis=0), mask=mask_n)


@triton.jit
def _layer_norm_bwd_reduce_kernel(
    partial_ptr, first_ptr, second_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Add P partial rows in a fixed order; axis 1 of the grid picks first_ptr's partials, or those that follow."""
    pid_n = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    partial_ptr += which * P * N
    total = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < P)[:, None] & mask_n[None, :]
        total += tl.load(partial_ptr + offs_p[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0).to(first_ptr.dtype.element_ty)
    if which == 0:
        tl.store(first_ptr + offs_n, result, mask=mask_n)
    else:
        tl.store(second_ptr + offs_n, result, mask=mask_n)
