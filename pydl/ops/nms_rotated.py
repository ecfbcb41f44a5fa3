"""Non-maximum suppression of rotated boxes: schema, fake and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op
from pydl.ops._nms_arguments import check_boxes

__all__ = ["nms_rotated"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DTYPES: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(("cpu", "cuda", "simt"), _FLOATS)
_FAMILY = Family("nms_rotated", ops=("nms_rotated",), order={"cpu": ("cpu",), "cuda": ("cuda",)}, dtypes=_DTYPES)
LARGEST_ANGLE = 1e12  # as in csrc/common/rotated_box.h


def nms_rotated(boxes: Tensor, scores: Tensor, iou_threshold: float, idxs: Tensor | None = None) -> Tensor:
    """Indices of the rotated boxes that greedy non-maximum suppression keeps.

    The convention is detectron2's: y points down, and a positive angle turns a box counter-clockwise as seen, so that
    its width lies along (cos, -sin) and its height along (sin, cos). mmcv takes radians, and clockwise by default.

    Args:
        boxes: [N, 5], floating point: centre x, centre y, width, height, and the angle in degrees.
        scores: [N], floating point.
        iou_threshold: boxes with an IoU above it with a kept box of a higher score are dropped.
        idxs: [N], the class of each box, any integers; only boxes of one class suppress each other. None: one class.

    Returns:
        int64 [K], indices by decreasing score. K depends on the data: on a GPU the call waits for it once, at its end.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: shapes that do not belong together, integer boxes, or classes that are no integers.

    IoU is computed in float64 for every dtype, and angles that are multiples of 90 degrees are exact. A box without an
    area, with a number that is not finite, or with an angle beyond 1e12 overlaps nothing. Equal scores keep their
    order, NaN scores come first. CPU and CUDA agree but for an IoU within rounding of the threshold.

    Source: Neubeck, Van Gool, "Efficient Non-Maximum Suppression", 2006; the area in common by Green's theorem, as the
    sum over one box's edges of the strip between each and the other box's middle.
    """
    check_boxes("nms_rotated", boxes, scores, idxs, iou_threshold, width=5)
    decision = choose(_FAMILY, boxes)
    classes = None if idxs is None else idxs.to(torch.int64)
    if decision.backend == "torch":
        return _torch_greedy(boxes, scores, classes, iou_threshold)
    kept: Tensor = _nms(decision, boxes, scores, classes, iou_threshold)
    return kept


def _torch_greedy(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    """The same result from torch's own operators, one round for each kept box."""
    wide = boxes.double()
    usable = wide.isfinite().all(1) & (wide[:, 2:4] > 0).all(1) & (wide[:, 4].abs() < LARGEST_ANGLE)
    usable &= (wide[:, 2] * wide[:, 3]).isfinite()
    angle = torch.deg2rad(wide[:, 4].fmod(360))
    wide = torch.cat([wide[:, :4], angle.cos()[:, None], angle.sin()[:, None]], 1)
    order = torch.argsort(scores, descending=True, stable=True)
    kept = []
    while order.numel():
        first, order = order[0], order[1:]
        kept.append(first)
        common = torch.where(usable[first] & usable[order], _common_area(wide[first], wide[order]), 0)
        areas = wide[first, 2] * wide[first, 3] + wide[order, 2] * wide[order, 3]
        stays = ~(common / (areas - common) > iou_threshold)
        if idxs is not None:
            stays |= idxs[order] != idxs[first]
        order = order[stays]
    return torch.stack(kept) if kept else order


def _common_area(a: Tensor, b: Tensor) -> Tensor:
    """Area that box a [6] and boxes b [M, 6] (x, y, w, h, cos, sin) have in common, as in csrc/common/rotated_box.h."""
    (ax, ay, aw, ah, ac, as_), (bx, by, bw, bh, bc, bs) = a.unbind(), b.unbind(1)
    x, y = (bx - ax) * ac - (by - ay) * as_, (bx - ax) * as_ + (by - ay) * ac
    cosine, sine = bc * ac + bs * as_, bc * as_ - bs * ac
    px, py, qx, qy = bw * cosine / 2, bw * sine / 2, -bh * sine / 2, bh * cosine / 2
    xs = torch.stack([x + px + qx, x - px + qx, x - px - qx, x + px - qx], 1)
    ys = torch.stack([y + py + qy, y - py + qy, y - py - qy, y + py - qy], 1)
    dx, dy = xs.roll(-1, 1) - xs, ys.roll(-1, 1) - ys
    start, end = xs.clamp(-aw / 2, aw / 2), (xs + dx).clamp(-aw / 2, aw / 2)
    y0, y1 = ys + _fraction(start - xs, dx) * dy, ys + _fraction(end - xs, dx) * dy
    low, high = y0.clamp(-ah / 2, ah / 2), y1.clamp(-ah / 2, ah / 2)
    enters, leaves = _fraction(low - y0, y1 - y0), _fraction(high - y0, y1 - y0)
    strips = (end - start) * (enters * low + (leaves - enters) * (low + high) / 2 + (1 - leaves) * high)
    return strips.sum(1).abs().minimum(aw * ah).minimum(bw * bh)


def _fraction(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole.abs() > 1e-290, part / whole, 0).clamp(0, 1)


def _nms_fake(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64)


_nms = Op("nms_rotated", "(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold) -> Tensor", fake=_nms_fake)
