"""Run-length encoding of masks and label maps, with COCO's order and counts."""

from __future__ import annotations

import re
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
_MASKS = (torch.bool, torch.uint8)
# what the kernels take; other integers pass through int32
_LABELS = (torch.uint8, torch.int32, torch.int64)


def _family(name: str, op: str, dtypes: tuple[torch.dtype, ...]) -> Family:
    return Family(name, ops=(op,), order={"cpu": ("cpu",)}, dtypes={"cpu": dtypes})


_FAMILIES = {
    "rle_encode": _family("rle_encode", "rle_encode", _MASKS),
    "rle_encode_labels": _family("rle_encode_labels", "rle_encode_labels", _LABELS),
    "rle_decode": _family("rle_decode", "rle_decode", (torch.int64,)),
    "rle_decode_labels": _family("rle_decode_labels", "rle_decode_labels", _LABELS),
    "rle_to_string": _family("rle_to_string", "rle_to_text", (torch.int64,)),
    "rle_from_string": _family("rle_from_string", "rle_from_text", (torch.uint8,)),
}


def rle_encode(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the runs of zeros and ones of each mask, column by column, zeros first: COCO's counts.

    Args:
        masks: [..., H, W], bool, or uint8, of which all but 0 are ones.

    Returns:
        counts, int64 [sum of lengths], those of all masks one after the other; and lengths, int64 [...], how many
        belong to each. A mask that begins with a one has a first count of 0.

    Raises:
        TypeError: no tensor.
        RuntimeError: another dtype or fewer than two dimensions.

    The size of counts depends on the data; on a GPU the composed torch operations wait for it.
    """
    _check("rle_encode", masks, _MASKS)
    decision = choose(_FAMILIES["rle_encode"], masks)
    if decision.backend == "torch":
        _, counts, lengths = _encode_composed(masks != 0, zero_first=True)
        return counts, lengths
    result: tuple[Tensor, Tensor] = _encode(decision, masks)
    return result


def rle_encode_labels(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values and lengths of the runs of equal labels of each map, column by column.

    Args:
        labels: [..., H, W], integers.

    Returns:
        values, in the dtype of labels, and counts, int64, both [sum of lengths], those of all maps one after the other;
        and lengths, int64 [...].

    Raises:
        TypeError: no tensor.
        RuntimeError: another dtype or fewer than two dimensions.
    """
    _check("rle_encode_labels", labels, _INTEGERS)
    given = labels if labels.dtype in _LABELS else labels.int()
    decision = choose(_FAMILIES["rle_encode_labels"], given)
    if decision.backend == "torch":
        values, counts, lengths = _encode_composed(given, zero_first=False)
    else:
        values, counts, lengths = _encode_labels(decision, given)
    return values.to(labels.dtype), counts, lengths


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
    counts, lengths = _check_runs("rle_decode", counts, lengths, size)
    decision = choose(_FAMILIES["rle_decode"], counts)
    if decision.backend == "torch":
        # the runs of each mask begin anew with zeros
        each = lengths.flatten()
        first = torch.repeat_interleave(each.cumsum(0) - each, each)
        values = (torch.arange(counts.numel(), device=counts.device) - first) % 2 == 1
        return _decode_composed(values, counts, lengths, size)
    masks: Tensor = _decode(decision, counts, lengths, size[0], size[1])
    return masks


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
    op = "rle_decode_labels"
    if not isinstance(values, Tensor) or values.dtype not in _INTEGERS:
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{op}: argument 'values' must be a Tensor of integers, got {kind}")
    counts, lengths = _check_runs(op, counts, lengths, size)
    if values.shape != counts.shape:
        raise ValueError(f"{op}: argument 'values' must have the shape of 'counts', got {[*values.shape]}")
    given = values if values.dtype in _LABELS else values.int()
    decision = choose(_FAMILIES[op], given)
    if decision.backend == "torch":
        return _decode_composed(values, counts, lengths, size)
    labels: Tensor = _decode_labels(decision, given, counts, lengths, size[0], size[1])
    return labels.to(values.dtype)


def rle_to_string(counts: Tensor) -> str:
    """COCO's compressed text of one mask's counts.

    Args:
        counts: int [R].

    Returns:
        str: each count, from the fourth on minus the one two before, in groups of five bits, lowest first, the sixth
        bit saying that more follow, written as characters from "0" on.

    Raises:
        TypeError: no tensor of integers.
        RuntimeError: not one dimension.
        ValueError: a negative count.
    """
    counts = _integers("rle_to_string", "counts", counts).cpu()
    if counts.dim() != 1:
        raise RuntimeError(f"rle_to_string: argument 'counts' must be those of one mask, got shape {[*counts.shape]}")
    if bool((counts < 0).any()):
        raise ValueError(f"rle_to_string: argument 'counts' must not be negative, got {int(counts.min())}")
    decision = choose(_FAMILIES["rle_to_string"], counts)
    if decision.backend == "torch":
        return _to_text_composed(counts).decode("ascii")
    text: Tensor = _to_text(decision, counts)
    return text.numpy().tobytes().decode("ascii")


def rle_from_string(text: str | bytes) -> Tensor:
    """The counts of one mask from COCO's compressed text.

    Args:
        text: as from :func:`rle_to_string`; bytes are taken too.

    Returns:
        counts, int64 [R].

    Raises:
        TypeError: no text.
        ValueError: a character that cannot occur, a number that is too long or negative, or a text that ends within
            one.
    """
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"rle_from_string: argument 'text' must be a str or bytes, got {type(text).__name__}")
    data = text if isinstance(text, bytes) else text.encode("latin-1", "replace")
    odd = re.search(rb"[^0-o]", data)
    if odd:
        raise ValueError(f"rle_from_string: character {odd.group().decode('latin-1')!r} cannot occur")
    if re.search(rb"[P-o]{13}", data):
        raise ValueError("rle_from_string: a number has more than 13 characters, the size of 64 bits")
    if re.search(rb"[P-o]$", data):
        raise ValueError("rle_from_string: the text ends within a number")
    characters = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    decision = choose(_FAMILIES["rle_from_string"], characters)
    counts = _from_text_composed(data) if decision.backend == "torch" else _from_text(decision, characters)
    if bool((counts < 0).any()):
        raise ValueError(f"rle_from_string: a count is negative or beyond 64 bits, {int(counts.min())}")
    return counts


def _check(op: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: the first argument must be a Tensor, got {type(x).__name__}")
    if x.dim() < 2 or x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise RuntimeError(f"{op}: the first argument must be {names} of shape [..., H, W], got {x.dtype} {[*x.shape]}")


def _integers(op: str, name: str, t: Tensor) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype not in _INTEGERS:
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{op}: argument {name!r} must be a Tensor of integers, got {kind}")
    return t.long()


def _check_runs(op: str, counts: Tensor, lengths: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both as int64; the values are looked at, on a GPU too."""
    counts, lengths = _integers(op, "counts", counts), _integers(op, "lengths", lengths)
    if not isinstance(size, Sequence) or len(size) != 2 or any(n < 0 for n in size):
        raise ValueError(f"{op}: argument 'size' must be (H, W), got {size!r}")
    pixels, each = size[0] * size[1], lengths.flatten()
    # no count beyond the pixels: then no sum can pass 64 bits
    bad = (each < 0).any() | (each > counts.numel()).any() | (counts < 0).any() | (counts > pixels).any()
    if counts.dim() != 1 or bool(bad) or int(each.sum()) != counts.numel():
        raise ValueError(
            f"{op}: lengths must name all {counts.numel()} counts, and no count be negative or beyond {pixels} pixels"
        )
    ends = each.cumsum(0)
    sums = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    found = sums[ends] - sums[ends - each]
    if bool((found != pixels).any()):
        raise ValueError(f"{op}: the counts of each mask must add up to {size[0]} x {size[1]} = {pixels}")
    return counts, lengths


def _encode_composed(planes: Tensor, zero_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values, counts and lengths in torch's operations: the places where a value differs from the one before."""
    lead = planes.shape[:-2]
    rows = planes.transpose(-1, -2).reshape(lead.numel(), planes.shape[-1] * planes.shape[-2])
    if zero_first:  # a zero ahead: its run is one too long
        rows = torch.cat([rows.new_zeros(len(rows), 1), rows], 1)
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
    at = starts.flatten().nonzero().flatten()
    ends = torch.cat([at[1:], at.new_tensor([rows.numel()])]) if at.numel() else at
    counts, lengths = ends - at, starts.sum(1)
    if zero_first:
        counts[lengths.cumsum(0) - lengths] -= 1
    return rows.flatten()[at], counts, lengths.reshape(lead)


def _decode_composed(values: Tensor, counts: Tensor, lengths: Tensor, size: Sequence[int]) -> Tensor:
    flat = torch.repeat_interleave(values, counts)
    return flat.reshape(*lengths.shape, size[1], size[0]).transpose(-1, -2).contiguous()


def _to_text_composed(counts: Tensor) -> bytes:
    numbers, text = counts.tolist(), bytearray()
    for i, count in enumerate(numbers):
        rest, more = count - (numbers[i - 2] if i > 2 else 0), True
        while more:
            group, rest = rest & 31, rest >> 5
            more = rest != (-1 if group & 16 else 0)
            text.append(48 + (group | (32 if more else 0)))
    return bytes(text)


def _from_text_composed(data: bytes) -> Tensor:
    counts: list[int] = []
    value = shift = 0
    for byte in data:
        value |= (byte - 48 & 31) << shift
        shift += 5
        if byte < 80:
            value -= (1 << shift) if byte - 48 & 16 else 0
            value += counts[-2] if len(counts) > 2 else 0
            counts.append((value + 2**63) % 2**64 - 2**63)  # as 64 bits hold it
            value = shift = 0
    return torch.tensor(counts, dtype=torch.int64)


def _unknown(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A vector whose size only the data tells."""
    return like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=dtype)


def _encode_fake(masks: Tensor) -> tuple[Tensor, Tensor]:
    return _unknown(masks, torch.int64), masks.new_empty(masks.shape[:-2], dtype=torch.int64)


def _encode_labels_fake(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = _unknown(labels, labels.dtype)
    return values, torch.empty_like(values, dtype=torch.int64), labels.new_empty(labels.shape[:-2], dtype=torch.int64)


def _decode_fake(counts: Tensor, lengths: Tensor, height: int, width: int) -> Tensor:
    return counts.new_empty((*lengths.shape, height, width), dtype=torch.bool)


def _decode_labels_fake(values: Tensor, counts: Tensor, lengths: Tensor, height: int, width: int) -> Tensor:
    return values.new_empty((*lengths.shape, height, width))


_encode = Op("rle_encode", "(Tensor masks) -> (Tensor, Tensor)", fake=_encode_fake)
_encode_labels = Op("rle_encode_labels", "(Tensor labels) -> (Tensor, Tensor, Tensor)", fake=_encode_labels_fake)
_decode = Op("rle_decode", "(Tensor counts, Tensor lengths, SymInt height, SymInt width) -> Tensor", fake=_decode_fake)
_decode_labels = Op(
    "rle_decode_labels",
    "(Tensor values, Tensor counts, Tensor lengths, SymInt height, SymInt width) -> Tensor",
    fake=_decode_labels_fake,
)
_to_text = Op("rle_to_text", "(Tensor counts) -> Tensor", fake=lambda counts: _unknown(counts, torch.uint8))
_from_text = Op("rle_from_text", "(Tensor text) -> Tensor", fake=lambda text: _unknown(text, torch.int64))
