"""What the attention kernels share: masks and scores of one tile, arguments, tile choice."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Device, cdiv, next_power_of_two
from ._math import tanh

# the tiles of a map, in queries and keys; the tiles below divide them
TILE_Q, TILE_K = 128, 64
_UNLIMITED = 1 << 30
_PRECISIONS = ("ieee", "tf32", "tf32x3")
# bytes of the second cache that streamed rows may take: parts for data centers have 40 MB and more
_CACHE = 1 << 25
LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps, pipeline stages, and whether rows are read through tensor descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    described: bool = False


@triton.jit
def tile_mask(
    start_m, offs_m, offs_n, b, words_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, Sq, Sk,
    stride_wm, low, high, below, BAND: tl.constexpr, HAS_WORDS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    """Which scores of a tile are allowed: bool [BLOCK_M, BLOCK_N]. ``words_ptr`` is that of the batch item and head."""
    ok = (offs_m[:, None] < Sq) & (offs_n[None, :] < Sk)
    if BAND:
        ahead = offs_n[None, :] - offs_m[:, None]
        under = ahead <= below
        if HAS_PREFIX:
            under = under | (offs_n[None, :] < tl.load(prefix_ptr + b))
        ok = ok & under & (ahead >= low) & (ahead <= high)
    if HAS_LENGTHS:
        ok = ok & (offs_n[None, :] < tl.load(lengths_ptr + b))
    if HAS_PADDING:
        ok = ok & (tl.load(padding_ptr + b * Sk + offs_n, mask=offs_n < Sk, other=0) != 0)[None, :]
    if HAS_IDS:
        q_ids = tl.load(q_ids_ptr + b * Sq + offs_m, mask=offs_m < Sq, other=0)
        k_ids = tl.load(k_ids_ptr + b * Sk + offs_n, mask=offs_n < Sk, other=0)
        ok = ok & (q_ids[:, None] == k_ids[None, :])
    if HAS_WORDS:
        at = (offs_m - start_m)[:, None] * stride_wm + (offs_n // 32)[None, :]
        words_ptr += tl.cast(start_m, tl.int64) * stride_wm
        words = tl.load(words_ptr + at, mask=(offs_m[:, None] < Sq) & (offs_n[None, :] < Sk), other=0)
        ok = ok & (((words >> (offs_n % 32)[None, :]) & 1) != 0)
    return ok


@triton.jit
def tile_scores(q, kt, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """(scores before the bias, slope of the softcap), natural units, fp32."""
    s = tl.dot(q, kt, input_precision=PRECISION) * scale
    slope = s
    if HAS_SOFTCAP:
        t = tanh(s / softcap)
        slope = 1.0 - t * t
        s = softcap * t
    return s, slope


@triton.jit
def tile_bias(bias_ptr, start_m, start_n, offs_m, offs_n, Sq, Sk, stride_bm, stride_bn):
    """The bias of a tile, fp32; 0 outside. ``bias_ptr`` is that of the batch item and head."""
    bias_ptr += tl.cast(start_m, tl.int64) * stride_bm + tl.cast(start_n, tl.int64) * stride_bn
    at = (offs_m - start_m)[:, None] * stride_bm + (offs_n - start_n)[None, :] * stride_bn
    return tl.load(bias_ptr + at, mask=(offs_m[:, None] < Sq) & (offs_n[None, :] < Sk), other=0.0).to(tl.float32)


@triton.jit
def load_rows(ptr, start, offs, offs_d, S, D, stride_s, stride_d):
    """Rows ``offs`` = start, start + 1, ... of q, k, v or a gradient, [BLOCK, BLOCK_D]; 0 outside.

    Only the tile's start is multiplied in 64 bits: offsets inside of a tile then cost half the registers.
    """
    ptr += tl.cast(start, tl.int64) * stride_s
    at = (offs - start)[:, None] * stride_s + offs_d[None, :] * stride_d
    return tl.load(ptr + at, mask=(offs[:, None] < S) & (offs_d[None, :] < D), other=0.0)


@triton.jit
def seen_rows(x, ok, AXIS: tl.constexpr):
    """x with the rows that nothing in the tile attends to (or that attend to nothing) set to 0: they may hold NaN."""
    seen = tl.max(ok.to(tl.int32), AXIS) != 0
    return tl.where(seen[:, None], x, 0.0)


@triton.jit
def band_blocks(start, size, other, low, reach, BLOCK: tl.constexpr):
    """Blocks of the other axis, of length `other`, that start..start+size sees by x + low <= y <= x + reach.

    Returns begin, full, rest, end: [begin, full) and [rest, end) are partial, [full, rest) is full.
    """
    final = start + size - 1
    begin = tl.minimum(tl.maximum(start + low, 0), other) // BLOCK
    end = tl.maximum(tl.cdiv(tl.minimum(tl.maximum(final + reach + 1, 0), other), BLOCK), begin)
    full = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(final + low, 0), BLOCK), begin), end)
    rest = tl.maximum(tl.minimum(tl.minimum(tl.maximum(start + reach + 1, 0), other) // BLOCK, end), full)
    return begin, full, rest, end


@triton.jit
def place_of(pid, blocks, turns):
    """(place in the order of a head's blocks, head) of a program: `turns` heads side by side take turns."""
    turn = pid // turns
    return turn % blocks, turn // blocks * turns + pid % turns


@triton.jit
def block_at(count_ptr, row, place, split):
    """The block at a place in the map's order; `row` is the head's first row of tiles, each of `split` blocks."""
    return tl.load(count_ptr + 3 * (row + place // split) + 2) * split + place % split


@triton.jit
def listed_blocks(count_ptr, row, split, inside):
    """(partial, all) blocks that the tiles of a row in a map are, partial ones first; none for a block outside."""
    partial = tl.load(count_ptr + 3 * row + 1, mask=inside, other=0)
    total = tl.load(count_ptr + 3 * row, mask=inside, other=0)
    return partial * split, total * split


class Masks(NamedTuple):
    """Host side: tensors, strides and flags of the masks, in the order in which every kernel takes them."""

    pointers: tuple[Tensor | None, ...]
    strides: tuple[int, ...]
    band: tuple[int, int, int]
    flags: dict[str, bool]
    tiles: tuple[Tensor | None, ...]
    tile_strides: tuple[int, int]


def mask_arguments(
    size: Sequence[int],
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    key_padding: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    prefix: Tensor | None,
    tiles: Sequence[Tensor],
    band: tuple[int, int, int],
) -> Masks:
    """Pointers (bias, words, lengths, padding, q_ids, k_ids, prefix), strides (bias 4, words 3), band and flags.

    A dimension of size 1 has stride 0: nothing is expanded.
    """
    given = any(t is not None for t in (mask, key_lengths, key_padding, q_ids, prefix))
    if given != bool(tiles):
        raise ValueError("attention: masks that are tensors need the six tensors of their tile map, others none")
    words = tiles[0] if mask is not None else None
    bias = None if bias is None else near(bias)
    padding = None if key_padding is None else key_padding.contiguous().view(torch.uint8)
    lengths, *rest = (None if t is None else t.contiguous() for t in (key_lengths, q_ids, k_ids, prefix))
    pointers = (bias, words, lengths, padding, *rest)
    strides = (*_strides(bias, 4), *_strides(words, 3))
    low, high, below = band_limits(size[2], size[3], *band)
    flags = {
        "BAND": band != (0, -1, -1),
        "HAS_BIAS": bias is not None,
        "HAS_WORDS": words is not None,
        "HAS_LENGTHS": key_lengths is not None,
        "HAS_PADDING": key_padding is not None,
        "HAS_IDS": q_ids is not None,
        "HAS_PREFIX": prefix is not None,
        "HAS_MAP": bool(tiles),
    }
    lists = tuple(tiles[2:]) if tiles else (None,) * 4
    tile_strides = tuple(0 if n == 1 else 1 for n in tiles[1].shape[:2]) if tiles else (0, 0)
    return Masks(pointers, strides, (low, high, below), flags, lists, tile_strides)  # type: ignore[arg-type]


def _strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    if t is None:
        return (0,) * dims
    return tuple(0 if n == 1 else s for n, s in zip(t.shape[:dims], t.stride()[:dims], strict=True))


def band_limits(queries: int, keys: int, causal: int, left: int, right: int) -> tuple[int, int, int]:
    """(low, high, below): keys from i + low to i + high, and up to i + below unless a prefix lifts that."""
    shift = keys - queries
    low = shift - left if left >= 0 else -_UNLIMITED
    high = shift + right if right >= 0 else _UNLIMITED
    return low, high, (_UNLIMITED, 0, shift)[causal]


def precision_name(code: int) -> str:
    """Triton's name for how float32 products are computed."""
    return _PRECISIONS[code]


def head_block(d: int) -> int:
    """Columns of a tile for a head dimension: a power of two, at least the 16 that a matrix unit takes."""
    return max(next_power_of_two(d), 16)


def is_heavy(flags: dict[str, bool], softcap: float) -> bool:
    """Whether the masks of a call need so many registers that tiles must be smaller."""
    kinds = ("HAS_WORDS", "HAS_LENGTHS", "HAS_PADDING", "HAS_IDS", "HAS_PREFIX")
    return flags["HAS_BIAS"] or softcap != 0.0 or sum(flags[kind] for kind in kinds) > 1


# Where Triton 3.6 runs out of registers with the tiles chosen below: by arch, kernel, bytes of an element, bytes of a
# row and whether masks are heavy. The largest of those tried that do not spill.
_SMALLER = {
    (80, "fwd", 2, 128, True): Tiles(64, 32, 8, 2),
    (80, "fwd", 2, 512, True): Tiles(64, 16, 8, 1),
    (80, "fwd", 4, 256, False): Tiles(32, 16, 4, 2),
    (80, "bwd", 2, 128, False): Tiles(32, 32, 8, 1),
    (80, "bwd", 4, 64, True): Tiles(32, 64, 8, 1),
    (80, "bwd", 4, 128, False): Tiles(32, 32, 8, 1),
    (80, "bias", 2, 128, True): Tiles(32, 32, 8, 1),
    (80, "bias", 2, 256, True): Tiles(32, 16, 8, 1),
    (80, "bias", 4, 64, True): Tiles(32, 64, 8, 1),
    (80, "bias", 4, 128, True): Tiles(64, 16, 8, 1),
    (90, "fwd", 2, 128, True): Tiles(128, 32, 8, 3),
    (90, "fwd", 2, 256, False): Tiles(128, 32, 8, 2),
    (90, "fwd", 2, 512, True): Tiles(64, 32, 8, 1),
    (90, "fwd", 4, 64, False): Tiles(64, 32, 4, 3),
    (90, "fwd", 4, 128, False): Tiles(64, 16, 8, 1),
    (90, "fwd", 4, 256, False): Tiles(64, 16, 8, 1),
    (90, "fwd", 4, 256, True): Tiles(64, 16, 8, 1),
    (90, "bwd", 2, 512, False): Tiles(16, 16, 4, 1),
    (90, "bwd", 4, 64, True): Tiles(64, 32, 8, 1),
    (90, "bwd", 4, 128, False): Tiles(16, 64, 8, 1),
    (90, "bwd", 4, 128, True): Tiles(32, 16, 8, 1),
    (90, "bwd", 4, 256, False): Tiles(16, 32, 8, 1),
    (90, "bwd", 4, 256, True): Tiles(16, 32, 8, 1),
    (90, "bias", 2, 512, True): Tiles(16, 16, 4, 1),
    (90, "bias", 4, 64, True): Tiles(64, 32, 8, 1),
    (90, "bias", 4, 128, True): Tiles(32, 16, 8, 1),
    (90, "bias", 4, 256, True): Tiles(16, 32, 4, 1),
}
_OLDER = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


def _fitted(tile: Tiles, kernel: str, queries: int, wide: int, itemsize: int, heavy: bool, arch: int) -> Tiles:
    """The tile, or its replacement for an older Triton, with no more queries than there are."""
    if _OLDER:
        tile = _SMALLER.get((80 if arch < 90 else arch, kernel, itemsize, wide, heavy), tile)
    block_m = tile.block_m
    while block_m > 16 and block_m >= 2 * queries:
        block_m //= 2
    return tile._replace(block_m=block_m)


# Where the forward reads q, k and v through tensor descriptors: by arch, bytes of an element, bytes of a row and
# whether masks are heavy. Not measured on a GPU: an entry that proves slower than pointers is to be deleted. Chosen
# because a loop then holds no addresses and masks of rows (on sm_90 up to 44 registers less). Not here: fp32, whose
# products are made from registers and wait for them, not for memory; and what spills with descriptors, 80 to 992 bytes,
# on sm_100 and on sm_120, where products of half precision are made from registers too.
_DESCRIBED = {
    *((90, 2, wide, heavy) for wide in (128, 256, 512) for heavy in (False, True)),
    *((100, 2, wide, heavy) for wide in (128, 256, 512) for heavy in (False, True) if (wide, heavy) != (128, True)),
    (120, 2, 128, False),
}
if _OLDER:
    # with descriptors these spill 8 to 72 bytes under Triton 3.6
    _DESCRIBED -= {(100, 2, 512, False), (120, 2, 128, False)}


@functools.lru_cache(maxsize=1024)
def fwd_tiles(queries: int, d: int, itemsize: int, heavy: bool, device: Device) -> Tiles:
    """Tile of the forward: as many queries as registers hold beside the sums; fewer stages on small parts."""
    wide = head_block(d) * itemsize
    hopper = device.arch in (90, 100)
    if itemsize == 2:
        block_m = 128 if wide <= (256 if hopper else 64 if heavy else 128) else 64
        crowded = wide > 256 or (wide == 256 and heavy) or (wide == 128 and not (heavy or hopper))
        block_n = 32 if crowded else 64
    else:
        block_m, block_n = 64 if wide <= 512 else 32, 16 if wide == 256 and not hopper else 32
    stages = 3 if wide <= 128 and hopper else 1 if itemsize == 4 and heavy else 2
    tile = _fitted(Tiles(block_m, block_n, 8, stages), "fwd", queries, wide, itemsize, heavy, device.arch)
    if tile.block_m < 64:
        # so few queries that a call waits for its launch, which descriptors make longer
        return tile._replace(num_warps=4)
    return tile._replace(described=(device.arch, itemsize, wide, heavy) in _DESCRIBED)


@functools.lru_cache(maxsize=1024)
def bwd_tiles(queries: int, d: int, itemsize: int, heavy: bool, device: Device) -> Tiles:
    """Tile of the backward, whose programs hold two sums and recompute the scores: the largest that do not spill."""
    return _bwd_tiles("bwd", queries, d, itemsize, heavy, device)


@functools.lru_cache(maxsize=1024)
def bias_tiles(queries: int, d: int, itemsize: int, heavy: bool, device: Device) -> Tiles:
    """Tile of the bias gradient, which recomputes the gradient of the scores as the backward does."""
    return _bwd_tiles("bias", queries, d, itemsize, heavy, device)


def _bwd_tiles(kernel: str, queries: int, d: int, itemsize: int, heavy: bool, device: Device) -> Tiles:
    wide = head_block(d) * itemsize
    hopper = device.arch in (90, 100)
    block_m, block_n, num_warps = 32, 16, 8
    if itemsize == 2 and wide <= 128 and hopper:
        block_m, block_n = 32 if heavy else 64, 64
    elif itemsize == 2 and wide <= 128:
        block_n, num_warps = 32, 4
    elif itemsize == 2 and wide <= 256:
        block_n = 32
    elif itemsize == 4 and wide <= 64:
        block_n, num_warps = 64, 4 if heavy else 8
    elif itemsize == 4 and wide <= 128:
        block_n, num_warps = 16 if heavy else 32, 4
    elif itemsize == 4 and wide <= 256 and hopper and not heavy:
        block_m = 16
    elif itemsize == 4 and not hopper:
        block_m = 16
    return _fitted(Tiles(block_m, block_n, num_warps, 1), kernel, queries, wide, itemsize, heavy, device.arch)


def blocks_of(size: int, block: int, tile: int, has_map: bool) -> int:
    """Blocks of a sequence; with a map those of whole tiles, of which the last may lie outside of the sequence."""
    return cdiv(size, tile) * min(tile // block, cdiv(size, block)) if has_map else cdiv(size, block)


@functools.lru_cache(maxsize=1024)
def turns_of(heads: int, bytes_each: int, has_map: bool) -> int:
    """How many heads' blocks are taken in turns where a map orders them, longest first: a divisor of ``heads``.

    All of them would start the longest blocks of the whole call first and leave the least idle at its end, but then
    each program would stream its own rows (k and v; q and dout for a block of keys) from memory. So turns are taken by
    as many heads as find their rows, ``bytes_each``, in the second cache together. Not measured on a GPU.
    """
    fitting = min(_CACHE // max(bytes_each, 1), heads) if has_map else 1
    return next((n for n in range(fitting, 1, -1) if heads % n == 0), 1)


def near(t: Tensor) -> Tensor:
    """The tensor, copied if 32 bits do not hold the offsets inside of a tile of its rows."""
    span = TILE_Q * abs(t.stride(2)) + t.shape[3] * abs(t.stride(3))
    return t if span < 2**31 else t.contiguous()


def like_rows(t: Tensor, last: int) -> Tensor:
    """New [B, H, S, last], with heads inside of positions in memory where ``t`` has them there."""
    if t.transpose(1, 2).is_contiguous() and not t.is_contiguous():
        swapped = torch.empty((t.shape[0], t.shape[2], t.shape[1], last), dtype=t.dtype, device=t.device)
        return swapped.transpose(1, 2)
    return torch.empty((*t.shape[:3], last), dtype=t.dtype, device=t.device)
