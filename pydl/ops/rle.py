"""Run-length encoding of masks and label maps, with COCO's order and counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op

__all__ = [
    "rle_decode",
    "rle_decode_labels",
    "rle_encode",
    "rle_encode_labels",
    "rle_from_string",
    "rle_to_string",
]
# these deal in strings, not in tensors
UNGRADED = ("rle_from_string", "rle_to_string")

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MASKS, _LABELS = (
    Family(name, ops=("rle_encode",), order={"cpu": ("cpu",)}, dtypes={"cpu": dtypes})
    for name, dtypes in (("rle_encode", (torch.bool, torch.uint8)), ("rle_encode_labels", _INTEGERS))
)


def rle_encode(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the runs of zeros and ones of each mask, column by column, zeros first: COCO's counts.

    Args:
        masks: [..., H, W], bool, or uint8 of zeros and ones.

    Returns:
        counts, int64 [sum of lengths], those of all masks one after the other; and lengths, int64 [...], how many
        belong to each. A mask that begins with a one has a first count of 0.

    Raises:
        TypeError: no tensor.
        RuntimeError: another dtype or fewer than two dimensions.

    The size of counts depends on the data; on a GPU the composed torch operations wait for it.
    """
    _check("rle_encode", masks, (torch.bool, torch.uint8))
    _, counts, lengths = _encode(_MASKS, masks, zero_first=True)
    return counts, lengths


def rle_encode_labels(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values and lengths of the runs of equal labels of each map, column by column.

    Args:
        labels: [..., H, W], integers.

    Returns:
        values and counts, int64 [sum of lengths], those of all maps one after the other; and lengths, int64 [...].

    Raises:
        TypeError: no tensor.
        RuntimeError: another dtype or fewer than two dimensions.
    """
    _check("rle_encode_labels", labels, _INTEGERS)
    return _encode(_LABELS, labels, zero_first=False)


def rle_decode(counts: Tensor, lengths: Tensor, size: Sequence[int]) -> Tensor:
    """The masks that :func:`rle_encode` encoded.

    Args:
        counts: int [sum of lengths], runs of zeros and ones by turns, zeros first.
        lengths: int [...], how many counts belong to each mask.
        size: (H, W).

    Returns:
        bool [..., H, W].

    Raises:
        TypeError: no tensors.
        ValueError: counts that do not add up to H * W for each mask, or negative ones.
    """
    ends = _check_runs("rle_decode", counts, lengths, size)
    # the runs of each mask begin anew with zeros
    place = torch.arange(counts.numel(), device=counts.device)
    first = torch.repeat_interleave(ends - lengths.flatten(), lengths.flatten())
    flat = torch.repeat_interleave((place - first) % 2 == 1, counts)
    return flat.reshape(*lengths.shape, size[1], size[0]).transpose(-1, -2)


def rle_decode_labels(values: Tensor, counts: Tensor, lengths: Tensor, size: Sequence[int]) -> Tensor:
    """The label maps that :func:`rle_encode_labels` encoded.

    Args:
        values: int [sum of lengths].
        counts: int [sum of lengths].
        lengths: int [...], how many runs belong to each map.
        size: (H, W).

    Returns:
        [..., H, W] in the dtype of values.

    Raises:
        TypeError: no tensors.
        ValueError: counts that do not add up to H * W for each map, negative ones, or not one value for each.
    """
    _check_runs("rle_decode_labels", counts, lengths, size)
    if not isinstance(values, Tensor) or values.shape != counts.shape:
        raise ValueError("rle_decode_labels: argument 'values' must be a tensor of the shape of 'counts'")
    return torch.repeat_interleave(values, counts).reshape(*lengths.shape, size[1], size[0]).transpose(-1, -2)


def rle_to_string(counts: Tensor) -> str:
    """COCO's compressed text of one mask's counts.

    Args:
        counts: int [R].

    Returns:
        str: each count, from the third on minus the one two before, in groups of five bits, lowest first, the sixth bit
        saying that more follow, written as characters from "0" on.

    Raises:
        RuntimeError: not one dimension.
    """
    if counts.dim() != 1:
        raise RuntimeError(f"rle_to_string: argument 'counts' must be those of one mask, got shape {[*counts.shape]}")
    numbers = counts.tolist()
    text = []
    for i, count in enumerate(numbers):
        rest = count - (numbers[i - 2] if i > 2 else 0)
        while True:
            group = rest & 31
            rest >>= 5
            more = rest != (-1 if group & 16 else 0)
            text.append(chr(48 + (group | (32 if more else 0))))
            if not more:
                break
    return "".join(text)


def rle_from_string(text: str) -> Tensor:
    """The counts of one mask from COCO's compressed text.

    Args:
        text: as from :func:`rle_to_string`; bytes are taken too.

    Returns:
        counts, int64 [R].

    Raises:
        ValueError: a character that cannot occur, or a text that ends within a number.
    """
    data = text if isinstance(text, bytes) else text.encode("latin-1", "replace")
    counts: list[int] = []
    value = shift = 0
    for byte in data:
        group = byte - 48
        if not 0 <= group < 64:
            raise ValueError(f"rle_from_string: character {chr(byte)!r} cannot occur")
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (1 << shift) if group & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("rle_from_string: the text ends within a number")
    return torch.tensor(counts, dtype=torch.int64)


def _check(op: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: the first argument must be a Tensor, got {type(x).__name__}")
    if x.dim() < 2 or x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise RuntimeError(f"{op}: the first argument must be {names} of shape [..., H, W], got {x.dtype} {[*x.shape]}")


def _encode(family: Family, x: Tensor, zero_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    decision = choose(family, x)
    lead = x.shape[:-2]
    rows = x.transpose(-1, -2).reshape(lead.numel(), x.shape[-1] * x.shape[-2])
    if zero_first:
        rows = (rows != 0).view(torch.uint8) if rows.dtype != torch.bool else rows.view(torch.uint8)
    elif rows.dtype != torch.uint8:
        rows = rows.to(torch.int64)
    run = _composed if decision.backend == "torch" else _encode_op
    values, counts, lengths = run(decision, rows, zero_first)
    return values, counts, lengths.reshape(lead)


def _composed(_: object, rows: Tensor, zero_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch's operations: the places where a row begins or a value differs from the one before."""
    n, length = rows.shape
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
    at = starts.flatten().nonzero().flatten()
    ends = torch.cat([at[1:], at.new_tensor([rows.numel()])]) if at.numel() else at
    counts, values, owner = ends - at, rows.flatten()[at].to(torch.int64), at // max(length, 1)
    if zero_first and length:
        # an empty run of zeros before a row that begins with ones
        ahead = (rows[:, 0] != 0).nonzero().flatten()
        key = torch.cat([2 * owner + 1, 2 * ahead])
        order = key.argsort(stable=True)
        counts = torch.cat([counts, torch.zeros_like(ahead)])[order]
        values = torch.cat([values, torch.zeros_like(ahead)])[order]
        owner = torch.cat([owner, ahead])[order]
    return values, counts, torch.bincount(owner, minlength=n)[:n]


def _check_runs(op: str, counts: Tensor, lengths: Tensor, size: Sequence[int]) -> Tensor:
    """The place behind each mask's last count; the values are looked at, on a GPU too."""
    for name, t in (("counts", counts), ("lengths", lengths)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: argument {name!r} must be a Tensor, got {type(t).__name__}")
    pixels = size[0] * size[1]
    ends = lengths.flatten().cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    if total != counts.numel() or bool((lengths < 0).any()) or bool((counts < 0).any()):
        raise ValueError(f"{op}: lengths must name all {counts.numel()} counts, and no count be negative")
    sums = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    found = sums[ends] - sums[ends - lengths.flatten()]
    if bool((found != pixels).any()):
        raise ValueError(f"{op}: the counts of each mask must add up to {size[0]} x {size[1]} = {pixels}")
    return ends


def _encode_fake(x: Tensor, zero_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    runs = torch.library.get_ctx().new_dynamic_size()
    shapes = ((runs,), (runs,), (x.shape[0],))
    return tuple(x.new_empty(shape, dtype=torch.int64) for shape in shapes)  # type: ignore[return-value]


_encode_op = Op("rle_encode", "(Tensor x, bool zero_first) -> (Tensor, Tensor, Tensor)", fake=_encode_fake)
