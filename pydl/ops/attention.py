"""Attention in which the mask is data: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Decision, Family, choose
from pydl.ops._attention_composed import composed
from pydl.ops._attention_masks import Band, Ids, Masks, Window, check_band, check_masks, check_tensors
from pydl.ops._attention_ops import attention_fwd, attention_map

__all__ = ["attention", "attention_mask_map", "merge_attention", "scaled_dot_product_attention"]

# a map is not a tensor, and merging is torch's own operations: their tests stand beside those of the kernels
UNGRADED = ("attention_mask_map", "merge_attention")

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_RAW = ("attention_map", "attention_fwd", "attention_bwd", "attention_bias_bwd")
_DTYPES = {"cpu": _FLOATS, "triton": (torch.float32, torch.float16, torch.bfloat16)}
_FAMILY, _SDPA = (
    Family(name, ops=_RAW, order={"cpu": ("cpu",), "cuda": ("triton",)}, dtypes=_DTYPES)
    for name in ("attention", "scaled_dot_product_attention")
)
_PLAIN = "no mask but a causal one: torch's own attention is the best known (docs/benchmarks.md)"
_SMALL = "a small call on the CPU, where torch's is 1 to 3 times as fast: there is little to skip"
_LARGEST_HEAD = 256
_PRECISIONS = {"highest": 0, "high": 2, "medium": 1}


class AttentionMap:
    """Which tiles of scores are empty, partial or full, as :func:`attention_mask_map` found them on the device.

    It belongs to one backend, one [B, Sq, Sk] and one set of masks; the calls that share them can share it.
    """

    def __init__(self, decision: Decision, size: tuple[int, int, int], band: Band, tensors: list[Tensor]) -> None:
        self.backend, self.size, self.band, self.tensors = decision.backend, size, band, tensors


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: str | None = None,
    window: Window | None = None,
    key_lengths: Tensor | None = None,
    key_padding: Tensor | None = None,
    segment_ids: Ids | None = None,
    prefix_length: int | Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    mask_map: AttentionMap | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k' + bias) v over the keys that every given mask allows, in one call, with no buffer Sq x Sk.

    Args:
        q: [B, H, Sq, D], floating point, any strides (the transpose of [B, Sq, H, D] is not copied); D up to 256.
        k: [B, Hk, Sk, D]; H is a multiple of Hk, and H / Hk query heads in a row share a head of k and v.
        v: [B, Hk, Sk, Dv].
        mask: bool, broadcastable to [B, H, Sq, Sk]; True = attend. Dimensions of size 1 are never expanded.
        bias: floating, broadcastable to [B, H, Sq, Sk], added to the scores; has a gradient in its own shape. -inf
            masks.
        causal: "top_left": key j <= query i; "bottom_right": j <= i + Sk - Sq.
        window: (left, right): how many keys before and behind its own position i + Sk - Sq a query sees; None for all.
        key_lengths: int [B]; keys from there on are masked.
        key_padding: bool [B, Sk]; True = attend.
        segment_ids: int [B, S], or a pair [B, Sq], [B, Sk]: a query sees keys with its own number.
        prefix_length: int or int [B]: keys before it escape the causal mask (and no other).
        softcap: scores become softcap * tanh(score / softcap) before the bias.
        scale: default 1 / sqrt(D).
        return_lse: also return the logsumexp of the masked scores, differentiable.
        mask_map: tiles from :func:`attention_mask_map` for the same masks, to be shared by several calls.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, and with return_lse also lse [B, H, Sq], float32 (float64 for float64).

    Raises:
        TypeError: an argument of another type.
        ValueError: a value out of range.
        RuntimeError: shapes, dtypes or devices that do not agree; the message names the argument.

    A query without an allowed key gives 0, lse -inf, and gradients 0. A key that no query of its batch item may see can
    hold anything, NaN included. Sums are float32 (float64 for float64); the same bits on every run; nothing waits for a
    GPU. Tiles in which everything is masked are skipped, tiles in which nothing is are not looked at again. The second
    derivative is recomputed in composed torch operations, a range of queries at a time.

    Source: Vaswani et al. 2017; online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867); tiling and
    recomputation: Dao et al. 2022 (arXiv 2205.14135).
    """
    op = "attention"
    check_tensors(op, q, k, v)
    size = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    band = check_band(op, causal, window)
    masks = check_masks(op, size, q.device, mask, bias, key_lengths, key_padding, segment_ids, prefix_length, causal)
    plain = not return_lse and not softcap and all(m is None for m in masks) and _is_plain(band, size)
    decision = choose(_FAMILY, q, _declined(q, v), _PLAIN if plain else "")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if decision.backend == "torch":
        if plain:
            return _torch(q, k, v, None, 0.0, band.causal != 0, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out, lse = composed(q, k, v, masks, band, scale, softcap or 0.0)
        return (out, lse) if return_lse else out
    tiles = _tiles(decision, masks, band, size) if mask_map is None else _given(op, mask_map, decision, band, size)
    out, lse = _run(decision, q, k, v, masks, tiles, band, scale, softcap or 0.0)
    return (out, lse) if return_lse else out


def attention_mask_map(
    batch: int,
    q_length: int,
    k_length: int,
    *,
    mask: Tensor | None = None,
    causal: str | None = None,
    window: Window | None = None,
    key_lengths: Tensor | None = None,
    key_padding: Tensor | None = None,
    segment_ids: Ids | None = None,
    prefix_length: int | Tensor | None = None,
) -> AttentionMap:
    """The tile map of a set of masks, built once on the device and shared by the calls of several layers.

    Args:
        batch: B.
        q_length: Sq.
        k_length: Sk.
        mask: as in :func:`attention`, as are all that follow. At least one of them is a tensor.
        causal: likewise.
        window: likewise.
        key_lengths: likewise.
        key_padding: likewise.
        segment_ids: likewise.
        prefix_length: likewise.

    Returns:
        AttentionMap, for ``attention(..., mask_map=...)`` with the same masks.

    Raises:
        ValueError: no tensor among the masks: there is nothing to build.
        RuntimeError: shapes that do not agree.
    """
    op = "attention_mask_map"
    band = check_band(op, causal, window)
    given = [mask, key_lengths, key_padding, *(segment_ids if isinstance(segment_ids, tuple) else [segment_ids])]
    tensors = [t for t in (*given, prefix_length) if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError(f"{op}: a mask, key_lengths, key_padding, segment_ids or prefix_length tensor must be given")
    heads = mask.shape[1] if mask is not None and mask.dim() == 4 else 1
    size = (batch, heads, q_length, k_length)
    masks = check_masks(
        op, size, tensors[0].device, mask, None, key_lengths, key_padding, segment_ids, prefix_length, causal
    )
    like = torch.empty(0, dtype=torch.float32, device=tensors[0].device)
    decision = choose(_FAMILY, like)
    found = _build(decision, masks, band, size) if decision.backend != "torch" else []
    return AttentionMap(decision, (batch, q_length, k_length), band, found)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from results over parts of them, for keys that lie on several devices or arrive late.

    Args:
        outs: each [B, H, Sq, Dv], of one dtype.
        lses: each [B, H, Sq], the logsumexp that ``attention(..., return_lse=True)`` gave with it.

    Returns:
        out [B, H, Sq, Dv] in the dtype of the parts and lse [B, H, Sq], as one call over all keys gives them.
        Differentiable. A query that no part had a key for gives 0 and -inf.

    Raises:
        ValueError: no part, or another number of logsumexps.
        RuntimeError: shapes that do not agree.

    Source: the associative form of the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).
    """
    op = "merge_attention"
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{op}: argument 'lses' must have one entry for each of outs, got {len(lses)} and {len(outs)}")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise RuntimeError(
                f"{op}: outs must be [B, H, Sq, Dv] and lses [B, H, Sq], got {list(out.shape)} and {list(lse.shape)} "
                f"where the first is {list(outs[0].shape)}"
            )
    sums = torch.stack(list(lses))
    top = sums.detach().amax(0)
    base = torch.where(top.isneginf(), 0.0, top)
    weights = torch.exp(sums - base)
    total = weights.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    merged = sum((w / total).unsqueeze(-1) * out for w, out in zip(weights, outs, strict=True))
    return merged.to(outs[0].dtype), torch.where(empty, float("-inf"), total.log() + base)  # type: ignore[union-attr]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, in which a mask saves time instead of costing it.

    Args:
        query: [N, ..., H, L, E].
        key: [N, ..., Hk, S, E].
        value: [N, ..., Hk, S, Ev].
        attn_mask: bool (True = attend) or float of the query's dtype, added to the scores; broadcastable to
            [N, ..., H, L, S]. A float mask has a gradient in its own shape.
        dropout_p: above 0 the call goes to torch.
        is_causal: key j <= query i; together with attn_mask the call goes to torch.
        scale: default 1 / sqrt(E).
        enable_gqa: whether H may be a multiple of Hk.

    Returns:
        [N, ..., H, L, Ev].

    Raises:
        TypeError: query, key or value is no tensor.
        RuntimeError: what torch refuses.

    Calls without attn_mask, with dropout, or of other than three or four dimensions go to torch, and so do small ones
    on the CPU. A query without an allowed key gives 0.
    """
    declined = _sdpa_declined(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    best = _PLAIN if attn_mask is None else ""
    if not best and not declined and query.is_cpu and _is_small(query.shape, key.shape, value.shape, attn_mask):
        best = _SMALL
    decision = choose(_SDPA, query, declined, best)
    if decision.backend == "torch":
        return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    q, k, v = (t if t.dim() == 4 else t.unsqueeze(0) for t in (query, key, value))
    check_tensors("scaled_dot_product_attention", q, k, v)
    size = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    masks = check_masks(
        "scaled_dot_product_attention",
        size,
        q.device,
        attn_mask if is_bool else None,
        None if is_bool else attn_mask,
        *(None,) * 5,
    )
    band = Band(int(is_causal))
    tiles = _tiles(decision, masks, band, size)
    out, _ = _run(decision, q, k, v, masks, tiles, band, q.shape[3] ** -0.5 if scale is None else float(scale), 0.0)
    return out if query.dim() == 4 else out.squeeze(0)


_torch = torch.nn.functional.scaled_dot_product_attention


def _sdpa_declined(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> str:
    """Why a call of torch's own signature is left to torch, be it valid or not; empty if it is not."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"scaled_dot_product_attention: argument {name!r} must be a Tensor, got {type(t).__name__}")
    qs, ks, vs = query.shape, key.shape, value.shape
    if not len(qs) == len(ks) == len(vs) or len(qs) not in (3, 4):
        return "other than three or four dimensions are left to torch"
    if dropout_p > 0.0:
        return "dropout is left to torch"
    if attn_mask is not None and (is_causal or not _same_kind(query, attn_mask)):
        return "a mask beside is_causal, or of another dtype or device, is left to torch"
    if qs[:-3] != ks[:-3] or not enable_gqa and qs[-3] != ks[-3]:
        return "broadcast batch dimensions are left to torch"
    return _declined(query, value)


def _same_kind(query: Tensor, attn_mask: Any) -> bool:
    fits = isinstance(attn_mask, Tensor) and attn_mask.dim() <= query.dim() and attn_mask.device == query.device
    return fits and attn_mask.dtype in (torch.bool, query.dtype)


def _is_small(q: torch.Size, k: torch.Size, v: torch.Size, mask: Any) -> bool:
    """Whether a map of tiles costs more than it saves: one block of queries and two of keys, or little work.

    Measured with masks of triangles and of lengths, two threads: 0.3 to 1.0 of torch's speed below, 0.95 to 1.3 above.
    torch composes the gradient of a mask from single operations, which is slower at every size.
    """
    queries, keys = q[-2], k[-2]
    work = q[:-2].numel() * max(queries, 16) * keys * (q[-1] + v[-1])
    return not mask.requires_grad and (max(queries, keys) <= 128 or work < 2**24)


def _declined(q: Tensor, v: Tensor) -> str:
    largest = max(q.shape[-1], v.shape[-1])
    return f"head dimension {largest} is above {_LARGEST_HEAD}" if largest > _LARGEST_HEAD else ""


def _is_plain(band: Band, size: tuple[int, ...]) -> bool:
    return band.left < 0 and band.right < 0 and (band.causal < 2 or size[2] == size[3])


def _tiles(decision: Decision, masks: Masks, band: Band, size: tuple[int, ...]) -> list[Tensor]:
    """The tile map for masks that are tensors; bands alone are known without one."""
    kinds = (masks.mask, masks.key_lengths, masks.key_padding, masks.q_ids, masks.prefix)
    return _build(decision, masks, band, size) if any(m is not None for m in kinds) else []


def _build(decision: Decision, masks: Masks, band: Band, size: tuple[int, ...]) -> list[Tensor]:
    batch, _, queries, keys = size
    tensors = masks._replace(bias=None)
    return list(attention_map(decision, tensors[0], *tensors[2:], batch, queries, keys, *band))


def _given(op: str, mask_map: AttentionMap, decision: Decision, band: Band, size: tuple[int, ...]) -> list[Tensor]:
    if not isinstance(mask_map, AttentionMap):
        raise TypeError(f"{op}: argument 'mask_map' must come from attention_mask_map, got {type(mask_map).__name__}")
    here = (decision.backend, (size[0], *size[2:]), band)
    if (mask_map.backend, mask_map.size, mask_map.band) != here:
        raise RuntimeError(
            f"{op}: argument 'mask_map' was built for {mask_map.backend}, [B, Sq, Sk] = {list(mask_map.size)} and "
            f"{mask_map.band}; the call has {here[0]}, {list(here[1])} and {here[2]}"
        )
    return mask_map.tensors


@torch.compiler.assume_constant_result
def _precision() -> int:
    """How float32 products are computed, as torch is told to: 0 exactly, 1 tf32, 2 three tf32 products."""
    return _PRECISIONS[torch.get_float32_matmul_precision()]


def _run(
    decision: Decision,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    tiles: list[Tensor],
    band: Band,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = attention_fwd(decision, q, k, v, *masks, tiles, *band, scale, softcap, _precision())
    return out
