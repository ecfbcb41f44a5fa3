"""The raw operators of attention: schemas, fakes and derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydl.ops._attention_composed import attention_second
from pydl.ops._attention_masks import Band, Masks
from pydl.ops._contract import Op

# the tiles of a map, in queries and keys; the tiles of kernels divide them
TILE_Q, TILE_K = 128, 64
WORD = 32


def _tiles(size: int, tile: int) -> Any:
    return (size + tile - 1) // tile


def _map_fake(
    mask: Tensor | None,
    key_lengths: Tensor | None,
    key_padding: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    prefix: Tensor | None,
    batch: int,
    q_length: int,
    k_length: int,
    causal: int,
    left: int,
    right: int,
) -> tuple[Tensor, ...]:
    vectors = [t for t in (key_lengths, key_padding, q_ids, prefix) if t is not None]
    like = vectors[0] if mask is None else mask
    heads = 1 if mask is None else mask.shape[1]
    items = batch if vectors or mask is None else mask.shape[0]
    nq, nk = _tiles(q_length, TILE_Q), _tiles(k_length, TILE_K)
    words = (0,) if mask is None else (*mask.shape[:3], _tiles(k_length, WORD))

    def new(shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)

    return (
        new(words, torch.int32),
        new((items, heads, nq, nk), torch.uint8),
        new((items, heads, nq, 3), torch.int32),
        new((items, heads, nq, nk), torch.int32),
        new((items, heads, nk, 3), torch.int32),
        new((items, heads, nk, nq), torch.int32),
    )


def _like_rows(t: Tensor, last: int | Any = None) -> Tensor:
    """New [B, H, S, last], with heads inside of positions in memory where ``t`` has them there."""
    shape = (*t.shape[:3], t.shape[3] if last is None else last)
    if t.transpose(1, 2).is_contiguous() and not t.is_contiguous():
        swapped = torch.empty((shape[0], shape[2], shape[1], shape[3]), dtype=t.dtype, device=t.device)
        return swapped.transpose(1, 2)
    return torch.empty(shape, dtype=t.dtype, device=t.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _like_rows(q, v.shape[3]), torch.empty(q.shape[:3], dtype=_wide(q.dtype), device=q.device)


def _bwd_fake(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _like_rows(q), _like_rows(k), _like_rows(v)


def _bias_bwd_fake(*args: Any) -> Tensor:
    bias = args[8]
    return torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    *tensors, tiles, causal, left, right, scale, softcap, precision = inputs
    ctx.present = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None), *outputs, *tiles)
    ctx.tiles = len(tiles)
    ctx.numbers = (causal, left, right, scale, softcap, precision)


def _saved(ctx: Any) -> tuple[list[Tensor | None], list[Tensor], list[Tensor]]:
    """(q, k, v and masks), (out, lse), tiles."""
    supply = iter(ctx.saved_tensors)
    tensors = [next(supply) if there else None for there in ctx.present]
    rest = list(supply)
    return tensors, rest[:2], rest[2:]


def _fwd_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    if dout is None and dlse is None:
        return *((None,) * 10), [None] * ctx.tiles, *((None,) * 6)
    (q, k, v, *masks), (out, lse), tiles = _saved(ctx)
    dout = torch.zeros_like(out) if dout is None else dout
    args = (dout, dlse, q, k, v, out, lse, *masks, tiles, *ctx.numbers)
    dq, dk, dv = attention_bwd(ctx.decision, *args)
    dbias = attention_bias_bwd(ctx.decision, *args) if ctx.needs_input_grad[4] else None
    return dq, dk, dv, None, dbias, *((None,) * 5), [None] * ctx.tiles, *((None,) * 6)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
    dout, dlse, q, k, v, _, _, *masks, tiles, causal, left, right, scale, softcap, _ = inputs
    tensors = [dout, dlse, q, k, v, *masks]
    ctx.present = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None))
    ctx.tiles, ctx.band, ctx.numbers = len(tiles), Band(causal, left, right), (scale, softcap)


def _second(
    ctx: Any,
    ddq: Tensor | None = None,
    ddk: Tensor | None = None,
    ddv: Tensor | None = None,
    ddbias: Tensor | None = None,
) -> tuple[Any, ...]:
    (dout, dlse, q, k, v, *masks), *_ = _saved(ctx)
    assert dout is not None and q is not None and k is not None and v is not None
    leaves = (dout, dlse, q, k, v)
    given = attention_second((ddq, ddk, ddv, ddbias), *leaves, Masks(*masks), ctx.band, *ctx.numbers)
    return *given[:5], None, None, None, given[5], *((None,) * 5), [None] * ctx.tiles, *((None,) * 6)


def _bwd_backward(ctx: Any, ddq: Tensor | None, ddk: Tensor | None, ddv: Tensor | None) -> tuple[Any, ...]:
    return _second(ctx, ddq, ddk, ddv)


def _bias_bwd_backward(ctx: Any, ddbias: Tensor | None) -> tuple[Any, ...]:
    if ddbias is None:
        return *((None,) * 14), [None] * ctx.tiles, *((None,) * 6)
    return _second(ctx, ddbias=ddbias)


_TENSORS = "Tensor q, Tensor k, Tensor v"
_VECTORS = "Tensor? key_lengths, Tensor? key_padding, Tensor? q_ids, Tensor? k_ids, Tensor? prefix"
_MASKS = f"Tensor? mask, Tensor? bias, {_VECTORS}, Tensor[] map"
_BAND = "int causal, SymInt left, SymInt right"
_NUMBERS = f"{_BAND}, float scale, float softcap, int precision"
_UPSTREAM = "Tensor dout, Tensor? dlse"

# six tensors: bits of the dense mask, 32 keys in each int32, lowest first; for every tile 0 empty, 1 partial, 2 full;
# for each tile row how many tiles are not empty, how many of them partial, and, as the third number of entry i, which
# row is taken i-th: those with the most tiles first, of equal ones the last; then which tiles a row has (twice the
# index, plus 1 if full), the partial ones first; the same two by columns, of equal ones the first
attention_map = Op(
    "attention_map",
    f"(Tensor? mask, {_VECTORS}, SymInt batch, SymInt q_length, SymInt k_length, {_BAND}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_map_fake,
    triton="attention_map:attention_map",
)
attention_fwd = Op(
    "attention_fwd",
    f"({_TENSORS}, {_MASKS}, {_NUMBERS}) -> (Tensor, Tensor)",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
    triton="attention_fwd:attention_fwd",
)
attention_bwd = Op(
    "attention_bwd",
    f"({_UPSTREAM}, {_TENSORS}, Tensor out, Tensor lse, {_MASKS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
    triton="attention_bwd:attention_bwd",
)
attention_bias_bwd = Op(
    "attention_bias_bwd",
    f"({_UPSTREAM}, {_TENSORS}, Tensor out, Tensor lse, {_MASKS}, {_NUMBERS}) -> Tensor",
    fake=_bias_bwd_fake,
    setup=_bwd_setup,
    backward=_bias_bwd_backward,
    triton="attention_bias_bwd:attention_bias_bwd",
)
