"""IoU losses of boxes in pairs: a large batch, an ordinary one, a sum, host cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench._case import Call, Case
from bench.bench_box_iou import boxes

FUNCTION = "generalized_box_iou_loss"
FUNCTIONS = ("generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss")

_BOTH = ("cpu", "cuda")
_TARGETS = {f"{device} {mode}": {"ratio_to_torch": 5.0} for device in _BOTH for mode in ("fwd", "bwd")}
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}


def _size(count: int, reduction: str = "none") -> dict[str, Any]:
    return {"count": count, "reduction": reduction}


CASES = [
    *(
        Case(f"{name}-100000", _size(100000), _BOTH, targets=_TARGETS, function=name, panel=name.startswith("complete"))
        for name in FUNCTIONS
    ),
    Case("sum-100000", _size(100000, "sum"), _BOTH),
    Case("ordinary-1000", _size(1000, "mean"), _BOTH),
    Case("host-8", _size(1), _BOTH, ("fwd",), _HOST, host=True),
    Case("host-8-grad", _size(1), _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True),
]


def torch_function(case: Case) -> Callable[..., Any]:
    """The usual composition; half precision in float32."""
    return composition(case.function or FUNCTION)


def composition(name: str) -> Callable[..., Tensor]:
    """The loss of that name in torch's operations, written straight from the formulas."""

    def loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
        if boxes1.dtype.itemsize < 4:
            boxes1, boxes2 = boxes1.float(), boxes2.float()
        ax1, ay1, ax2, ay2 = boxes1.unbind(-1)
        bx1, by1, bx2, by2 = boxes2.unbind(-1)
        w, h = torch.min(ax2, bx2) - torch.max(ax1, bx1), torch.min(ay2, by2) - torch.max(ay1, by1)
        inter = torch.where((w > 0) & (h > 0), w * h, 0.0)
        union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
        iou = inter / (union + eps)
        hull_w, hull_h = torch.max(ax2, bx2) - torch.min(ax1, bx1), torch.max(ay2, by2) - torch.min(ay1, by1)
        if name.startswith("generalized"):
            area = hull_w * hull_h
            value = 1 - (iou - (area - union) / (area + eps))
        else:
            dx, dy = (ax1 + ax2) / 2 - (bx1 + bx2) / 2, (ay1 + ay2) / 2 - (by1 + by2) / 2
            value = 1 - iou + (dx**2 + dy**2) / (hull_w**2 + hull_h**2 + eps)
        if name.startswith("complete"):
            angles = torch.atan((bx2 - bx1) / (by2 - by1)) - torch.atan((ax2 - ax1) / (ay2 - ay1))
            v = 4 / math.pi**2 * angles**2
            value = value + (v / (1 - iou + v + eps)).detach() * v
        return value if reduction == "none" else getattr(value, reduction)()

    return loss


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Boxes and others near them, as predictions are to their targets."""
    count = case.params["count"]
    first = boxes(count, torch.float32, device, generator)
    moved = first + torch.rand(count, 4, generator=generator, device=device) * 16 - 8
    pair = (moved.to(dtype), first.to(dtype))
    return Call((*pair, case.params["reduction"]), {}, pair, (7, 7))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: two boxes in, one loss out; bwd: dloss and the boxes in, their gradients out."""
    count, result = case.params["count"], max(itemsize, 4)
    return {
        "fwd": (count * (8 * itemsize + result), 60 * count),
        "bwd": (count * (16 * itemsize + result), 120 * count),
    }
