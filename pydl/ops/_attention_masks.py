"""The masks of attention: checked arguments, and which keys a query may attend to in composed torch operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CAUSAL = {None: 0, "top_left": 1, "bottom_right": 2}
_INTEGERS = (torch.int32, torch.int64)

Ids = Tensor | tuple[Tensor, Tensor]
Window = tuple[int | None, int | None]


class Masks(NamedTuple):
    """Tensor masks as the raw operators take them; None for a kind that is not there."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    key_lengths: Tensor | None = None
    key_padding: Tensor | None = None
    q_ids: Tensor | None = None
    k_ids: Tensor | None = None
    prefix: Tensor | None = None


class Band(NamedTuple):
    """Masks that are numbers: causal 0 none, 1 top-left, 2 bottom-right; keys left and right, -1 for all of them."""

    causal: int = 0
    left: int = -1
    right: int = -1


def check_tensors(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, H, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] of one dtype and device, H a multiple of Hk."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: argument {name!r} must be a Tensor, got {type(t).__name__}")
        if t.dim() != 4:
            raise RuntimeError(f"{op}: argument {name!r} must have shape [B, H, S, D], got {list(t.shape)}")
        if t.dtype != q.dtype or t.device != q.device:
            raise RuntimeError(f"{op}: q, k and v must have one dtype and device, got {name} {t.dtype} on {t.device}")
    if not q.is_floating_point():
        raise RuntimeError(f"{op}: argument 'q' must be floating point, got {q.dtype}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise RuntimeError(
            f"{op}: q [B, H, Sq, D], k [B, Hk, Sk, D] and v [B, Hk, Sk, Dv] must agree, got {list(q.shape)}, "
            f"{list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise RuntimeError(f"{op}: the {q.shape[1]} heads of q must be a multiple of the {k.shape[1]} heads of k and v")


def check_masks(
    op: str,
    size: Sequence[int],
    device: torch.device,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    key_padding: Tensor | None,
    segment_ids: Ids | None,
    prefix_length: int | Tensor | None,
    causal: str | None,
) -> Masks:
    """The tensor masks for scores of shape ``size`` = [B, H, Sq, Sk]; mask and bias get all four dimensions."""
    b, _, queries, keys = size
    if mask is not None:
        mask = _broadcastable(op, "mask", mask, size, device)
        if mask.dtype != torch.bool:
            raise RuntimeError(f"{op}: argument 'mask' must be bool (True = attend), got {mask.dtype}; see 'bias'")
    if bias is not None:
        bias = _broadcastable(op, "bias", bias, size, device)
        if not bias.is_floating_point():
            raise RuntimeError(f"{op}: argument 'bias' must be floating point, got {bias.dtype}; see 'mask'")
    if key_lengths is not None:
        key_lengths = _vector(op, "key_lengths", key_lengths, (b,), device)
    if key_padding is not None:
        _vector(op, "key_padding", key_padding, (b, keys), device, torch.bool)
    q_ids = k_ids = None
    if segment_ids is not None:
        if isinstance(segment_ids, Tensor):
            segment_ids = (segment_ids, segment_ids)
        q_ids = _vector(op, "segment_ids", segment_ids[0], (b, queries), device)
        k_ids = _vector(op, "segment_ids", segment_ids[1], (b, keys), device)
    prefix = None
    if prefix_length is not None:
        if causal is None:
            raise ValueError(f"{op}: argument 'prefix_length' lifts a causal mask: give 'causal' too")
        if isinstance(prefix_length, Tensor):
            prefix = _vector(op, "prefix_length", prefix_length, (b,), device)
        else:
            prefix = torch.full((b,), _int(op, "prefix_length", prefix_length), dtype=torch.int64, device=device)
    return Masks(mask, bias, key_lengths, key_padding, q_ids, k_ids, prefix)


def check_band(op: str, causal: str | None, window: Window | None) -> Band:
    """The masks that are numbers."""
    if causal not in CAUSAL:
        raise ValueError(f"{op}: argument 'causal' must be None, 'top_left' or 'bottom_right', got {causal!r}")
    left = right = -1
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise TypeError(f"{op}: argument 'window' must be (left, right), each an int or None, got {window!r}")
        left, right = (-1 if side is None else _int(op, "window", side) for side in window)
        if min(-1 if w is None else w for w in window) < -1:
            raise ValueError(f"{op}: argument 'window' must not be negative, got {window!r}")
    return Band(CAUSAL[causal], left, right)


def _int(op: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: argument {name!r} must be an int, got {value!r}")
    return value  # type: ignore[return-value]


def _broadcastable(op: str, name: str, value: Tensor, size: Sequence[int], device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: argument {name!r} must be a Tensor, got {type(value).__name__}")
    fits = value.dim() <= 4 and all(n in (1, m) for n, m in zip(reversed(value.shape), reversed(size)))
    if not fits or value.device != device:
        raise RuntimeError(
            f"{op}: argument {name!r} must broadcast to [B, H, Sq, Sk] = {list(size)} on {device}, got "
            f"{list(value.shape)} on {value.device}"
        )
    return value if value.dim() == 4 else value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))


def _vector(
    op: str, name: str, value: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: argument {name!r} must be a Tensor, got {type(value).__name__}")
    right = value.dtype == dtype if dtype else value.dtype in _INTEGERS
    if tuple(value.shape) != shape or value.device != device or not right:
        wanted = str(dtype) if dtype else "int32 or int64"
        raise RuntimeError(
            f"{op}: argument {name!r} must be {wanted} of shape {list(shape)} on {device}, got {value.dtype} "
            f"{list(value.shape)} on {value.device}"
        )
    return value


def allowed(masks: Masks, band: Band, rows: range, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Which keys the queries of ``rows`` may attend to, bool broadcastable to [B, H, rows, Sk]; None for all."""
    i = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
    j = torch.arange(keys, device=device).unsqueeze(0)
    own = i + (keys - queries)
    terms: list[Tensor] = []
    if band.causal:
        below = j <= (i if band.causal == 1 else own)
        if masks.prefix is not None:
            below = below | (j < masks.prefix.view(-1, 1, 1, 1))
        terms.append(below)
    if band.left >= 0:
        terms.append(j >= own - band.left)
    if band.right >= 0:
        terms.append(j <= own + band.right)
    if masks.mask is not None:
        terms.append(rows_of(masks.mask, rows))
    if masks.bias is not None:
        terms.append(~rows_of(masks.bias, rows).detach().isneginf())
    if masks.key_lengths is not None:
        terms.append(j < masks.key_lengths.view(-1, 1, 1, 1))
    if masks.key_padding is not None:
        terms.append(masks.key_padding[:, None, None, :])
    if masks.q_ids is not None and masks.k_ids is not None:
        terms.append((masks.q_ids[:, rows.start : rows.stop, None] == masks.k_ids[:, None, :]).unsqueeze(1))
    if not terms:
        return None
    ok = terms[0]
    for term in terms[1:]:
        ok = ok & term
    return ok.reshape((1,) * (4 - ok.dim()) + tuple(ok.shape))


def rows_of(value: Tensor, rows: range) -> Tensor:
    """The rows of a [., ., Sq or 1, .] tensor."""
    return value if value.shape[2] == 1 else value[:, :, rows.start : rows.stop]
