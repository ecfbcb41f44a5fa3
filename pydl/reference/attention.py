"""Masked attention in NumPy, from its definition: softmax over the allowed keys of each query.

Computed in extended precision, returned in float64: the float64 kernels are no worse than a float64 oracle would be.

Source: Vaswani et al., Attention is all you need, 2017; the masks are predicates on (batch, head, query, key).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pydl.reference._spec import Case, Spec

Ids = np.ndarray | tuple[np.ndarray, np.ndarray]


def allowed(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    *,
    mask: np.ndarray | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: np.ndarray | None = None,
    key_padding: np.ndarray | None = None,
    segment_ids: Ids | None = None,
    prefix_length: int | np.ndarray | None = None,
) -> np.ndarray:
    """Whether each query may attend to each key: bool [batch, heads, queries, keys]."""
    i, j = np.arange(queries)[:, None], np.arange(keys)[None, :]
    own = i + keys - queries
    ok = np.ones((batch, heads, queries, keys), dtype=bool)
    if mask is not None:
        ok &= mask
    if causal is not None:
        below = np.broadcast_to(j <= (i if causal == "top_left" else own), (batch, queries, keys))
        if prefix_length is not None:
            below = below | (j < np.broadcast_to(prefix_length, (batch,))[:, None, None])
        ok &= below[:, None]
    left, right = (None, None) if window is None else window
    if left is not None:
        ok &= j >= own - left
    if right is not None:
        ok &= j <= own + right
    if key_lengths is not None:
        ok &= j[None, None] < np.asarray(key_lengths)[:, None, None, None]
    if key_padding is not None:
        ok &= key_padding[:, None, None, :]
    if segment_ids is not None:
        q_ids, k_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        ok &= q_ids[:, None, :, None] == k_ids[:, None, None, :]
    return ok


def _softmax(s: np.ndarray, ok: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [.., queries, keys], 0 in rows without an allowed key, and the logsumexp, -inf there."""
    s = np.where(ok, s, -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    base = np.where(np.isneginf(top), 0.0, top)
    e = np.exp(s - base)
    total = e.sum(-1, keepdims=True)
    p = np.divide(e, total, out=np.zeros_like(e), where=total != 0)
    with np.errstate(divide="ignore"):
        return p, (np.log(total) + base)[..., 0]


class _Parts:
    """What forward and gradient share: scores, probabilities, and which keys are read."""

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: Any, softcap: Any, scale: Any, masks: Any):
        b, h, sq, d = q.shape
        q, k, v = (np.asarray(t, np.longdouble) for t in (q, k, v))
        self.group = h // k.shape[1] if k.shape[1] else 1
        ok = allowed(b, h, sq, k.shape[2], **masks)
        if bias is not None:
            ok = ok & ~np.isneginf(bias)
        # a key that no query may see can hold anything
        seen = ok.any((1, 2), keepdims=True).swapaxes(2, 3)
        self.q = np.where(ok.any(-1, keepdims=True), q, 0.0)
        self.k, self.v = (np.repeat(np.where(seen, t, 0.0), self.group, axis=1) for t in (k, v))
        self.scale = 1 / np.sqrt(np.longdouble(d)) if scale is None else scale
        raw = self.scale * (self.q @ self.k.swapaxes(-1, -2))
        self.cap = np.tanh(raw / softcap) if softcap else None
        s = softcap * self.cap if softcap else raw
        s = s if bias is None else s + np.where(np.isneginf(bias), 0.0, bias)
        self.p, self.lse = _softmax(s, ok)
        self.out = self.p @ self.v


def attention(
    q, k, v, *, mask=None, bias=None, causal=None, window=None, key_lengths=None, key_padding=None, segment_ids=None,
    prefix_length=None, softcap=None, scale=None, return_lse=False,
):  # fmt: skip
    """Output [B, H, Sq, Dv], and with return_lse the logsumexp [B, H, Sq]."""
    masks = _masks(mask, causal, window, key_lengths, key_padding, segment_ids, prefix_length)
    parts = _Parts(q, k, v, bias, softcap, scale, masks)
    out, lse = (t.astype(np.float64) for t in (parts.out, parts.lse))
    return (out, lse) if return_lse else out


def _masks(mask, causal, window, key_lengths, key_padding, segment_ids, prefix_length) -> dict[str, Any]:
    return {
        "mask": mask,
        "causal": causal,
        "window": window,
        "key_lengths": key_lengths,
        "key_padding": key_padding,
        "segment_ids": segment_ids,
        "prefix_length": prefix_length,
    }


def attention_grad(
    dout, q, k, v, *, mask=None, bias=None, causal=None, window=None, key_lengths=None, key_padding=None,
    segment_ids=None, prefix_length=None, softcap=None, scale=None, return_lse=False, dlse=None,
):  # fmt: skip
    """Gradients (dq, dk, dv) and, if there is a bias, dbias in its own shape."""
    masks = _masks(mask, causal, window, key_lengths, key_padding, segment_ids, prefix_length)
    parts = _Parts(q, k, v, bias, softcap, scale, masks)
    dp = dout @ parts.v.swapaxes(-1, -2)
    delta = (dout * parts.out).sum(-1, keepdims=True)
    ds = parts.p * (dp - delta + (0.0 if dlse is None else dlse[..., None]))
    dbias = None if bias is None else _sum_to(ds, bias.shape)
    ds = ds if parts.cap is None else ds * (1.0 - parts.cap**2)
    dq = parts.scale * (ds @ parts.k)
    dk, dv = parts.scale * (ds.swapaxes(-1, -2) @ parts.q), parts.p.swapaxes(-1, -2) @ dout
    b, h, sk, _ = dk.shape
    dk, dv = (t.reshape(b, h // parts.group, parts.group, sk, t.shape[-1]).sum(2) for t in (dk, dv))
    return tuple(t.astype(np.float64) for t in (dq, dk, dv, *([] if dbias is None else [dbias])))


def _sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    full = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(a for a, n in enumerate(full) if n == 1 and x.shape[a] != 1)
    return x.sum(axes, keepdims=True).reshape(shape)


def scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Torch's signature; three or four dimensions, no dropout."""
    return attention(*_lifted(q, k, v), **_named(attn_mask, is_causal, scale)).reshape(*q.shape[:-1], v.shape[-1])


def scaled_dot_product_attention_grad(
    dout, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Gradients of q, k, v and a floating attn_mask."""
    given = (q, k, v) if attn_mask is None or attn_mask.dtype == bool else (q, k, v, attn_mask)
    found = attention_grad(*_lifted(dout, q, k, v), **_named(attn_mask, is_causal, scale))
    return tuple(g.reshape(t.shape) for g, t in zip(found, given, strict=True))


def _lifted(*tensors: np.ndarray) -> list[np.ndarray]:
    return [t if t.ndim == 4 else t[None] for t in tensors]


def _named(attn_mask: np.ndarray | None, is_causal: bool, scale: float | None) -> dict[str, Any]:
    kind = {} if attn_mask is None else {"mask" if attn_mask.dtype == bool else "bias": attn_mask}
    return {**kind, "causal": "top_left" if is_causal else None, "scale": scale}


def _sums(q, k, v, *args, **kwargs):
    """dq sums over keys, dk and dv over queries and the heads that share them, a bias over what it is broadcast to."""
    group = q.shape[-3] // max(k.shape[-3], 1)
    shared = q.shape[-2] * group
    return (k.shape[-2], shared, shared, q.shape[0] * q.shape[-3] * q.shape[-2])


def _qkv(
    rng: np.random.Generator, b: int, h: int, hk: int, sq: int, sk: int, d: int, dv: int
) -> tuple[np.ndarray, ...]:
    return tuple(rng.standard_normal(shape) for shape in ((b, h, sq, d), (b, hk, sk, d), (b, hk, sk, dv)))


def cases() -> Iterator[Case]:
    """Every kind of mask alone and all of them at once; lengths around a tile's; rows and keys that nobody sees."""
    rng = np.random.default_rng(42)
    plain = _qkv(rng, 2, 2, 2, 33, 40, 8, 8)
    yield Case("dense", plain, layouts=True)
    yield Case("one query, one key", _qkv(rng, 1, 1, 1, 1, 1, 1, 1))
    yield Case("no keys", _qkv(rng, 1, 2, 2, 3, 0, 4, 4))
    yield Case("no queries", _qkv(rng, 1, 2, 2, 0, 5, 4, 4))
    for corner in ("top_left", "bottom_right"):
        yield Case(f"causal {corner}", plain, {"causal": corner})
    yield Case("more queries than keys", _qkv(rng, 1, 2, 1, 70, 9, 5, 3), {"causal": "bottom_right"})  # 61 empty rows
    yield Case("window", plain, {"window": (7, 2)})
    yield Case("window and causal", plain, {"window": (7, None), "causal": "bottom_right"})
    yield Case("lengths", plain, {"key_lengths": np.array([40, 0])})  # an item without keys
    yield Case("padding", plain, {"key_padding": rng.random((2, 40)) < 0.5})
    ids = np.repeat(np.arange(3), 12)[None]
    packed = _qkv(rng, 1, 2, 2, 36, 36, 8, 8)
    yield Case("segments", packed, {"segment_ids": ids, "causal": "top_left"})
    pair = (rng.integers(0, 3, (2, 33)), rng.integers(0, 3, (2, 40)))
    yield Case("segment pair", plain, {"segment_ids": pair})
    yield Case("prefix", plain, {"causal": "bottom_right", "prefix_length": np.array([11, 0])})
    for shape in ((2, 2, 33, 40), (1, 2, 33, 40), (2, 1, 1, 40), (1, 1, 33, 1), (33, 40)):
        name = "x".join(map(str, shape))
        yield Case(f"mask {name}", plain, {"mask": rng.random(shape) < 0.6})
        # one number for each query moves nothing but the logsumexp: its gradient here is exactly 0
        yield Case(f"bias {name}", plain, {"bias": rng.standard_normal(shape)}, gradients=shape[-1] > 1)
    hidden = rng.standard_normal((33, 40))
    hidden[4] = -np.inf
    hidden[:, 7] = -np.inf
    yield Case("bias with -inf", plain, {"bias": hidden}, gradients=False)
    yield Case("softcap", plain, {"softcap": 1.5, "scale": 0.7})
    yield Case("lse", plain, {"return_lse": True, "key_lengths": np.array([40, 3])})
    # 130, 129: a tile of the map and a little more in both directions; 3 query heads share one of k and v
    yield Case("shared heads", _qkv(rng, 1, 3, 1, 130, 129, 16, 24), {"causal": "bottom_right"})
    every = {
        "mask": rng.random((2, 1, 33, 40)) < 0.8,
        "bias": rng.standard_normal((1, 4, 1, 40)),
        "causal": "bottom_right",
        "window": (20, 3),
        "key_lengths": np.array([40, 31]),
        "key_padding": rng.random((2, 40)) < 0.9,
        "segment_ids": (np.repeat(np.arange(33)[None] // 11, 2, 0), np.repeat(np.arange(40)[None] // 13, 2, 0)),
        "prefix_length": np.array([2, 9]),
        "softcap": 4.0,
        "return_lse": True,
    }
    yield Case("everything", _qkv(rng, 2, 4, 2, 33, 40, 12, 7), every)
    small = _qkv(rng, 1, 2, 1, 4, 5, 3, 2)
    some = {"mask": rng.random((1, 1, 4, 5)) < 0.7, "bias": rng.standard_normal((2, 4, 5)), "causal": "bottom_right"}
    yield Case("second", small, some, second=True)
    large = tuple(8.0 + t for t in _qkv(rng, 1, 1, 1, 20, 20, 8, 8))  # scores near 180, values near 8
    yield Case("large mean", large, {"causal": "top_left"})
    q, k, v = _qkv(rng, 1, 1, 1, 20, 30, 4, 4)
    k[0, 0, 21:] = np.nan
    v[0, 0, 21:] = np.inf
    yield Case("NaN behind the length", (q, k, v), {"key_lengths": np.array([21])}, gradients=False)


def sdpa_cases() -> Iterator[Case]:
    """What torch's own signature can say."""
    rng = np.random.default_rng(43)
    plain = _qkv(rng, 2, 2, 2, 33, 40, 8, 8)
    yield Case("dense", plain, layouts=True)
    yield Case("causal", (*plain, None, 0.0, True))
    for shape in ((2, 2, 33, 40), (2, 1, 1, 40), (33, 40)):
        yield Case(f"mask {shape}", (*plain, rng.random(shape) < 0.7))
        yield Case(f"bias {shape}", (*plain, rng.standard_normal(shape)))
    yield Case("three dimensions", (*(t[0] for t in plain), rng.random((33, 40)) < 0.7))
    shared = (*_qkv(rng, 1, 4, 2, 9, 11, 4, 6), rng.random((9, 11)) < 0.7)
    yield Case("shared heads", shared, {"scale": 0.3, "enable_gqa": True})
    yield Case("no queries", (*_qkv(rng, 1, 2, 2, 0, 5, 4, 4), np.zeros((0, 5), dtype=bool)))
    yield Case("second", (*_qkv(rng, 1, 1, 1, 4, 5, 3, 2), rng.standard_normal((4, 5))), second=True)


SPECS = (
    Spec("attention", "pydl.ops._attention_composed:naive_attention", attention, attention_grad, cases, _sums),
    Spec(
        "scaled_dot_product_attention",
        "nn.functional.scaled_dot_product_attention",
        scaled_dot_product_attention,
        scaled_dot_product_attention_grad,
        sdpa_cases,
        _sums,
    ),
)
