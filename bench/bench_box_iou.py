"""Pairwise IoU and its relatives: evaluation size, anchors against few boxes, small sets, host cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench._case import Call, Case

FUNCTION = "box_iou"
FUNCTIONS = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")

_BOTH = ("cpu", "cuda")
_TARGETS = {f"{device} {mode}": {"ratio_to_torch": 5.0} for device in _BOTH for mode in ("fwd", "bwd")}
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}


def _size(n: int, m: int) -> dict[str, Any]:
    return {"n": n, "m": m}


CASES = [
    *(
        Case(f"{name}-2000x2000", _size(2000, 2000), _BOTH, targets=_TARGETS, function=name, panel=name == "box_iou")
        for name in FUNCTIONS
    ),
    Case("anchors-100000x40", _size(100000, 40), _BOTH),
    Case("generalized_box_iou-anchors-100000x40", _size(100000, 40), _BOTH, function="generalized_box_iou"),
    Case("small-100x100", _size(100, 100), _BOTH),
    Case("host-8", _size(1, 1), _BOTH, ("fwd",), _HOST, host=True),
    Case("host-8-grad", _size(1, 1), _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True),
]


def torch_function(case: Case) -> Callable[..., Any]:
    """The usual composition, with temporaries of N x M x 2; half precision in float32."""
    return composition(case.function or FUNCTION)


def composition(name: str) -> Callable[..., Tensor]:
    """The function of that name in torch's operations, written straight from the formulas."""

    def agreement(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
        if boxes1.dtype.itemsize < 4:
            boxes1, boxes2 = boxes1.float(), boxes2.float()
        a, b = boxes1[:, None, :], boxes2[None, :, :]
        inter = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
        size1, size2 = boxes1[:, 2:] - boxes1[:, :2], boxes2[:, 2:] - boxes2[:, :2]
        union = size1.prod(-1)[:, None] + size2.prod(-1) - inter
        iou = inter / union
        if name == "box_iou":
            return iou
        hull = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).clamp(min=0)
        if name == "generalized_box_iou":
            area = hull[..., 0] * hull[..., 1]
            return iou - (area - union) / area
        apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
        distance = iou - apart.square().sum(-1) / (hull.square().sum(-1) + eps)
        if name == "distance_box_iou":
            return distance
        angle1, angle2 = torch.atan(size1[:, 0] / size1[:, 1]), torch.atan(size2[:, 0] / size2[:, 1])
        v = 4 / math.pi**2 * (angle1[:, None] - angle2).square()
        return distance - (v / (1 - iou + v + eps)).detach() * v

    return agreement


def boxes(count: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """Boxes of 16 to 80 pixels in an image of 256, which bfloat16 still tells apart."""
    start = torch.rand(count, 2, generator=generator, device=device) * 176
    size = torch.rand(count, 2, generator=generator, device=device) * 64 + 16
    return torch.cat((start, start + size), -1).to(dtype)


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    n, m = case.params["n"], case.params["m"]
    pair = (boxes(n, dtype, device, generator), boxes(m, dtype, device, generator))
    return Call(pair, {}, pair, (7 * m, 7 * n))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: boxes in, a 4-byte result for each pair out; bwd: dy and boxes in, their gradients out."""
    n, m = case.params["n"], case.params["m"]
    result = max(itemsize, 4)
    sets = 4 * (n + m) * itemsize
    return {"fwd": (n * m * result + sets, 15 * n * m), "bwd": (n * m * result + 2 * sets, 60 * n * m)}
