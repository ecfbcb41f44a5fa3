"""Attention in composed torch operations: the fallback, and the second derivative by recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydl.ops._attention_masks import Band, Masks, allowed, check_band, check_masks, rows_of

# scores that one step of the second derivative holds at a time
_CHUNK_SCORES = 1 << 22


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    band: Band,
    scale: float,
    softcap: float,
    rows: range | None = None,
    queries: int | None = None,
    wide: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in memory B H rows Sk: of all of q, or of the queries ``rows`` of ``queries``, which q then holds."""
    queries = q.shape[2] if queries is None else queries
    rows = range(queries) if rows is None else rows
    wide = wide or (torch.float64 if q.dtype is torch.float64 else torch.float32)
    group = q.shape[1] // k.shape[1]
    ok = allowed(masks, band, rows, queries, k.shape[2], q.device)
    qw, kw, vw = q.to(wide), k.to(wide), v.to(wide)
    if ok is not None:
        # what no query sees, and a query that sees nothing, may hold NaN
        seen = ok.any(2, keepdim=True).any(1, keepdim=True).transpose(2, 3)
        kw, vw = torch.where(seen, kw, 0.0), torch.where(seen, vw, 0.0)
        qw = torch.where(ok.any(3, keepdim=True), qw, 0.0)
    if group > 1:
        kw, vw = kw.repeat_interleave(group, 1), vw.repeat_interleave(group, 1)
    s = scale * (qw @ kw.transpose(2, 3))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if masks.bias is not None:
        bias = rows_of(masks.bias, rows).to(wide)
        s = s + torch.where(bias.detach().isneginf(), 0.0, bias)
    if ok is not None:
        s = s.masked_fill(~ok, float("-inf"))
    if s.shape[3] == 0:
        return s @ vw, s.sum(3) - float("inf")
    top = s.detach().amax(3, keepdim=True)
    base = torch.where(top.isneginf(), 0.0, top)
    e = torch.exp(s - base)
    total = e.sum(3, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), total.log() + base).squeeze(3)
    return ((e / total) @ vw).to(q.dtype), lse


def naive_attention(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
    """The yardstick for errors: torch's own attention of plain calls in full precision, else every intermediate result
    in q's own dtype.
    """
    softcap, scale, lse = (arguments.pop(name, None) for name in ("softcap", "scale", "return_lse"))
    window, causal = arguments.pop("window", None), arguments.get("causal")
    size = (*q.shape[:3], k.shape[2])
    names = ("mask", "bias", "key_lengths", "key_padding", "segment_ids", "prefix_length", "causal")
    masks = check_masks("naive_attention", size, q.device, *(arguments.get(name) for name in names))
    band = check_band("naive_attention", causal, window)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide = q.dtype in (torch.float32, torch.float64)
    if wide and all(m is None for m in masks) and band in (Band(), Band(1)) and not softcap and not lse:
        shared = q.shape[1] != k.shape[1]
        own = torch.nn.functional.scaled_dot_product_attention
        return own(q, k, v, is_causal=band.causal == 1, scale=scale, enable_gqa=shared)
    out, sums = composed(q, k, v, masks, band, scale, softcap or 0.0, wide=q.dtype)
    return (out, sums.to(torch.float64 if q.dtype is torch.float64 else torch.float32)) if lse else out


def attention_second(
    along: Sequence[Tensor | None],
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    band: Band,
    scale: float,
    softcap: float,
) -> list[Tensor | None]:
    """Gradients of sum(along * first gradient) with respect to dout, dlse, q, k, v and bias.

    The first gradients (dq, dk, dv, dbias) are recomputed by torch's autograd from the composed operations with their
    graph, a range of query rows at a time, so that memory stays B H rows Sk. Slow:
    meant for penalties on gradients, not for every step. A third derivative needs ``create_graph`` all the way.
    """
    again = torch.is_grad_enabled()
    inputs: list[Tensor | None] = [dout, dlse, q, k, v, masks.bias]
    sums: list[Tensor | None] = [None] * 6
    step = max(1, _CHUNK_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        rows = range(start, min(start + step, q.shape[2]))
        with torch.enable_grad():
            leaves = [
                None if t is None else t if again and t.requires_grad else t.detach().requires_grad_() for t in inputs
            ]
            given = _chunk_gradients(leaves, along, masks, band, scale, softcap, rows, q.shape[2], again)
        sums = [new if old is None else old if new is None else old + new for old, new in zip(sums, given)]
    return sums


def _chunk_gradients(
    leaves: list[Any],
    along: Sequence[Tensor | None],
    masks: Masks,
    band: Band,
    scale: float,
    softcap: float,
    rows: range,
    queries: int,
    again: bool,
) -> list[Tensor | None]:
    dout, dlse, q, k, v, bias = leaves
    own = slice(rows.start, rows.stop)
    out, lse = composed(q[:, :, own], k, v, masks._replace(bias=bias), band, scale, softcap, rows, queries)
    total = (out * dout[:, :, own]).sum()
    if dlse is not None:
        total = total + torch.where(lse.isinf(), 0.0, lse * dlse[:, :, own]).sum()
    wanted = [q, k, v, *([] if bias is None else [bias])]
    first = torch.autograd.grad(total, wanted, create_graph=True)
    product = sum((g * d).sum() for g, d in zip(first, along) if d is not None)
    if not isinstance(product, Tensor) or not product.requires_grad:
        return [None] * 6
    inputs = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(product, inputs, create_graph=again, allow_unused=True))
    return [None if t is None else next(found) for t in leaves]
