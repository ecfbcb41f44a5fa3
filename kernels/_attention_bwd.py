"""One tile of the attention backward, and the programs that sum over tiles of keys (dq) or of queries (dk, dv)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tiles import head_block, load_rows, seen_rows, tile_bias, tile_mask, tile_scores
from ._launch import cdiv


@triton.jit
def bwd_tile(
    q, k, v, do, lse, delta, start_m, start_n, offs_m, offs_n, b, bias_ptr, words_ptr, lengths_ptr, padding_ptr,
    q_ids_ptr, k_ids_ptr, prefix_ptr, Sq, Sk, stride_bm, stride_bn, stride_wm, low, high, below, scale, softcap,
    MASKED: tl.constexpr, BAND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WORDS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(p, gradient of the biased scores, slope of the softcap, ok); p and the gradient are 0 where not allowed.

    The probability is selected, never multiplied by the mask: exp of a masked score minus -inf would be NaN.
    """
    s, slope = tile_scores(q, tl.trans(k), scale, softcap, HAS_SOFTCAP, PRECISION)
    ok = (offs_m[:, None] < Sq) & (offs_n[None, :] < Sk)
    if MASKED:
        ok = tile_mask(
            start_m, offs_m, offs_n, b, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, Sq, Sk,
            stride_wm, low, high, below, BAND, HAS_WORDS, HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tile_bias(bias_ptr, start_m, start_n, offs_m, offs_n, Sq, Sk, stride_bm, stride_bn)
        ok = ok & (bias != float("-inf"))
        s = s + bias
    p = tl.where(ok, tl.exp2((s - lse[:, None]) * 1.4426950408889634), 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = tl.where(ok, p * (dp - delta[:, None]), 0.0)
    return p, ds, slope, ok


@triton.jit
def dq_tiles(
    dq, q, do, lse, delta, start_m, offs_m, offs_d, offs_dv, first, last, jump_at, jump, list_ptr, k_ptr, v_ptr,
    bias_ptr, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, b, Sq, Sk, D, DV, stride_kn,
    stride_kd, stride_vn, stride_vd, stride_bm, stride_bn, stride_wm, low, high, below, scale, softcap,
    MASKED: tl.constexpr, BAND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WORDS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HAS_MAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what blocks first..last of keys give to the gradient of a block of queries, before the scale.

    From ``jump_at`` on blocks are ``jump`` further, here and below.
    """
    for step in range(first, last):
        block = step + tl.where(step >= jump_at, jump, 0)
        if HAS_MAP:
            start = (tl.load(list_ptr + block // SPLIT) // 2 * SPLIT + block % SPLIT) * BLOCK_N
        else:
            start = block * BLOCK_N
        offs_n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, start, offs_n, offs_d, Sk, D, stride_kn, stride_kd)
        v = load_rows(v_ptr, start, offs_n, offs_dv, Sk, DV, stride_vn, stride_vd)
        _, ds, slope, ok = bwd_tile(
            q, k, v, do, lse, delta, start_m, start, offs_m, offs_n, b, bias_ptr, words_ptr, lengths_ptr, padding_ptr,
            q_ids_ptr, k_ids_ptr, prefix_ptr, Sq, Sk, stride_bm, stride_bn, stride_wm, low, high, below, scale, softcap,
            MASKED, BAND, HAS_BIAS, HAS_WORDS, HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        if MASKED:
            k = seen_rows(k, ok, 0)
        if HAS_SOFTCAP:
            ds = tl.where(ok, ds * slope, 0.0)
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    return dq


@triton.jit
def dkv_tiles(
    dk, dv, k, v, start_n, offs_n, offs_d, offs_dv, first, last, jump_at, jump, list_ptr, q_ptr, do_ptr, lse_ptr,
    delta_ptr, bias_ptr, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, b, Sq, Sk, D, DV,
    stride_qm, stride_qd, stride_dom, stride_dod, stride_bm, stride_bn, stride_wm, low, high, below, scale, softcap,
    MASKED: tl.constexpr, BAND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WORDS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HAS_MAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds what blocks first..last of queries of one head give to the gradients of a block of keys and values."""
    for step in range(first, last):
        block = step + tl.where(step >= jump_at, jump, 0)
        if HAS_MAP:
            start = (tl.load(list_ptr + block // SPLIT) // 2 * SPLIT + block % SPLIT) * BLOCK_M
        else:
            start = block * BLOCK_M
        offs_m = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, start, offs_m, offs_d, Sq, D, stride_qm, stride_qd)
        do = load_rows(do_ptr, start, offs_m, offs_dv, Sq, DV, stride_dom, stride_dod)
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < Sq, other=0.0)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < Sq, other=0.0)
        p, ds, slope, ok = bwd_tile(
            q, k, v, do, lse, delta, start, start_n, offs_m, offs_n, b, bias_ptr, words_ptr, lengths_ptr, padding_ptr,
            q_ids_ptr, k_ids_ptr, prefix_ptr, Sq, Sk, stride_bm, stride_bn, stride_wm, low, high, below, scale, softcap,
            MASKED, BAND, HAS_BIAS, HAS_WORDS, HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        if MASKED:
            q = seen_rows(q, ok, 1)
        if HAS_SOFTCAP:
            ds = tl.where(ok, ds * slope, 0.0)
        dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _attention_bwd_delta_kernel(
    do_ptr, out_ptr, dlse_ptr, delta_ptr, H, Sq, DV, stride_dob, stride_doh, stride_dom, stride_dod, stride_ob,
    stride_oh, stride_om, stride_od, stride_lb, stride_lh, stride_lm, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = sum over columns of dout * out, minus the gradient of the logsumexp."""
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    start = tl.program_id(1) * BLOCK_M
    offs_m = start + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    do = load_rows(do_ptr + b * stride_dob + h * stride_doh, start, offs_m, offs_dv, Sq, DV, stride_dom, stride_dod)
    out = load_rows(out_ptr + b * stride_ob + h * stride_oh, start, offs_m, offs_dv, Sq, DV, stride_om, stride_od)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        at = dlse_ptr + b * stride_lb + h * stride_lh + offs_m.to(tl.int64) * stride_lm
        delta -= tl.load(at, mask=offs_m < Sq, other=0.0)
    tl.store(delta_ptr + (b * H + h) * Sq + offs_m, delta, mask=offs_m < Sq)


def delta_of(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """[B, H, Sq] float32: what every program of the backward needs of dout, out and dlse."""
    batch, heads, queries, dv = out.shape
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    block_dv = head_block(dv)
    block_m = max(16, 4096 // block_dv)
    strides = (0, 0, 0) if dlse is None else dlse.stride()
    _attention_bwd_delta_kernel[(batch * heads, cdiv(queries, block_m))](
        dout, out, dlse, delta, heads, queries, dv, *dout.stride(), *out.stride(), *strides, HAS_DLSE=dlse is not None,
        BLOCK_M=block_m, BLOCK_DV=block_dv, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return delta
