"""Greedy suppression of rotated boxes in NumPy, with the intersection by clipping one polygon at the other's sides."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._spec import Case, Spec
from pydl.reference.nms import order_by_score


def corners(box: np.ndarray) -> np.ndarray:
    """The corners [4, 2], in order, of (cx, cy, w, h, degrees); the sides lie along (cos, -sin) and (sin, cos)."""
    angle = np.deg2rad(np.fmod(box[4], 360.0))
    along = np.array([np.cos(angle), -np.sin(angle)]) * box[2] / 2
    across = np.array([np.sin(angle), np.cos(angle)]) * box[3] / 2
    return box[:2] + np.array([along + across, across - along, -along - across, along - across])


def polygon_area(points: np.ndarray) -> float:
    """Signed area by the shoelace formula."""
    x, y = points.T
    return 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y))


def intersection(a: np.ndarray, b: np.ndarray) -> float:
    """Area that two boxes have in common: corners of one are cut at the other's sides (Sutherland, Hodgman 1974)."""
    origin = a[:2]
    clip, points = corners(a) - origin, list(corners(b) - origin)
    turn = np.sign(polygon_area(clip))
    for start, end in zip(clip, np.roll(clip, -1, axis=0), strict=True):
        side = end - start
        inside = [turn * (side[0] * (p[1] - start[1]) - side[1] * (p[0] - start[0])) for p in points]
        cut = []
        for i, p in enumerate(points):
            j = (i + 1) % len(points)
            if inside[i] >= 0:
                cut.append(p)
            if (inside[i] >= 0) != (inside[j] >= 0):
                cut.append(p + (points[j] - p) * (inside[i] / (inside[i] - inside[j])))
        points = cut
    return abs(polygon_area(np.array(points))) if len(points) > 2 else 0.0


def rotated_iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of one box with others; a box without an area or with a number that is not finite overlaps nothing."""
    with np.errstate(all="ignore"):
        iou = 0.0 / (box[2] * box[3] + others[:, 2] * others[:, 3])
    usable = np.isfinite(others).all(1) & (others[:, 2] > 0) & (others[:, 3] > 0)
    if not (np.isfinite(box).all() and box[2] > 0 and box[3] > 0):
        return iou
    # boxes whose centres are further apart than half of both diagonals do not meet
    reach = 0.5 * (np.hypot(box[2], box[3]) + np.hypot(others[:, 2], others[:, 3]))
    with np.errstate(invalid="ignore"):
        near = usable & (np.hypot(*(others[:, :2] - box[:2]).T) <= reach)
    for i in np.flatnonzero(near):
        common = intersection(box, others[i])
        iou[i] = common / (box[2] * box[3] + others[i, 2] * others[i, 3] - common)
    return iou


def nms_rotated(
    boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, idxs: np.ndarray | None = None
) -> np.ndarray:
    """Indices of the kept boxes [N, 5] by decreasing score."""
    boxes = np.asarray(boxes, dtype=np.float64)
    order, kept = order_by_score(scores), []
    while order.size:
        first, order = order[0], order[1:]
        kept.append(first)
        gone = rotated_iou(boxes[first], boxes[order]) > iou_threshold
        if idxs is not None:
            gone &= idxs[order] == idxs[first]
        order = order[~gone]
    return np.array(kept, dtype=np.int64)


def random_rotated(rng: np.random.Generator, n: int, extent: float = 60.0) -> np.ndarray:
    """Boxes with centres in a square, sides of 5 to 30, any angle."""
    center, side = rng.uniform(0, extent, (n, 2)), rng.uniform(5, 30, (n, 2))
    return np.concatenate([center, side, rng.uniform(-400, 400, (n, 1))], axis=1)


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(5)
    for n in (1, 2, 31, 64, 65, 100):  # one, a pair, below, at and above a warp or some vectors
        yield Case(f"{n} boxes", (random_rotated(rng, n), rng.uniform(0, 1, n), 0.3), layouts=n == 31)
    boxes, scores = random_rotated(rng, 80), rng.uniform(0, 1, 80)
    yield Case("low threshold", (boxes, scores, 0.05))
    yield Case("classes", (boxes, scores, 0.1, rng.integers(-1, 2, 80)))
    boxes[:, 4] = 37
    yield Case("one angle", (boxes, scores, 0.4))
    yield Case("one box thirty times", (np.tile([[20.0, 10, 8, 4, 30]], (30, 1)), rng.uniform(0, 1, 30), 0.9))
    yield Case("no boxes", (np.zeros((0, 5)), np.zeros(0), 0.5))


SPECS = (Spec("nms_rotated", "", nms_rotated, None, cases),)
