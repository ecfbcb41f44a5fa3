"""The tile map of a set of masks: which tiles of scores are empty, partial or full, in lists for both loop orders.

One pass over the dense mask, which is packed to one bit per score on the way; the lists are made by one program for
each row and column of tiles, and rows are ranked by how many tiles they have. Nothing travels to the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import Case
from ._attention_tiles import TILE_K, TILE_Q, band_limits, tile_mask
from ._launch import cdiv, device_guard, next_power_of_two

# rows of tiles that a program ranks
_RANKED = 64


@triton.jit
def _attention_map_classes_kernel(
    mask_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, words_ptr, classes_ptr, Sq, Sk, NQ, NK, W,
    heads, mask_heads, mask_rows, shared_b, shared_h, shared_m, stride_mb, stride_mh, stride_mm, stride_mn, low, high,
    below, BAND: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_PREFIX: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0) % NK
    outer = tl.program_id(0) // NK
    pid_m = tl.program_id(1)
    b = (outer // heads).to(tl.int64)
    h = (outer % heads).to(tl.int64)
    offs_m = pid_m * TILE_Q + tl.arange(0, TILE_Q)
    offs_n = pid_n * TILE_K + tl.arange(0, TILE_K)
    ok = tile_mask(
        0, offs_m, offs_n, b, mask_ptr, lengths_ptr, padding_ptr, q_ids_ptr, k_ids_ptr, prefix_ptr, Sq, Sk, 0, low,
        high, below, BAND, False, HAS_LENGTHS, HAS_PADDING, HAS_IDS, HAS_PREFIX,
    )  # fmt: skip
    inside = (offs_m[:, None] < Sq) & (offs_n[None, :] < Sk)
    if HAS_MASK:
        at = mask_ptr + b * stride_mb + h * stride_mh + offs_m[:, None].to(tl.int64) * stride_mm
        dense = tl.load(at + offs_n[None, :] * stride_mn, mask=inside, other=0) != 0
        ok = ok & dense
        # a mask with one row, head or item for all is packed by the first program that sees it
        own_rows = tl.where(b * shared_b + h * shared_h + pid_m * shared_m == 0, mask_rows, 0)
        bits = tl.reshape(dense.to(tl.int32), (TILE_Q, TILE_K // 32, 32)) << tl.arange(0, 32)[None, None, :]
        words = tl.sum(bits, 2)
        word = pid_n * (TILE_K // 32) + tl.arange(0, TILE_K // 32)
        row = ((b * mask_heads + h) * mask_rows + offs_m)[:, None] * W + word[None, :]
        tl.store(words_ptr + row, words, mask=(offs_m[:, None] < own_rows) & (word[None, :] < W))
    allowed = tl.sum(tl.sum(ok.to(tl.int32), 1), 0)
    whole = tl.minimum(Sq - pid_m * TILE_Q, TILE_Q) * TILE_K
    kind = tl.where(allowed == 0, 0, tl.where(allowed == whole, 2, 1))
    tl.store(classes_ptr + ((b * heads + h) * NQ + pid_m) * NK + pid_n, kind.to(tl.uint8))


@triton.jit
def _attention_map_lists_kernel(
    classes_ptr, count_ptr, list_ptr, rows, n, stride_row, stride_entry, BLOCK: tl.constexpr
):  # fmt: skip
    """Partial tiles of one row (or column) in order, then full ones."""
    outer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    classes_ptr += outer * rows * n + row * stride_row
    slot = outer * rows + row
    list_ptr += slot * n
    partial = 0
    written = 0
    for wanted in tl.static_range(1, 3):
        for start in range(0, n, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            kinds = tl.load(classes_ptr + offs * stride_entry, mask=offs < n, other=0)
            hit = (kinds == wanted).to(tl.int32)
            place = written + tl.cumsum(hit, 0) - 1
            tl.store(list_ptr + place, offs * 2 + (wanted - 1), mask=hit != 0)
            written += tl.sum(hit, 0)
        if wanted == 1:
            partial = written
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(list_ptr + offs, tl.zeros((BLOCK,), tl.int32), mask=(offs >= written) & (offs < n))
    tl.store(count_ptr + 3 * slot, written)
    tl.store(count_ptr + 3 * slot + 1, partial)


@triton.jit
def _attention_map_order_kernel(q_count_ptr, k_count_ptr, NQ, NK, q_programs, BLOCK: tl.constexpr):
    """The first programs rank rows of tiles, the others columns; of equal rows the last, of equal columns the first."""
    outer = tl.program_id(0).to(tl.int64)
    pid = tl.program_id(1)
    if pid < q_programs:
        _rank(q_count_ptr + outer * NQ * 3, pid, NQ, True, BLOCK)
    else:
        _rank(k_count_ptr + outer * NK * 3, pid - q_programs, NK, False, BLOCK)


@triton.jit
def _rank(count_ptr, pid, n, LAST_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Writes own rows where they stand among all n; counts are read only, so that programs need not wait."""
    own = pid * BLOCK + tl.arange(0, BLOCK)
    own_count = tl.load(count_ptr + 3 * own, mask=own < n, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        count = tl.load(count_ptr + 3 * offs, mask=offs < n, other=-1)
        tie = offs[None, :] > own[:, None] if LAST_FIRST else offs[None, :] < own[:, None]
        before = (count[None, :] > own_count[:, None]) | ((count[None, :] == own_count[:, None]) & tie)
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(count_ptr + 3 * rank + 2, own, mask=own < n)


def attention_map(
    mask: Tensor | None, key_lengths: Tensor | None, key_padding: Tensor | None, q_ids: Tensor | None,
    k_ids: Tensor | None, prefix: Tensor | None, batch: int, q_length: int, k_length: int, causal: int, left: int,
    right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(words, classes, q_count, q_list, k_count, k_list); see the schema in pydl.ops for their shapes.

    Args:
        mask: bool, four dimensions, each 1 or full; a dimension of size 1 is not expanded.
        key_lengths, key_padding, q_ids, k_ids, prefix: vectors for each item of the batch.
        batch, q_length, k_length: B, Sq, Sk.
        causal, left, right: masks that are numbers.
    """
    vectors = [t for t in (key_lengths, key_padding, q_ids, prefix) if t is not None]
    like = vectors[0] if mask is None else mask
    heads = 1 if mask is None else mask.shape[1]
    items = batch if vectors or mask is None else mask.shape[0]
    nq, nk, w = cdiv(q_length, TILE_Q), cdiv(k_length, TILE_K), cdiv(k_length, 32)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)

    words = new(0) if mask is None else new(*mask.shape[:3], w)
    classes = new(items, heads, nq, nk, dtype=torch.uint8)
    counts, lists = (
        (new(items, heads, nq, 3), new(items, heads, nk, 3)),
        (new(items, heads, nq, nk), new(items, heads, nk, nq)),
    )
    out = (words, classes, counts[0], lists[0], counts[1], lists[1])
    if classes.numel() == 0:
        for count in counts:
            count.zero_()
        _order(*counts)
        return out
    dense = None if mask is None else mask.view(torch.uint8)
    mask_shape = (1, 1, 1) if mask is None else tuple(mask.shape[:3])
    shared = tuple(int(n == 1) for n in mask_shape)
    strides = (0,) * 4 if mask is None else tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride()))
    padding = None if key_padding is None else key_padding.contiguous().view(torch.uint8)
    plain = [None if t is None else t.contiguous() for t in (key_lengths, q_ids, k_ids, prefix)]
    with device_guard(like):
        _attention_map_classes_kernel[(nk * items * heads, nq)](
            dense, plain[0], padding, *plain[1:], words, classes, q_length, k_length, nq, nk, w, heads,
            *mask_shape[1:], *shared, *strides, *band_limits(q_length, k_length, causal, left, right),
            BAND=(causal, left, right) != (0, -1, -1),
            HAS_MASK=mask is not None, HAS_LENGTHS=key_lengths is not None, HAS_PADDING=padding is not None,
            HAS_IDS=q_ids is not None, HAS_PREFIX=prefix is not None, TILE_Q=TILE_Q, TILE_K=TILE_K, num_warps=4,
            num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        for count, entries, rows, n, strides in (
            (counts[0], lists[0], nq, nk, (nk, 1)),
            (counts[1], lists[1], nk, nq, (1, nk)),
        ):
            _attention_map_lists_kernel[(items * heads, rows)](
                classes, count, entries, rows, n, *strides, BLOCK=min(next_power_of_two(n), 256), num_warps=1,
                num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
    _order(*counts)
    return out


def _order(q_count: Tensor, k_count: Tensor) -> None:
    """Writes the third numbers of counts that have the others."""
    items, heads, nq, _ = q_count.shape
    q_programs, k_programs = cdiv(nq, _RANKED), cdiv(k_count.shape[2], _RANKED)
    if items * heads * (q_programs + k_programs) == 0:
        return
    with device_guard(q_count):
        _attention_map_order_kernel[(items * heads, q_programs + k_programs)](
            q_count, k_count, nq, k_count.shape[2], q_programs, BLOCK=_RANKED, num_warps=4, num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip


def aot_cases(arch: int) -> Iterator[Case]:
    """A dense mask with everything else and without; lists of short and long rows; their order."""
    integers = (
        "Sq", "Sk", "NQ", "NK", "W", "heads", "mask_heads", "mask_rows", "shared_b", "shared_h", "shared_m",
        "stride_mb", "stride_mh", "stride_mm", "stride_mn", "low", "high", "below", "rows", "n", "stride_row",
        "stride_entry", "q_programs",
    )  # fmt: skip
    vectors = ("lengths_ptr", "q_ids_ptr", "k_ids_ptr", "prefix_ptr")
    types = dict.fromkeys(integers, "i32") | dict.fromkeys(vectors, "*i64")
    types |= {"mask_ptr": "*u8", "padding_ptr": "*u8", "words_ptr": "*i32", "classes_ptr": "*u8"}
    types |= dict.fromkeys(("count_ptr", "q_count_ptr", "k_count_ptr", "list_ptr"), "*i32")
    for every in (False, True):
        flags = dict.fromkeys(("HAS_LENGTHS", "HAS_PADDING", "HAS_IDS", "HAS_PREFIX", "BAND"), every)
        absent = {} if every else dict.fromkeys((*vectors, "padding_ptr"))
        sizes = {"HAS_MASK": True, "TILE_Q": TILE_Q, "TILE_K": TILE_K, "stride_mn": 1}
        label = "every mask" if every else "a dense mask"
        yield Case(_attention_map_classes_kernel, label, types, flags | absent | sizes, 4, quick=not every)
    for block in (16, 256):
        entries = {"BLOCK": block}
        yield Case(_attention_map_lists_kernel, f"{block} tiles at once", types, entries, 1, quick=block == 256)
    yield Case(_attention_map_order_kernel, f"{_RANKED} rows at once", types, {"BLOCK": _RANKED}, 4, quick=True)
