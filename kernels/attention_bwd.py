"""Masked attention, backward: dq and dk, dv in one launch, scores recomputed from the logsumexp, no atomics.

Dao et al. 2022 (recomputation). Seven products for each score that is not skipped, against five with atomics: the price
of the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._aot import Case
from ._attention_aot import cases_of, types_of
from ._attention_bwd import _attention_bwd_delta_kernel, delta_of, dkv_tiles, dq_tiles
from ._attention_tiles import (
    TILE_K,
    TILE_Q,
    band_blocks,
    block_at,
    blocks_of,
    bwd_tiles,
    head_block,
    is_heavy,
    like_rows,
    listed_blocks,
    load_rows,
    mask_arguments,
    near,
    place_of,
    precision_name,
    turns_of,
)
from ._launch import cdiv, device_facts, device_guard, require_dtype


@triton.jit(do_not_specialize=["q_blocks", "k_blocks", "q_turns", "k_turns", "BH"])
def _attention_bwd_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bias_ptr, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr,
    k_ids_ptr, prefix_ptr, q_count_ptr, q_list_ptr, k_count_ptr, k_list_ptr, dq_ptr, dk_ptr, dv_ptr, q_blocks,
    k_blocks, q_turns, k_turns, H, GROUP, BH, Sq, Sk, D, DV, NQ, NK,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd, stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_wb, stride_wh, stride_wm, tile_b, tile_h, tile_heads,
    low, high, below, scale, softcap, BAND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WORDS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HAS_MAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The first programs own blocks of queries, the others blocks of keys with all the heads that share them."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    pid = tl.program_id(0)
    if pid < q_blocks * BH:
        place, head = place_of(pid, q_blocks, q_turns)
        b = (head // H).to(tl.int64)
        h = (head % H).to(tl.int64)
        pid_m = q_blocks - 1 - place
        if HAS_MAP:
            row = (b * tile_b * tile_heads + h * tile_h) * NQ
            pid_m = block_at(q_count_ptr, row, place, q_blocks // NQ)
        start_m = pid_m * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr + b * stride_qb + h * stride_qh, start_m, offs_m, offs_d, Sq, D, stride_qm, stride_qd)
        do_rows = do_ptr + b * stride_dob + h * stride_doh
        do = load_rows(do_rows, start_m, offs_m, offs_dv, Sq, DV, stride_dom, stride_dod)
        lse = tl.load(lse_ptr + (b * H + h) * Sq + offs_m, mask=offs_m < Sq, other=0.0)
        delta = tl.load(delta_ptr + (b * H + h) * Sq + offs_m, mask=offs_m < Sq, other=0.0)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        begin, full, rest, end = band_blocks(pid_m * BLOCK_M, BLOCK_M, Sk, low, tl.minimum(high, below), BLOCK_N)
        if HAS_MAP:
            row += pid_m * BLOCK_M // TILE_Q
            q_list_ptr += row * NK
            full, rest = listed_blocks(q_count_ptr, row, TILE_K // BLOCK_N, start_m < Sq)
            begin = 0
            end = rest
        for part in tl.static_range(2):
            dq = dq_tiles(
                dq, q, do, lse, delta, start_m, offs_m, offs_d, offs_dv, begin if part == 0 else full,
                end - (rest - full) if part == 0 else rest, full, 0 if part else rest - full, q_list_ptr,
                k_ptr + b * stride_kb + h // GROUP * stride_kh, v_ptr + b * stride_vb + h // GROUP * stride_vh,
                bias_ptr + b * stride_bb + h * stride_bh if HAS_BIAS else bias_ptr,
                words_ptr + b * stride_wb + h * stride_wh if HAS_WORDS else words_ptr, lengths_ptr, padding_ptr,
                q_ids_ptr, k_ids_ptr, prefix_ptr, b, Sq, Sk, D, DV, stride_kn, stride_kd, stride_vn, stride_vd,
                stride_bm, stride_bn, stride_wm, low, high, below, scale, softcap, part == 0, BAND, HAS_BIAS, HAS_WORDS,
                HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX, HAS_MAP, HAS_SOFTCAP, PRECISION, TILE_K // BLOCK_N,
                BLOCK_N,
            )  # fmt: skip
        at = dq_ptr + b * stride_dqb + h * stride_dqh + offs_m[:, None].to(tl.int64) * stride_dqm
        inside = (offs_m[:, None] < Sq) & (offs_d[None, :] < D)
        tl.store(at + offs_d[None, :] * stride_dqd, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)
    else:
        _dkv_program(
            pid - q_blocks * BH, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bias_ptr, words_ptr, lengths_ptr,
            padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, k_count_ptr, k_list_ptr, dk_ptr, dv_ptr, k_blocks, k_turns,
            H, GROUP, Sq, Sk, D, DV, NQ, NK, stride_dob, stride_doh, stride_dom, stride_dod, stride_qb, stride_qh,
            stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn,
            stride_vd, stride_dkb, stride_dkh, stride_dkn, stride_dkd, stride_dvb, stride_dvh, stride_dvn, stride_dvd,
            stride_bb, stride_bh, stride_bm, stride_bn, stride_wb, stride_wh, stride_wm, tile_b, tile_h, tile_heads,
            low, high, below, scale, softcap, BAND, HAS_BIAS, HAS_WORDS, HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX,
            HAS_MAP, HAS_SOFTCAP, PRECISION, TILE_Q, TILE_K, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip


@triton.jit
def _dkv_program(
    pid, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bias_ptr, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr,
    k_ids_ptr, prefix_ptr, k_count_ptr, k_list_ptr, dk_ptr, dv_ptr, blocks, turns, H, GROUP, Sq, Sk, D, DV,
    NQ, NK, stride_dob, stride_doh, stride_dom, stride_dod, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd, stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_wb, stride_wh, stride_wm, tile_b, tile_h, tile_heads,
    low, high, below, scale, softcap, BAND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WORDS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HAS_MAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one head of k and v."""
    shared_heads = H // GROUP
    place, head = place_of(pid, blocks, turns)
    b = (head // shared_heads).to(tl.int64)
    hk = (head % shared_heads).to(tl.int64)
    pid_n = place
    if HAS_MAP:
        # of the heads that share this one, each of which may have a mask of its own, the first decides
        pid_n = block_at(k_count_ptr, (b * tile_b * tile_heads + hk * GROUP * tile_h) * NK, place, blocks // NK)
    start_n = pid_n * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k = load_rows(k_ptr + b * stride_kb + hk * stride_kh, start_n, offs_n, offs_d, Sk, D, stride_kn, stride_kd)
    v = load_rows(v_ptr + b * stride_vb + hk * stride_vh, start_n, offs_n, offs_dv, Sk, DV, stride_vn, stride_vd)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    # query i sees key j for i + low <= j <= i + reach, so key j is seen by j - reach <= i <= j - low
    begin, full, rest, end = band_blocks(pid_n * BLOCK_N, BLOCK_N, Sq, -tl.minimum(high, below), -low, BLOCK_M)
    for h in range(hk * GROUP, hk * GROUP + GROUP):
        row = 0
        if HAS_MAP:
            row = (b * tile_b * tile_heads + h * tile_h) * NK + pid_n * BLOCK_N // TILE_K
            full, rest = listed_blocks(k_count_ptr, row, TILE_Q // BLOCK_M, start_n < Sk)
            begin = 0
            end = rest
        for part in tl.static_range(2):
            dk, dv = dkv_tiles(
                dk, dv, k, v, start_n, offs_n, offs_d, offs_dv, begin if part == 0 else full,
                end - (rest - full) if part == 0 else rest, full, 0 if part else rest - full,
                k_list_ptr + row * NQ if HAS_MAP else k_list_ptr,
                q_ptr + b * stride_qb + h * stride_qh, do_ptr + b * stride_dob + h * stride_doh,
                lse_ptr + (b * H + h) * Sq, delta_ptr + (b * H + h) * Sq,
                bias_ptr + b * stride_bb + h * stride_bh if HAS_BIAS else bias_ptr,
                words_ptr + b * stride_wb + h * stride_wh if HAS_WORDS else words_ptr, lengths_ptr, padding_ptr,
                q_ids_ptr, k_ids_ptr, prefix_ptr, b, Sq, Sk, D, DV, stride_qm, stride_qd, stride_dom, stride_dod,
                stride_bm, stride_bn, stride_wm, low, high, below, scale, softcap, part == 0, BAND, HAS_BIAS, HAS_WORDS,
                HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX, HAS_MAP, HAS_SOFTCAP, PRECISION, TILE_Q // BLOCK_M,
                BLOCK_M,
            )  # fmt: skip
    at = dk_ptr + b * stride_dkb + hk * stride_dkh + offs_n[:, None].to(tl.int64) * stride_dkn
    inside = offs_n[:, None] < Sk
    tl.store(
        at + offs_d[None, :] * stride_dkd, (dk * scale).to(dk_ptr.dtype.element_ty),
        mask=inside & (offs_d[None, :] < D),
    )  # fmt: skip
    at = dv_ptr + b * stride_dvb + hk * stride_dvh + offs_n[:, None].to(tl.int64) * stride_dvn
    tl.store(at + offs_dv[None, :] * stride_dvd, dv.to(dv_ptr.dtype.element_ty), mask=inside & (offs_dv[None, :] < DV))


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    bias: Tensor | None, key_lengths: Tensor | None, key_padding: Tensor | None, q_ids: Tensor | None,
    k_ids: Tensor | None, prefix: Tensor | None, tiles: Sequence[Tensor], causal: int, left: int, right: int,
    scale: float, softcap: float, precision: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in the layouts of q, k and v.

    Args:
        dout, dlse: gradients of the forward's results; dlse may be missing.
        q, k, v, mask, bias, key_lengths, key_padding, q_ids, k_ids, prefix, tiles: the forward's.
        out, lse: the forward's results.
        causal, left, right, scale, softcap, precision: the forward's.
    """
    require_dtype("attention_bwd", q)
    dout, q, k, v, out = (near(t) for t in (dout, q, k, v, out))
    (batch, heads, queries, d), shared, keys, dv = q.shape, k.shape[1], k.shape[2], v.shape[3]
    grads = tuple(like_rows(t, t.shape[3]) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    size = (batch, heads, queries, keys)
    vectors = (mask, bias, key_lengths, key_padding, q_ids, k_ids, prefix)
    masks = mask_arguments(size, *vectors, tiles, (causal, left, right))
    heavy = is_heavy(masks.flags, softcap)
    tile = bwd_tiles(queries, max(d, dv), q.element_size(), heavy, device_facts(q))
    mapped, group, row_bytes = bool(tiles), heads // shared, (d + dv) * q.element_size()
    q_blocks = blocks_of(queries, tile.block_m, TILE_Q, mapped)
    k_blocks = blocks_of(keys, tile.block_n, TILE_K, mapped)
    q_turns = turns_of(batch * heads, keys * row_bytes // group, mapped)
    k_turns = turns_of(batch * shared, queries * row_bytes * group, mapped)
    with device_guard(q):
        _attention_bwd_kernel[(q_blocks * batch * heads + k_blocks * batch * shared,)](
            dout, q, k, v, lse, delta_of(dout, dlse, out), *masks.pointers, *masks.tiles, *grads, q_blocks, k_blocks,
            q_turns, k_turns, heads, group, batch * heads, queries, keys, d, dv, cdiv(queries, TILE_Q),
            cdiv(keys, TILE_K), *dout.stride(), *q.stride(), *k.stride(), *v.stride(), *grads[0].stride(),
            *grads[1].stride(), *grads[2].stride(), *masks.strides, *masks.tile_strides,
            tiles[1].shape[1] if mapped else 1, *masks.band, scale, softcap or 1.0, **masks.flags,
            HAS_SOFTCAP=softcap != 0.0, PRECISION=precision_name(precision), TILE_Q=TILE_Q, TILE_K=TILE_K,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=head_block(d), BLOCK_DV=head_block(dv),
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return grads


def aot_cases(arch: int) -> Iterator[Case]:
    """The tiles of usual head dimensions, for a band, a dense mask, and every mask at once."""
    yield from cases_of(_attention_bwd_kernel, arch, bwd_tiles)
    for d in (64, 128, 256):
        sizes = {"BLOCK_M": max(16, 4096 // d), "BLOCK_DV": d, "HAS_DLSE": True, "stride_dod": 1, "stride_od": 1}
        yield Case(_attention_bwd_delta_kernel, f"bf16 D={d}", types_of("bf16"), sizes, 4, d == 64)
