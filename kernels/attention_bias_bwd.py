"""Gradient of an attention bias of any broadcast shape: a program owns a tile of the bias and sums what is broadcast.

Two more products for each score than a backward without it, but no buffer of the scores' size, no atomics, and a single
store for each element (that a program own a tile of the bias is the idea of openfold-3's pull request 271).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import Case
from ._attention_aot import cases_of
from ._attention_bwd import bwd_tile, delta_of
from ._attention_tiles import bias_tiles, head_block, is_heavy, load_rows, mask_arguments, near, precision_name
from ._launch import cdiv, device_facts, device_guard, require_dtype


@triton.jit
def _attention_bias_bwd_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bias_ptr, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr,
    k_ids_ptr, prefix_ptr, classes_ptr, dbias_ptr, programs, B, H, GROUP, Sq, Sk, D, DV, NQ, NK, bias_b, bias_h,
    row_tiles, column_tiles, stride_dob, stride_doh, stride_dom, stride_dod, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd, stride_bb, stride_bh,
    stride_bm, stride_bn, stride_wb, stride_wh, stride_wm, tile_b, tile_h, tile_heads, low, high, below, scale,
    softcap, BAND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WORDS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_MAP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """bias_b and bias_h are the bias' own sizes; ALL_ROWS, ALL_COLUMNS: one row, one column of it is for all."""
    pid = tl.program_id(0) % programs
    own_h = tl.program_id(0) // programs % bias_h
    own_b = tl.program_id(0) // programs // bias_h
    row_first = 0 if ALL_ROWS else pid // column_tiles
    row_last = row_tiles if ALL_ROWS else row_first + 1
    column_first = 0 if ALL_COLUMNS else pid % column_tiles
    column_last = tl.cdiv(Sk, BLOCK_N) if ALL_COLUMNS else column_first + 1
    rows = tl.zeros((BLOCK_M,), tl.float32)
    columns = tl.zeros((BLOCK_N,), tl.float32)
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    # the items and heads that share the bias' own
    spread_b = B // bias_b
    spread_h = H // bias_h
    for shared in range(0, spread_b * spread_h):
        b = (own_b + shared // spread_h).to(tl.int64)
        h = (own_h + shared % spread_h).to(tl.int64)
        at = (b * H + h) * Sq
        for pid_m in range(row_first, row_last):
            start_m = pid_m * BLOCK_M
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = load_rows(q_ptr + b * stride_qb + h * stride_qh, start_m, offs_m, offs_d, Sq, D, stride_qm, stride_qd)
            do_rows = do_ptr + b * stride_dob + h * stride_doh
            do = load_rows(do_rows, start_m, offs_m, offs_dv, Sq, DV, stride_dom, stride_dod)
            lse = tl.load(lse_ptr + at + offs_m, mask=offs_m < Sq, other=0.0)
            delta = tl.load(delta_ptr + at + offs_m, mask=offs_m < Sq, other=0.0)
            for pid_n in range(column_first, column_last):
                kind = 1
                if HAS_MAP:
                    row = (b * tile_b * tile_heads + h * tile_h) * NQ + pid_m * BLOCK_M // TILE_Q
                    kind = tl.load(classes_ptr + row * NK + pid_n * BLOCK_N // TILE_K).to(tl.int32)
                if kind != 0:
                    start_n = pid_n * BLOCK_N
                    offs_n = start_n + tl.arange(0, BLOCK_N)
                    k_rows = k_ptr + b * stride_kb + h // GROUP * stride_kh
                    v_rows = v_ptr + b * stride_vb + h // GROUP * stride_vh
                    k = load_rows(k_rows, start_n, offs_n, offs_d, Sk, D, stride_kn, stride_kd)
                    v = load_rows(v_rows, start_n, offs_n, offs_dv, Sk, DV, stride_vn, stride_vd)
                    _, ds, _, _ = bwd_tile(
                        q, k, v, do, lse, delta, start_m, start_n, offs_m, offs_n, b,
                        bias_ptr + b * stride_bb + h * stride_bh,
                        words_ptr + b * stride_wb + h * stride_wh if HAS_WORDS else words_ptr, lengths_ptr, padding_ptr,
                        q_ids_ptr, k_ids_ptr, prefix_ptr, Sq, Sk, stride_bm, stride_bn, stride_wm, low, high, below,
                        scale, softcap, True, BAND, HAS_BIAS, HAS_WORDS, HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX,
                        HAS_SOFTCAP, PRECISION,
                    )  # fmt: skip
                    if ALL_ROWS:
                        columns += tl.sum(ds, 0)
                    elif ALL_COLUMNS:
                        rows += tl.sum(ds, 1)
                    else:
                        tile += ds
    _store_bias(
        dbias_ptr, rows, columns, tile, (own_b * bias_h + own_h).to(tl.int64), row_first, column_first, Sq, Sk,
        ALL_ROWS, ALL_COLUMNS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _store_bias(
    dbias_ptr, rows, columns, tile, outer, pid_m, pid_n, Sq, Sk, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums, where the contiguous gradient of the bias has them."""
    dtype = dbias_ptr.dtype.element_ty
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ALL_ROWS and ALL_COLUMNS:
        tl.store(dbias_ptr + outer, tl.sum(columns, 0).to(dtype))
    elif ALL_ROWS:
        tl.store(dbias_ptr + outer * Sk + offs_n, columns.to(dtype), mask=offs_n < Sk)
    elif ALL_COLUMNS:
        tl.store(dbias_ptr + outer * Sq + offs_m, rows.to(dtype), mask=offs_m < Sq)
    else:
        at = dbias_ptr + (outer * Sq + offs_m[:, None]) * Sk + offs_n[None, :]
        tl.store(at, tile.to(dtype), mask=(offs_m[:, None] < Sq) & (offs_n[None, :] < Sk))


def attention_bias_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    bias: Tensor, key_lengths: Tensor | None, key_padding: Tensor | None, q_ids: Tensor | None,
    k_ids: Tensor | None, prefix: Tensor | None, tiles: Sequence[Tensor], causal: int, left: int, right: int,
    scale: float, softcap: float, precision: int,
) -> Tensor:  # fmt: skip
    """Gradient of the bias, in its shape and dtype, contiguous.

    Args:
        dout, dlse: gradients of the forward's results; dlse may be missing.
        q, k, v, mask, key_lengths, key_padding, q_ids, k_ids, prefix, tiles: the forward's.
        bias: four dimensions, each 1 or full.
        out, lse: the forward's results.
        causal, left, right, scale, softcap, precision: the forward's.
    """
    require_dtype("attention_bias_bwd", q)
    dout, q, k, v, out = (near(t) for t in (dout, q, k, v, out))
    (batch, heads, queries, d), shared, keys, dv = q.shape, k.shape[1], k.shape[2], v.shape[3]
    size = (batch, heads, queries, keys)
    if any(n not in (1, full) for n, full in zip(bias.shape, size, strict=True)):
        raise ValueError(f"attention_bias_bwd: bias must broadcast to {size}, got {tuple(bias.shape)}")
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if dbias.numel() == 0 or min(size) == 0:
        return dbias.zero_()
    vectors = (mask, bias, key_lengths, key_padding, q_ids, k_ids, prefix)
    masks = mask_arguments(size, *vectors, tiles, (causal, left, right))
    heavy = is_heavy(masks.flags, softcap)
    tile = bias_tiles(queries, max(d, dv), q.element_size(), heavy, device_facts(q))
    all_rows, all_columns = (n == 1 and full > 1 for n, full in zip(bias.shape[2:], size[2:], strict=True))
    row_tiles, column_tiles = cdiv(queries, tile.block_m), cdiv(keys, tile.block_n)
    programs = (1 if all_rows else row_tiles) * (1 if all_columns else column_tiles)
    with device_guard(q):
        _attention_bias_bwd_kernel[(programs * bias.shape[0] * bias.shape[1],)](
            dout, q, k, v, lse, delta_of(dout, dlse, out), *masks.pointers, tiles[1] if tiles else None, dbias,
            programs, batch, heads, heads // shared, queries, keys, d, dv, cdiv(queries, 128), cdiv(keys, 64),
            *bias.shape[:2], row_tiles, 1 if all_columns else column_tiles, *dout.stride(), *q.stride(), *k.stride(),
            *v.stride(), *masks.strides, *masks.tile_strides, tiles[1].shape[1] if tiles else 1, *masks.band, scale,
            softcap or 1.0, **masks.flags, HAS_SOFTCAP=softcap != 0.0, PRECISION=precision_name(precision),
            ALL_ROWS=all_rows, ALL_COLUMNS=all_columns, TILE_Q=128, TILE_K=64, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, BLOCK_D=head_block(d), BLOCK_DV=head_block(dv), num_warps=tile.num_warps,
            num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return dbias


def aot_cases(arch: int) -> Iterator[Case]:
    """The tiles of usual head dimensions, for a band, a dense mask, and every mask at once."""
    for all_rows, all_columns in ((False, False), (True, False), (False, True)):
        extra = {"ALL_ROWS": all_rows, "ALL_COLUMNS": all_columns}
        for case in cases_of(_attention_bias_bwd_kernel, arch, bias_tiles, extra):
            if case.constexprs["HAS_BIAS"]:
                label = f"{case.label} {'one row' if all_rows else 'one column' if all_columns else 'tile'}"
                yield case._replace(label=label, quick=case.quick or "bf16 ieee D=64" in label, num_stages=1)
