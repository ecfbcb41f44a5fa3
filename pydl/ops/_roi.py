"""What the RoI pooling ops share: checks of their arguments, boxes as the raw operators take them, layouts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Boxes = Tensor | Sequence[Tensor]
OutputSize = int | Sequence[int]


def check_input(op: str, input: Tensor) -> None:
    """Raise unless input is a floating tensor [N, C, H, W] with pixels."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: argument 'input' must be a Tensor, got {type(input).__name__}")
    if input.dim() != 4 or input.shape[2] == 0 or input.shape[3] == 0:
        raise RuntimeError(
            f"{op}: argument 'input' must have shape [N, C, H, W] with H, W > 0, got {list(input.shape)}"
        )
    if not input.is_floating_point():
        raise RuntimeError(f"{op}: argument 'input' must be a floating-point tensor, got {input.dtype}")


def pair(op: str, output_size: OutputSize) -> tuple[int, int]:
    """Height and width of the output, both positive."""
    values = list(output_size) if isinstance(output_size, (tuple, list)) else [output_size, output_size]
    if len(values) != 2:
        raise RuntimeError(f"{op}: argument 'output_size' must be an int or a pair of ints, got {output_size!r}")
    for value in values:
        if isinstance(value, bool) or not (isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")):
            raise TypeError(f"{op}: argument 'output_size' must be an int or a pair of ints, got {output_size!r}")
    height, width = (v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in values)  # type: ignore
    if height <= 0 or width <= 0:
        raise RuntimeError(f"{op}: argument 'output_size' must be greater than zero, got {output_size!r}")
    return height, width  # type: ignore[return-value]


def check_numbers(op: str, spatial_scale: float, sampling_ratio: int = -1) -> None:
    """Raise unless the scale is a number and the sampling ratio an int below 2^31."""
    if isinstance(spatial_scale, bool) or not isinstance(spatial_scale, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: argument 'spatial_scale' must be a number, got {spatial_scale!r}")
    if isinstance(sampling_ratio, bool) or not isinstance(sampling_ratio, int):
        raise TypeError(f"{op}: argument 'sampling_ratio' must be an int, got {sampling_ratio!r}")
    if sampling_ratio >= 2**31:
        raise RuntimeError(f"{op}: argument 'sampling_ratio' must be below 2^31, got {sampling_ratio}")


def as_rows(op: str, input: Tensor, boxes: Boxes) -> Tensor:
    """Boxes as [K, 5], in float64 for a float64 input, else in float32.

    Coordinates are read in the dtype they are given in. That may be float32 for an input in half precision, and
    anything under autocast.
    """
    if isinstance(boxes, (tuple, list)):
        rows = _joined(op, input, boxes)
    elif isinstance(boxes, Tensor):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise AssertionError(f"{op}: argument 'boxes' must have shape [K, 5], got {list(boxes.shape)}")
        rows = _read(op, input, boxes)
    else:
        raise AssertionError(
            f"{op}: argument 'boxes' must be a Tensor [K, 5] or a list of Tensors [L, 4], got {type(boxes).__name__}"
        )
    return rows.detach()


def _joined(op: str, input: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    for part in boxes:
        if not isinstance(part, Tensor) or part.dim() != 2 or part.shape[1] != 4:
            got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise AssertionError(f"{op}: argument 'boxes' must hold Tensors of shape [L, 4], got {got}")
    if len(boxes) > input.shape[0]:
        raise RuntimeError(
            f"{op}: argument 'boxes' must hold one Tensor for each of {input.shape[0]} images, got {len(boxes)}"
        )
    parts = [_read(op, input, part) for part in boxes]
    if not parts:
        return input.new_zeros((0, 5), dtype=_geometry(input))
    images = [part.new_full((part.shape[0], 1), n) for n, part in enumerate(parts)]
    return torch.cat([torch.cat(images), torch.cat(parts)], 1)


def _geometry(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _read(op: str, input: Tensor, boxes: Tensor) -> Tensor:
    """One tensor of boxes in the dtype of the geometry, where its own dtype may stand beside the input's."""
    geometry = _geometry(input)
    allowed = boxes.dtype in (input.dtype, geometry)
    if not allowed and not (boxes.is_floating_point() and torch.is_autocast_enabled(input.device.type)):
        raise RuntimeError(
            f"{op}: argument 'boxes' must have the dtype of 'input' ({input.dtype}), or float32 beside half precision, "
            f"got {boxes.dtype}"
        )
    if boxes.device != input.device:
        raise RuntimeError(
            f"{op}: argument 'boxes' must be on the device of 'input' ({input.device}), got {boxes.device}"
        )
    return boxes.to(geometry)


def channels_last(x: Tensor) -> bool:
    """Whether the strides descend in the order N, H, W, C: by this torch and the kernels choose the layout."""
    if x.stride(3) < x.stride(1):  # spares the two usual cases the 8 us of the question
        return False
    if x.shape[0] > 1 and x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last):
        return True
    return suggest_memory_format(x) is torch.channels_last


def empty(x: Tensor, size: Sequence[Any], last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [N, C, H, W] on the device of x in one of the two layouts."""
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=layout)
