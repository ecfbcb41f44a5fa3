"""Masked attention, forward: online softmax over the tiles of keys that a block of queries sees.

Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (tiling). Bytes: q, out and lse once, k and v once for
each block of queries; 4 D operations for each score that is not skipped. Full tiles are not masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import Case
from ._attention_aot import cases_of
from ._attention_loads import load_tile, tile_inputs
from ._attention_tiles import (
    TILE_K,
    TILE_Q,
    band_blocks,
    block_at,
    blocks_of,
    fwd_tiles,
    head_block,
    is_heavy,
    like_rows,
    listed_blocks,
    mask_arguments,
    near,
    place_of,
    precision_name,
    seen_rows,
    tile_bias,
    tile_mask,
    tile_scores,
    turns_of,
)
from ._launch import cdiv, device_facts, device_guard, require_dtype


@triton.jit
def _fwd_tiles(
    acc, top, total, q, start_m, offs_m, offs_d, offs_dv, first, last, jump_at, jump, list_ptr, k_ptr, v_ptr, bias_ptr,
    words_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, b, hk, Sq, Sk, D, DV, stride_kn, stride_kd,
    stride_vn, stride_vd,
    stride_bm, stride_bn, stride_wm, low, high, below, scale, softcap, MASKED: tl.constexpr, BAND: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WORDS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_MAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds blocks first..last of keys to the running (sum of p v, maximum, sum of p); scores in units of log2.

    From ``jump_at`` on blocks are ``jump`` further: so the masked blocks on both sides of a band are one loop.
    """
    for step in range(first, last):
        block = step + tl.where(step >= jump_at, jump, 0)
        if HAS_MAP:
            start = (tl.load(list_ptr + block // SPLIT) // 2 * SPLIT + block % SPLIT) * BLOCK_N
        else:
            start = block * BLOCK_N
        offs_n = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, b, hk, start, offs_n, offs_d, Sk, D, stride_kn, stride_kd, DESCRIBED)
        v = load_tile(v_ptr, b, hk, start, offs_n, offs_dv, Sk, DV, stride_vn, stride_vd, DESCRIBED)
        s, _ = tile_scores(q, tl.trans(k), scale, softcap, HAS_SOFTCAP, PRECISION)
        if HAS_BIAS:
            bias = tile_bias(bias_ptr, start_m, start, offs_m, offs_n, Sq, Sk, stride_bm, stride_bn)
            s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
        s = s * 1.4426950408889634
        if MASKED:
            ok = tile_mask(
                start_m, offs_m, offs_n, b, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, Sq,
                Sk, stride_wm, low, high, below, BAND, HAS_WORDS, HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX,
            )  # fmt: skip
            s = tl.where(ok, s, float("-inf"))
            v = seen_rows(v, ok, 0)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(p, 1)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["blocks", "turns"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, count_ptr,
    list_ptr, out_ptr, lse_ptr, blocks, turns, H, GROUP, Sq, Sk, D, DV, NQ, NK,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_od,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_wb, stride_wh, stride_wm, tile_b, tile_h, tile_heads,
    low, high, below, scale, softcap, BAND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WORDS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HAS_MAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    TILE_Q: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    place, head = place_of(tl.program_id(0), blocks, turns if HAS_MAP else 1)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    # without a map the last queries first: under a causal mask they see the most keys
    pid_m = blocks - 1 - place
    if HAS_MAP:
        row = (b * tile_b * tile_heads + h * tile_h) * NQ
        pid_m = block_at(count_ptr, row, place, blocks // NQ)
        row += pid_m * BLOCK_M // TILE_Q
    start_m = pid_m * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    hk = h // GROUP
    out_ptr += b * stride_ob + h * stride_oh
    lse_ptr += head.to(tl.int64) * Sq
    if not DESCRIBED:
        q_ptr += b * stride_qb + h * stride_qh
        k_ptr += b * stride_kb + hk * stride_kh
        v_ptr += b * stride_vb + hk * stride_vh
    if HAS_BIAS:
        bias_ptr += b * stride_bb + h * stride_bh
    if HAS_WORDS:
        words_ptr += b * stride_wb + h * stride_wh
    q = load_tile(q_ptr, b, h, start_m, offs_m, offs_d, Sq, D, stride_qm, stride_qd, DESCRIBED)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # blocks of keys: [begin, full) masked, [full, rest) not masked, [rest, end) masked
    if HAS_MAP:
        list_ptr += row * NK
        full, rest = listed_blocks(count_ptr, row, SPLIT, start_m < Sq)
        begin = 0
        end = rest
    else:
        begin, full, rest, end = band_blocks(pid_m * BLOCK_M, BLOCK_M, Sk, low, tl.minimum(high, below), BLOCK_N)
    for part in tl.static_range(2):
        first = begin if part == 0 else full
        last = end - (rest - full) if part == 0 else rest
        acc, top, total = _fwd_tiles(
            acc, top, total, q, start_m, offs_m, offs_d, offs_dv, first, last, full, 0 if part else rest - full,
            list_ptr, k_ptr, v_ptr, bias_ptr, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, b,
            hk, Sq, Sk, D, DV, stride_kn, stride_kd, stride_vn, stride_vd, stride_bm, stride_bn, stride_wm, low, high,
            below, scale, softcap, part == 0, BAND, HAS_BIAS, HAS_WORDS, HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX,
            HAS_MAP, HAS_SOFTCAP, PRECISION, DESCRIBED, SPLIT, BLOCK_N,
        )  # fmt: skip
    mask_m = offs_m < Sq
    out = tl.where(total[:, None] > 0.0, acc / tl.where(total > 0.0, total, 1.0)[:, None], 0.0)
    out = tl.where((total != total)[:, None], total[:, None], out)
    lse = tl.where(
        total == 0.0, float("-inf"), (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    )
    at = out_ptr + offs_m[:, None].to(tl.int64) * stride_om + offs_dv[None, :] * stride_od
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_dv[None, :] < DV))
    tl.store(lse_ptr + offs_m, lse, mask=mask_m)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, key_lengths: Tensor | None,
    key_padding: Tensor | None, q_ids: Tensor | None, k_ids: Tensor | None, prefix: Tensor | None,
    tiles: Sequence[Tensor], causal: int, left: int, right: int, scale: float, softcap: float, precision: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, H, Sq, Dv] in q's dtype and logsumexp [B, H, Sq] in float32.

    Args:
        q, k, v: [B, H, Sq, D], [B, Hk, Sk, D], [B, Hk, Sk, Dv]; float32, float16 or bfloat16, any strides.
        mask, bias, key_lengths, key_padding, q_ids, k_ids, prefix: masks, see pydl.ops.attention.
        tiles: the six tensors of attention_map, or none of them for masks that are numbers.
        causal, left, right: masks that are numbers.
        scale, softcap: of the scores; softcap 0 for none.
        precision: of float32 products: 0 ieee, 1 tf32, 2 three tf32 products.
    """
    require_dtype("attention_fwd", q)
    q, k, v = near(q), near(k), near(v)
    (batch, heads, queries, d), keys, dv = q.shape, k.shape[2], v.shape[3]
    out = like_rows(q, dv)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    band = (causal, left, right)
    masks = mask_arguments(
        (batch, heads, queries, keys), mask, bias, key_lengths, key_padding, q_ids, k_ids, prefix, tiles, band
    )
    heavy = is_heavy(masks.flags, softcap)
    tile = fwd_tiles(queries, max(d, dv), q.element_size(), heavy, device_facts(q))
    group = heads // max(k.shape[1], 1)
    mapped = bool(tiles)
    inputs, described = tile_inputs((q, k, v), (tile.block_m, tile.block_n, tile.block_n), tile.described)
    blocks = blocks_of(queries, tile.block_m, TILE_Q, mapped)
    turns = turns_of(batch * heads, keys * (d + dv) * q.element_size() // group, mapped)
    with device_guard(q):
        _attention_fwd_kernel[(blocks * batch * heads,)](
            *inputs, *masks.pointers, *masks.tiles[:2], out, lse, blocks, turns, heads, group, queries, keys, d,
            dv, cdiv(queries, TILE_Q), cdiv(keys, TILE_K), *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            *masks.strides, *masks.tile_strides, tiles[1].shape[1] if mapped else 1, *masks.band, scale, softcap or 1.0,
            **masks.flags, HAS_SOFTCAP=softcap != 0.0, PRECISION=precision_name(precision), DESCRIBED=described,
            TILE_Q=TILE_Q, SPLIT=TILE_K // tile.block_n, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_D=head_block(d), BLOCK_DV=head_block(dv), num_warps=tile.num_warps, num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def aot_cases(arch: int) -> Iterator[Case]:
    """The tiles of usual head dimensions, for a band, a dense mask, and every mask at once; both ways to read rows."""
    yield from cases_of(_attention_fwd_kernel, arch, fwd_tiles)
