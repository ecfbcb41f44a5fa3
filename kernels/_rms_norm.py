"""Kernels of RMS normalisation: y = x rstd weight with rstd = 1 / sqrt(mean(x^2) + eps).

Backward, with xhat = x rstd and g = dy weight: dx = rstd (g - xhat mean(g xhat)), dweight = sum over rows of dy xhat.
The sum over rows is one fp32 partial per program, added in a fixed order by layer normalisation's last kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    M,
    N,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M whole rows per program."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_of_squares(x_ptr, begin, end, BLOCK_N: tl.constexpr):
    """Sum of x^2 over the row's columns from begin to end."""
    offs = tl.arange(0, BLOCK_N)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i in range(0, tl.cdiv(end - begin, BLOCK_N)):
        cols = begin + i * BLOCK_N + offs
        x = tl.load(x_ptr + cols, mask=cols < end, other=0.0, eviction_policy="evict_last").to(tl.float32)
        squares += x * x
    return tl.sum(squares, axis=0)


@triton.jit
def scale_columns(x_ptr, weight_ptr, y_ptr, begin, end, rstd, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """y of the row's columns from begin to end."""
    offs = tl.arange(0, BLOCK_N)
    for i in range(0, tl.cdiv(end - begin, BLOCK_N)):
        cols = begin + i * BLOCK_N + offs
        mask = cols < end
        y = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_fwd_looped_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    N,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One wide row per program: a pass for the mean square, a pass for y."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    rstd = tl.rsqrt(sum_of_squares(x_ptr, 0, N, BLOCK_N) / N + eps)
    tl.store(rstd_ptr + row, rstd)
    scale_columns(x_ptr, weight_ptr, y_ptr + row * N, 0, N, rstd, HAS_WEIGHT, BLOCK_N)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
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
    """Every read of x and dy serves dx and dweight; a program strides over blocks of rows."""
    pid_m = tl.program_id(0).to(tl.int64)
    num_programs = tl.num_programs(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = tl.full((1, BLOCK_N), 1.0, dtype=tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(pid_m * BLOCK_M, M, num_programs * BLOCK_M):
        offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        xhat = x * rstd[:, None]
        product = dy * xhat
        dweight += product
        gx_mean = tl.sum(product * weight, axis=1) / N
        dx = (dy * weight - xhat * gx_mean[:, None]) * rstd[:, None]
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + pid_m * N + offs_n, tl.sum(dweight, axis=0), mask=mask_n)


@triton.jit
def _rms_norm_bwd_dx_kernel(
    dy_ptr,
    x_ptr,
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
    rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
    if HAS_WEIGHT:
        g *= tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    xhat = x * rstd[:, None]
    gx_mean = tl.sum(g * xhat, axis=1) / N
    dx = (g - xhat * gx_mean[:, None]) * rstd[:, None]
    tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dx_columns(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, begin, end, rstd, gx_mean, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dx of the row's columns from begin to end, with gx_mean = mean(g xhat)."""
    offs = tl.arange(0, BLOCK_N)
    for i in range(0, tl.cdiv(end - begin, BLOCK_N)):
        cols = begin + i * BLOCK_N + offs
        mask = cols < end
        g = tl.load(dy_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dx = (g - (x * rstd) * gx_mean) * rstd
        tl.store(dx_ptr + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_dx_looped_kernel(
    dy_ptr,
    x_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    N,
    stride_dym,
    stride_xm,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One wide row per program: a pass for the mean, a pass for dx."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * stride_dym
    x_ptr += row * stride_xm
    dx_ptr += row * N
    rstd = tl.load(rstd_ptr + row)
    offs = tl.arange(0, BLOCK_N)
    gx_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i in range(0, tl.cdiv(N, BLOCK_N)):
        cols = i * BLOCK_N + offs
        mask = cols < N
        g = tl.load(dy_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        gx_sum += g * (x * rstd)
    gx_mean = tl.sum(gx_sum, axis=0) / N
    dx_columns(dy_ptr, x_ptr, weight_ptr, dx_ptr, 0, N, rstd, gx_mean, HAS_WEIGHT, BLOCK_N)


@triton.jit
def _rms_norm_bwd_dw_kernel(
    dy_ptr,
    x_ptr,
    rstd_ptr,
    partial_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Partial dweight of BLOCK_N columns; a program strides over blocks of rows."""
    pid_n = tl.program_id(0).to(tl.int64)
    pid_m = tl.program_id(1).to(tl.int64)
    num_programs = tl.num_programs(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(pid_m * BLOCK_M, M, num_programs * BLOCK_M):
        offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        dweight += dy * (x * rstd[:, None])
    tl.store(partial_ptr + pid_m * N + offs_n, tl.sum(dweight, axis=0), mask=mask_n)
