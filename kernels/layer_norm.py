"""Layer normalisation over the last dimensions: launchers and tile choice.

Ba, Kiros and Hinton, "Layer Normalization" (2016). Forward reads x and writes y; backward reads x and dy once for dx,
dweight and dbias as long as a row fits a tile. Statistics and sums are fp32 for every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._aot import TYPES, Case
from ._launch import Device, device_facts, device_guard, next_power_of_two, require_dtype
from ._layer_norm_bwd import (
    _layer_norm_bwd_dwdb_kernel,
    _layer_norm_bwd_dx_kernel,
    _layer_norm_bwd_dx_looped_kernel,
    _layer_norm_bwd_kernel,
    _layer_norm_bwd_reduce_kernel,
)
from ._layer_norm_fwd import _layer_norm_fwd_kernel, _layer_norm_fwd_looped_kernel

MAX_TILE_FWD = 32768
MAX_TILE_BWD = 8192
REDUCE_BLOCK_P, REDUCE_BLOCK_N = 128, 32
DWDB_BLOCK_M, DWDB_BLOCK_N = 16, 128


class Config(NamedTuple):
    """Rows and columns of a tile and warps per program; ``looped`` when a row takes several tiles."""

    block_m: int
    block_n: int
    num_warps: int
    looped: bool = False


def fwd_config(M: int, N: int, itemsize: int, device: Device) -> Config:
    """Tile of the forward (and of the dx-only backward): up to 32 elements a thread, a warp per row for narrow rows."""
    block_n = max(next_power_of_two(N), 16)
    if block_n > MAX_TILE_FWD:
        return Config(1, 4096, 8, looped=True)
    if block_n >= 2048:
        return Config(1, block_n, {2048: 4, 4096: 8, 8192: 8}.get(block_n, 16))
    block_m = min(4096 // block_n, 64)
    # too few programs to fill the part: a quarter of the rows each
    return Config(block_m if M >= block_m * device.sm_count else max(block_m // 4, 1), block_n, 4)


def bwd_config(M: int, N: int, itemsize: int, device: Device) -> Config:
    """Tile of the fused backward: 16 elements a thread, since x, dy, weight and two sums are live at once."""
    block_n = max(next_power_of_two(N), 16)
    if block_n > MAX_TILE_BWD:
        return Config(1, 4096, 8, looped=True)
    if block_n >= 2048:
        return Config(1, block_n, block_n // 512)
    return Config(min(2048 // block_n, 64), block_n, 4)


def num_partials(M: int, config: Config, device: Device) -> int:
    """Programs of the fused backward, hence rows of partial sums: a function of sizes and device only."""
    per_sm = max(16 // config.num_warps, 1)
    return min(triton.cdiv(M, config.block_m), per_sm * device.sm_count)


def num_row_splits(M: int, N: int, device: Device) -> int:
    """Programs that share a block of columns in the dweight and dbias kernel."""
    wanted = triton.cdiv(4 * device.sm_count, triton.cdiv(N, DWDB_BLOCK_N))
    return max(min(wanted, triton.cdiv(M, DWDB_BLOCK_M)), 1)


def _as_rows(x: Tensor, M: int, N: int) -> tuple[Tensor, int]:
    """``x`` as M rows of N adjacent elements, and the distance between rows; copies only if no such view exists."""
    if x.is_contiguous():
        return x, N
    rows = x.reshape(M, N)
    if N > 1 and rows.stride(1) != 1:
        return x.contiguous(), N
    return rows, rows.stride(0)


def layer_norm_fwd(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the last ``len(normalized_shape)`` dimensions of ``x``.

    Args:
        x: [..., *normalized_shape], float32, float16 or bfloat16, any strides.
        normalized_shape: the trailing shape.
        weight, bias: normalized_shape, ``x``'s dtype or float32.
        eps: added to the biased variance.

    Returns:
        y (contiguous, ``x``'s shape and dtype), mean and rstd (float32, the leading shape).
    """
    require_dtype("layer_norm_fwd", x)
    lead = x.shape[: x.dim() - len(normalized_shape)]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = torch.empty(lead, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    M, N = mean.numel(), math.prod(normalized_shape)
    if M == 0 or N == 0:
        # torch's values for rows without elements
        return y, mean.fill_(0.0), rstd.fill_(math.nan)
    x, stride_xm = _as_rows(x, M, N)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    config = fwd_config(M, N, x.element_size(), device_facts(x))
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    with device_guard(x):
        if config.looped:
            _layer_norm_fwd_looped_kernel[(M,)](
                x, weight, bias, y, mean, rstd, N, stride_xm, eps, **flags,
                BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            _layer_norm_fwd_kernel[(triton.cdiv(M, config.block_m),)](
                x, weight, bias, y, mean, rstd, M, N, stride_xm, eps, **flags, BLOCK_M=config.block_m,
                BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
    return y, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`layer_norm_fwd`.

    Args:
        dy: gradient of y, any strides.
        x, normalized_shape, weight: the forward's.
        mean, rstd: the forward's results.
        output_mask: which of dx, dweight, dbias to compute.

    Returns:
        dx (contiguous), dweight and dbias (normalized_shape, ``weight``'s dtype or ``x``'s without one); an output that
        is not wanted has shape (0,).
    """
    require_dtype("layer_norm_bwd", x)
    want_dx, want_dw, want_db = output_mask
    N = math.prod(normalized_shape)
    M = mean.numel()
    affine = x if weight is None else weight
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_dx else x.new_empty(0)
    dweight = affine.new_empty(normalized_shape) if want_dw else x.new_empty(0)
    dbias = affine.new_empty(normalized_shape) if want_db else x.new_empty(0)
    sums = [(i, out) for i, (out, wanted) in enumerate(((dweight, want_dw), (dbias, want_db))) if wanted]
    if M == 0 or N == 0:
        for _, out in sums:
            out.zero_()
        return dx, dweight, dbias
    x, stride_xm = _as_rows(x, M, N)
    dy, stride_dym = _as_rows(dy, M, N)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    weight = None if weight is None else weight.contiguous()
    device = device_facts(x)
    with device_guard(x):
        fused = bwd_config(M, N, x.element_size(), device)
        if want_dx and sums and not fused.looped:
            partial = x.new_empty((2, num_partials(M, fused, device), N), dtype=torch.float32)
            _layer_norm_bwd_kernel[(partial.shape[1],)](
                dy, x, mean, rstd, weight, dx, partial, M, N, stride_dym, stride_xm,
                HAS_WEIGHT=weight is not None, BLOCK_M=fused.block_m, BLOCK_N=fused.block_n,
                num_warps=fused.num_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            if want_dx:
                _launch_dx(dy, x, mean, rstd, weight, dx, M, N, stride_dym, stride_xm, device)
            if sums:
                partial = x.new_empty((2, num_row_splits(M, N, device), N), dtype=torch.float32)
                _layer_norm_bwd_dwdb_kernel[(triton.cdiv(N, DWDB_BLOCK_N), partial.shape[1])](
                    dy, x, mean, rstd, partial, M, N, stride_dym, stride_xm, BLOCK_M=DWDB_BLOCK_M,
                    BLOCK_N=DWDB_BLOCK_N, num_warps=4, num_stages=1, enable_fp_fusion=True,
                )  # fmt: skip
        if sums:
            _layer_norm_bwd_reduce_kernel[(triton.cdiv(N, REDUCE_BLOCK_N), len(sums))](
                partial[sums[0][0]], sums[0][1], sums[-1][1], partial.shape[1], N, BLOCK_P=REDUCE_BLOCK_P,
                BLOCK_N=REDUCE_BLOCK_N, num_warps=4, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
    return dx, dweight, dbias


def _launch_dx(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dx: Tensor,
    M: int, N: int, stride_dym: int, stride_xm: int, device: Device,
) -> None:  # fmt: skip
    config = fwd_config(M, N, x.element_size(), device)
    if config.looped or config.block_n > MAX_TILE_BWD:
        _layer_norm_bwd_dx_looped_kernel[(M,)](
            dy, x, mean, rstd, weight, dx, N, stride_dym, stride_xm, HAS_WEIGHT=weight is not None,
            BLOCK_N=4096, num_warps=8, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        _layer_norm_bwd_dx_kernel[(triton.cdiv(M, config.block_m),)](
            dy, x, mean, rstd, weight, dx, M, N, stride_dym, stride_xm, HAS_WEIGHT=weight is not None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip
