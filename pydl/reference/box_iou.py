"""Agreement of axis-aligned boxes x1, y1, x2, y2 in NumPy float64, from the formulas.

IoU = I / U. GIoU = IoU - (H - U) / H with H the area of the smallest box around both (Rezatofighi et al., "Generalized
Intersection over Union", CVPR 2019). DIoU = IoU - d^2 / c^2 with the distance d of the centres and the diagonal c of
that box, CIoU = DIoU - a v with v = 4 / pi^2 (atan(w1 / h1) - atan(w2 / h2))^2 and a = v / (1 - IoU + v), which counts
as a constant in the gradient (Zheng et al., "Distance-IoU Loss", AAAI 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pydl.reference._spec import Case, Spec

Array = np.ndarray
# a coordinate's gradient adds the derivatives of intersection, union and areas, hull, centres, width and angle
TERMS = 7


def _angle(size: Array, paired: bool) -> Array:
    """atan(w / h); 0 / 0 counts as 0 in the losses."""
    w, h = size[..., 0], size[..., 1]
    nothing = (w == 0) & (h == 0) & paired
    return np.where(nothing, 0.0, np.arctan(np.where(nothing, 0.0, w) / np.where(nothing, 1.0, h)))


class _Pair:
    """The quantities of the formulas for arrays of boxes a and b that broadcast against each other."""

    def __init__(self, a: Array, b: Array, eps: float, paired: bool) -> None:
        self.a, self.b, self.eps, self.paired = a, b, eps, paired
        self.size_a, self.size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]  # w, h
        self.overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
        self.hull = np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])
        # np.maximum keeps NaN
        self.inside = np.maximum(self.overlap, 0.0)
        self.around = self.hull if paired else np.maximum(self.hull, 0.0)
        self.inter = self.inside.prod(-1)
        self.union = self.size_a.prod(-1) + self.size_b.prod(-1) - self.inter
        self.over_union = self.union + (eps if paired else 0.0)
        self.iou = self.inter / self.over_union
        self.hull_area = self.around.prod(-1)
        self.over_hull = self.hull_area + (eps if paired else 0.0)
        self.apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
        self.diagonal = (self.around**2).sum(-1) + eps
        self.turn = _angle(self.size_a, paired) - _angle(self.size_b, paired)
        self.v = 4 / np.pi**2 * self.turn**2
        self.tradeoff = self.v / (1 - self.iou + self.v + eps)


@np.errstate(all="ignore")
def agreement(kind: str, a: Array, b: Array, eps: float = 0.0, paired: bool = False) -> Array:
    """ "iou", "generalized", "distance" or "complete" of boxes that broadcast; `paired` is the form of the losses."""
    p = _Pair(a, b, eps, paired)
    if kind == "iou":
        return p.iou
    if kind == "generalized":
        return p.iou - (p.hull_area - p.union) / p.over_hull
    distance = p.iou - (p.apart**2).sum(-1) / p.diagonal
    return distance if kind == "distance" else distance - p.tradeoff * p.v


def _other(values: Array) -> Array:
    """Height for width and width for height."""
    return values[..., ::-1]


@np.errstate(all="ignore")
def agreement_grad(
    kind: str, dy: Array, a: Array, b: Array, eps: float = 0.0, paired: bool = False
) -> tuple[Array, Array]:
    """Gradients of sum(dy * agreement), not yet summed over what was broadcast.

    Of equal coordinates each has half of the gradient of their maximum. Sides that just touch have a gradient of their
    overlap in the pairwise form, none in the losses.
    """
    p = _Pair(a, b, eps, paired)
    d_union = -p.iou / p.over_union
    d_hull = np.zeros_like(p.overlap)  # with respect to the hull's width and height
    d_centre = np.zeros_like(p.overlap)
    d_size_a, d_size_b = np.zeros_like(p.overlap), np.zeros_like(p.overlap)
    if kind == "generalized":
        d_union = d_union + 1 / p.over_hull
        slope = -(p.union + (p.over_hull - p.hull_area)) / p.over_hull**2
        d_hull = slope[..., None] * _other(p.around)
    elif kind in ("distance", "complete"):
        d_centre = -2 * p.apart / p.diagonal[..., None]
        d_hull = 2 * p.around * ((p.apart**2).sum(-1) / p.diagonal**2)[..., None]
    if not paired:
        d_hull = np.where(p.hull >= 0, d_hull, 0.0)
    d_size_a = d_size_a + d_union[..., None] * _other(p.size_a)
    d_size_b = d_size_b + d_union[..., None] * _other(p.size_b)
    if kind == "complete":
        d_angle = (-p.tradeoff * 8 / np.pi**2 * p.turn)[..., None]
        d_size_a = d_size_a + d_angle * _angle_slope(p.size_a)
        d_size_b = d_size_b - d_angle * _angle_slope(p.size_b)
    d_inter = 1 / p.over_union - d_union
    counted = p.overlap > 0 if paired else p.overlap >= 0
    d_overlap = np.where(counted, d_inter[..., None] * _other(p.inside), 0.0)
    a_starts = _share(np.broadcast_to(a[..., :2], p.overlap.shape), b[..., :2])
    b_ends = _share(np.broadcast_to(b[..., 2:], p.overlap.shape), a[..., 2:])
    starts_a = d_centre / 2 - d_size_a - d_overlap * a_starts - d_hull * (1 - a_starts)
    starts_b = -d_centre / 2 - d_size_b - d_overlap * (1 - a_starts) - d_hull * a_starts
    ends_a = d_centre / 2 + d_size_a + d_overlap * b_ends + d_hull * (1 - b_ends)
    ends_b = -d_centre / 2 + d_size_b + d_overlap * (1 - b_ends) + d_hull * b_ends
    dy = np.asarray(dy)[..., None]
    return dy * np.concatenate((starts_a, ends_a), -1), dy * np.concatenate((starts_b, ends_b), -1)


def _share(x: Array, y: Array) -> Array:
    """Derivative of max(x, y) by x."""
    return np.where(x > y, 1.0, np.where(x == y, 0.5, 0.0))


def _angle_slope(size: Array) -> Array:
    """Derivatives of atan(w / h) by w and h; zero for a box of no extent."""
    w, h = size[..., 0], size[..., 1]
    square = w**2 + h**2
    slope = np.stack((h, -w), -1) / np.where(square == 0, 1.0, square)[..., None]
    return np.where(square[..., None] == 0, 0.0, slope)


def _all_pairs(a: Array, b: Array) -> tuple[Array, Array]:
    return a[..., :, None, :], b[..., None, :, :]


def as_corners(boxes: Array, fmt: str) -> Array:
    """Corners of boxes given as "xyxy", "xywh" or "cxcywh"."""
    first, size = boxes[..., :2], boxes[..., 2:]
    if fmt == "cxcywh":
        return np.concatenate((first - size / 2, first + size / 2), -1)
    return boxes if fmt == "xyxy" else np.concatenate((first, first + size), -1)


def _from_corners(d: Array, fmt: str) -> Array:
    """The gradient of the given form from that of the corners."""
    start, end = d[..., :2], d[..., 2:]
    if fmt == "xywh":
        return np.concatenate((start + end, end), -1)
    return d if fmt == "xyxy" else np.concatenate((start + end, (end - start) / 2), -1)


def box_iou(boxes1: Array, boxes2: Array, fmt: str = "xyxy") -> Array:
    """[..., N, M] of [..., N, 4] and [..., M, 4]."""
    return agreement("iou", *_all_pairs(as_corners(boxes1, fmt), as_corners(boxes2, fmt)))


def box_iou_grad(dy: Array, boxes1: Array, boxes2: Array, fmt: str = "xyxy") -> tuple[Array, Array]:
    """Gradients of sum(dy * box_iou)."""
    pairs = _all_pairs(as_corners(boxes1, fmt), as_corners(boxes2, fmt))
    da, db = agreement_grad("iou", dy, *pairs)
    return _from_corners(da.sum(-2), fmt), _from_corners(db.sum(-3), fmt)


def _function(kind: str, eps: float) -> tuple[Callable[..., Array], Callable[..., tuple[Array, Array]]]:
    def forward(boxes1: Array, boxes2: Array, eps: float = eps) -> Array:
        return agreement(kind, *_all_pairs(boxes1, boxes2), eps)

    def gradient(dy: Array, boxes1: Array, boxes2: Array, eps: float = eps) -> tuple[Array, Array]:
        da, db = agreement_grad(kind, dy, *_all_pairs(boxes1, boxes2), eps)
        return da.sum(-2), db.sum(-3)

    return forward, gradient


def random_boxes(rng: np.random.Generator, *shape: int) -> Array:
    """Boxes of about 12 pixels a few pixels apart: every two overlap, so that no result is small beside the others."""
    start = rng.uniform(0.0, 3.0, (*shape, 2))
    return np.concatenate((start, start + rng.uniform(10.0, 14.0, (*shape, 2))), -1)


def distinct_boxes(rng: np.random.Generator, square: bool) -> Array:
    """Seven boxes of integers no two of which are equal along an axis: no kink nearby in any dtype."""
    order = rng.permutation(7)
    if square:  # starts are multiples of 4, ends are odd
        start = 4.0 * np.stack((order, 2 * order % 7), -1)
        return np.concatenate((start, start + 15.0 + 4.0 * order[:, None]), -1)
    x, y = (np.sort(rng.permutation(28)[:14].reshape(2, 7), 0) for _ in range(2))
    return np.stack((x[0], y[0], x[1], y[1]), -1).astype(np.float64)


def _cases(kind: str) -> Iterator[Case]:
    rng = np.random.default_rng(17)
    for n, m in ((1, 1), (7, 31), (67, 5), (2, 521)):  # primes: no vector, tile or block divides them
        yield Case(f"{n} x {m}", (random_boxes(rng, n), random_boxes(rng, m)), layouts=n == 7)
    yield Case("batch", (random_boxes(rng, 2, 3), random_boxes(rng, 2, 5)))
    seven = distinct_boxes(rng, kind == "complete")  # one proportion: the trade-off is 0
    yield Case("distinct", (seven[:3], seven[3:]), second=True)
    yield Case("empty", (np.zeros((0, 4)), random_boxes(rng, 3)))
    yield Case("no columns", (random_boxes(rng, 3), np.zeros((0, 4))))
    same = random_boxes(rng, 5)
    yield Case("identical", (same, same.copy()))
    touching = np.array([[0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 8, 8], [1, 1, 3, 3]], np.float64)
    yield Case("touching and nested", (touching, touching[::-1].copy()))
    yield Case("far apart", (random_boxes(rng, 5), random_boxes(rng, 4) + 96.0))
    yield Case(
        "large", (3800.0 * random_boxes(rng, 6), 3800.0 * random_boxes(rng, 9))
    )  # up to 6.5e4, the end of float16
    flat = np.array([[1, 1, 1, 1], [1, 1, 1, 5], [1, 1, 5, 1], [2, 2, 6, 6]], np.float64)
    yield Case("no area", (flat, flat.copy()), gradients=False)
    odd = random_boxes(rng, 8)
    odd[0, 1], odd[1, 2], odd[2, 0], odd[3, :] = np.nan, np.inf, -np.inf, np.nan
    odd[4] = [-np.inf, -np.inf, np.inf, np.inf]
    odd[5] = odd[5, [2, 3, 0, 1]]  # corners swapped
    yield Case("NaN, inf, swapped", (odd, odd[::-1].copy()), gradients=False)


def _box_iou_cases() -> Iterator[Case]:
    yield from _cases("iou")
    rng = np.random.default_rng(18)
    for fmt in ("xywh", "cxcywh"):
        sized = [random_boxes(rng, n) - [0, 0, 1, 1] for n in (5, 6)]
        yield Case(fmt, (*sized, fmt))


def _reductions(boxes1: Array, boxes2: Array, *args: Any) -> tuple[int, ...]:
    return TERMS * max(1, boxes2.shape[-2]), TERMS * max(1, boxes1.shape[-2])


def _spec(name: str, kind: str, eps: float) -> Spec:
    forward, gradient = _function(kind, eps)
    return Spec(name, "", forward, gradient, lambda: _cases(kind), _reductions, widened=True)


SPECS = (
    Spec("box_iou", "", box_iou, box_iou_grad, _box_iou_cases, _reductions, widened=True),
    _spec("generalized_box_iou", "generalized", 0.0),
    _spec("distance_box_iou", "distance", 1e-7),
    _spec("complete_box_iou", "complete", 1e-7),
)
