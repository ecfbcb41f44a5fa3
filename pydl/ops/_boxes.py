"""What the ops on boxes share: their arguments, and the agreement of two boxes in torch's operations.

The composition here is what runs where no kernel does, and what second derivatives are taken of.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KINDS = {"iou": 0, "generalized": 1, "distance": 2, "complete": 3}
# pairs that the composition holds at once: its dozen temporaries then stay in the cache
PAIRS_AT_ONCE = 1 << 16


def check_boxes(op: str, name: str, boxes: Tensor, dim: int) -> None:
    """TypeError or RuntimeError unless ``boxes`` is a real tensor [..., 4] of at least ``dim`` dimensions."""
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{op}: argument {name!r} must be a Tensor, got {type(boxes).__name__}")
    if boxes.dim() < dim or boxes.shape[-1] != 4:
        shape = "[..., N, 4]" if dim == 2 else "[..., 4]"
        raise RuntimeError(f"{op}: argument {name!r} must have shape {shape}, got {list(boxes.shape)}")
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise RuntimeError(f"{op}: argument {name!r} must hold floating-point numbers or integers, got {boxes.dtype}")


def two_sets(op: str, boxes1: Tensor, boxes2: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Both sets in one floating dtype: integers become float32, different floats the wider of the two."""
    check_boxes(op, "boxes1", boxes1, dim)
    check_boxes(op, "boxes2", boxes2, dim)
    if boxes1.device != boxes2.device:
        raise RuntimeError(
            f"{op}: argument 'boxes2' must be on the device of boxes1, {boxes1.device}, got {boxes2.device}"
        )
    if not boxes1.is_floating_point():
        boxes1 = boxes1.float()
    if not boxes2.is_floating_point():
        boxes2 = boxes2.float()
    if boxes1.dtype != boxes2.dtype:
        dtype = torch.promote_types(boxes1.dtype, boxes2.dtype)
        boxes1, boxes2 = boxes1.to(dtype), boxes2.to(dtype)
    return boxes1, boxes2


def check_eps(op: str, eps: float) -> float:
    """``eps`` as a float; TypeError if it is no number."""
    if isinstance(eps, bool) or (not isinstance(eps, (float, int)) and not hasattr(eps, "__float__")):
        raise TypeError(f"{op}: argument 'eps' must be a number, got {eps!r}")
    return float(eps)


def widened(boxes: Tensor) -> Tensor:
    """Half precision as float32: sums and products of coordinates overflow float16."""
    return boxes.float() if boxes.dtype.itemsize < 4 else boxes


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _angle(w: Tensor, h: Tensor, paired: bool) -> Tensor:
    """atan(w / h) whose gradient is finite also where h is 0; where both are 0 it is NaN, or 0 if ``paired``."""
    wide = w.abs() > h.abs()
    short, long = torch.where(wide, h, w), torch.where(wide, w, h)
    if paired:
        nothing = w.abs() + h.abs() < torch.finfo(w.dtype).tiny
        short, long = torch.where(nothing, 0.0, short), torch.where(nothing, 1.0, long)
    rest = torch.atan(short / long)
    sign = torch.where((w < 0) ^ (h < 0), -1.0, 1.0).to(w.dtype)
    return torch.where(wide, sign * (math.pi / 2) - rest, rest)


def agreement(kind: int, boxes1: tuple[Tensor, ...], boxes2: tuple[Tensor, ...], eps: float, paired: bool) -> Tensor:
    """IoU and its relatives of boxes given as x1, y1, x2, y2, broadcast against each other.

    With ``paired``, the form of the losses, eps is added to every denominator, and sides that only touch have no
    gradient of their overlap.
    """
    ax1, ay1, ax2, ay2 = boxes1
    bx1, by1, bx2, by2 = boxes2
    positive: Callable[[Tensor], Tensor] = torch.relu if paired else lambda t: t.clamp(min=0)
    inter = positive(torch.min(ax2, bx2) - torch.max(ax1, bx1)) * positive(torch.min(ay2, by2) - torch.max(ay1, by1))
    aw, ah, bw, bh = ax2 - ax1, ay2 - ay1, bx2 - bx1, by2 - by1
    union = aw * ah + bw * bh - inter
    in_union = eps if paired else 0.0
    iou = inter / (union + in_union)
    if kind == KINDS["iou"]:
        return iou
    hull_w, hull_h = torch.max(ax2, bx2) - torch.min(ax1, bx1), torch.max(ay2, by2) - torch.min(ay1, by1)
    if not paired:
        hull_w, hull_h = hull_w.clamp(min=0), hull_h.clamp(min=0)
    if kind == KINDS["generalized"]:
        hull = hull_w * hull_h
        return iou - (hull - union) / (hull + in_union)
    dx, dy = (ax1 + ax2) * 0.5 - (bx1 + bx2) * 0.5, (ay1 + ay2) * 0.5 - (by1 + by2) * 0.5
    value = iou - (dx * dx + dy * dy) / (hull_w * hull_w + hull_h * hull_h + eps)
    if kind == KINDS["complete"]:
        v = (_angle(aw, ah, paired) - _angle(bw, bh, paired)).square() * (4 / math.pi**2)
        value = value - (v / (1 - iou + v + eps)).detach() * v
    return value


def pairwise(kind: int, boxes1: Tensor, boxes2: Tensor, eps: float) -> Tensor:
    """[..., N, M] of [..., N, 4] and [..., M, 4], some rows at a time, without a temporary of N x M x 4."""
    boxes1, boxes2 = widened(boxes1), widened(boxes2)
    columns = tuple(c.unsqueeze(-2) for c in boxes2.unbind(-1))

    def rows(part: Tensor) -> Tensor:
        return agreement(kind, tuple(c.unsqueeze(-1) for c in part.unbind(-1)), columns, eps, False)

    if torch.compiler.is_compiling():  # the compiler fuses: nothing is held
        return rows(boxes1)
    n, m = boxes1.shape[-2], boxes2.shape[-2]
    at_once = max(1, PAIRS_AT_ONCE // max(1, m * math.prod(boxes1.shape[:-2])))
    if n <= at_once:
        return rows(boxes1)
    return torch.cat([rows(part) for part in boxes1.split(at_once, dim=-2)], dim=-2)


def second_derivative(
    function: Callable[[Tensor, Tensor], Tensor], saved: tuple[Tensor, ...], *cotangents: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients for ``saved`` = dy, boxes1, boxes2 of the sum of cotangents times the gradients of <dy, function>.

    Torch differentiates the function twice; the results can be differentiated again.
    """
    if all(v is None for v in cotangents):
        return None, None, None
    given = tuple(torch.zeros_like(b) if v is None else v for b, v in zip(saved[1:], cotangents, strict=True))

    def gradients(dy: Tensor, boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, ...]:
        first: tuple[Tensor, ...] = torch.func.vjp(function, boxes1, boxes2)[1](dy)
        return first

    second: tuple[Tensor, ...] = torch.func.vjp(gradients, *saved)[1](given)
    return second
