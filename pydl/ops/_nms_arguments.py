"""Checks that the ops share which select among boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_number(op: str, name: str, value: Any) -> None:
    """Refuses what is no number."""
    if not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)) and not hasattr(value, "__float__"):
        raise TypeError(f"{op}: argument {name!r} must be a number, got {value!r}")


def check_boxes(op: str, boxes: Any, scores: Any, idxs: Any, iou_threshold: Any, dim: int = 2, width: int = 4) -> None:
    """Refuses what the kernels cannot take. Good arguments cost one expression: the rest only finds the words.

    Args:
        op: name of the public function, for messages.
        boxes: must be [..., N, width], floating point.
        scores: must be [..., N], floating point.
        idxs: None, or must be [..., N], integers.
        iou_threshold: must be a number.
        dim: dimensions of boxes.
        width: numbers that describe a box.

    Raises:
        TypeError: something is no tensor, or no number.
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    if (
        isinstance(boxes, Tensor)
        and isinstance(scores, Tensor)
        and (idxs is None or _fits(idxs, scores))
        and isinstance(iou_threshold, float)
        and boxes.dim() == dim
        and boxes.shape[-1] == width
        and scores.shape == boxes.shape[:-1]
        and boxes.is_floating_point()
        and scores.is_floating_point()
        and scores.device == boxes.device
    ):
        return
    for name, value in (("boxes", boxes), ("scores", scores), ("idxs", idxs)):
        if not isinstance(value, Tensor) and (value is not None or name != "idxs"):
            raise TypeError(f"{op}: argument {name!r} must be a Tensor, got {type(value).__name__}")
    check_number(op, "iou_threshold", iou_threshold)
    batch = "B, " if dim == 3 else ""
    if boxes.dim() != dim or boxes.shape[-1] != width:
        raise RuntimeError(f"{op}: argument 'boxes' must have shape [{batch}N, {width}], got {list(boxes.shape)}")
    for name, value in (("scores", scores), ("idxs", idxs)):
        if value is None:
            continue
        wanted = boxes.shape[:-1]
        if value.shape != wanted:
            raise RuntimeError(
                f"{op}: argument {name!r} must have shape [{batch}N] = {list(wanted)}, got {list(value.shape)}"
            )
        if value.device != boxes.device:
            raise RuntimeError(f"{op}: argument {name!r} must be on {boxes.device} as boxes, got {value.device}")
    for name, value in (("boxes", boxes), ("scores", scores)):
        if not value.is_floating_point():
            raise RuntimeError(f"{op}: argument {name!r} must be floating point, got {value.dtype}")
    if idxs is not None and (idxs.is_floating_point() or idxs.is_complex()):
        raise RuntimeError(f"{op}: argument 'idxs' must be integers, got {idxs.dtype}")


def _fits(idxs: Any, scores: Tensor) -> bool:
    if not isinstance(idxs, Tensor) or idxs.is_floating_point() or idxs.is_complex():
        return False
    return idxs.shape == scores.shape and idxs.device == scores.device


def pair_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes [..., 4] with boxes of a shape that broadcasts, in torch's operators, as the kernels round it."""
    zero = a.new_zeros(())
    width = torch.fmax(torch.fmin(a[..., 2], b[..., 2]) - torch.fmax(a[..., 0], b[..., 0]), zero)
    height = torch.fmax(torch.fmin(a[..., 3], b[..., 3]) - torch.fmax(a[..., 1], b[..., 1]), zero)
    inter = width * height
    areas = [(box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b)]
    return inter / (areas[0] + areas[1] - inter)
