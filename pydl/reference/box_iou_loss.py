"""IoU losses of boxes in pairs in NumPy float64: 1 - GIoU, 1 - DIoU and 1 - CIoU with eps in every denominator.

The formulas and their sources are in :mod:`pydl.reference.box_iou`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._spec import Case, Spec
from pydl.reference.box_iou import TERMS, agreement, agreement_grad, distinct_boxes, random_boxes

Array = np.ndarray


def loss(kind: str, boxes1: Array, boxes2: Array, reduction: str = "none", eps: float = 1e-7) -> Array:
    """ "generalized", "distance" or "complete" loss of [..., 4] and [..., 4]; the mean of no boxes is 0."""
    each = 1.0 - agreement(kind, boxes1, boxes2, eps, paired=True)
    if reduction == "none":
        return each
    return np.asarray(each.sum() if reduction == "sum" or each.size == 0 else each.mean())


def loss_grad(
    kind: str, dy: Array, boxes1: Array, boxes2: Array, reduction: str = "none", eps: float = 1e-7
) -> tuple[Array, Array]:
    """Gradients of sum(dy * loss)."""
    shape = boxes1.shape[:-1]
    share = 1.0 / max(1, int(np.prod(shape))) if reduction == "mean" else 1.0
    return agreement_grad(kind, -share * np.broadcast_to(dy, shape), boxes1, boxes2, eps, paired=True)


def _cases(kind: str) -> Iterator[Case]:
    rng = np.random.default_rng(19)

    def near(boxes: Array) -> Array:
        """Boxes moved by half their size: losses near 1, beside which their rounding is small."""
        return boxes + 5.0 + rng.uniform(-1.5, 1.5, boxes.shape)

    for n in (1, 7, 31, 521):  # primes: no vector or block divides them
        boxes = random_boxes(rng, n)
        yield Case(f"{n} pairs", (boxes, near(boxes)), layouts=n == 31)
    boxes = random_boxes(rng, 3, 5)
    yield Case("3 x 5 pairs", (boxes, near(boxes)))
    yield Case("one box", (boxes[0, 0], near(boxes[0, 0])))
    for reduction in ("mean", "sum"):
        boxes = random_boxes(rng, 67)
        yield Case(reduction, (boxes, near(boxes), reduction))
        yield Case(f"{reduction} of none", (np.zeros((0, 4)), np.zeros((0, 4)), reduction))
    yield Case("eps", (boxes[:9], near(boxes[:9]), "none", 0.5))
    seven = distinct_boxes(rng, kind == "complete")  # one proportion: the trade-off is 0
    yield Case("distinct", (seven, np.roll(seven, 2, 0)), second=True)
    yield Case("no pairs", (np.zeros((0, 4)), np.zeros((0, 4))))
    some = near(boxes)
    some[3:5] = boxes[3:5]
    yield Case("two of them identical", (boxes, some))
    touching = np.array([[0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [1, 1, 3, 3]], np.float64)
    yield Case("touching and nested", (touching, np.roll(touching, 1, 0)))
    yield Case("far apart", (random_boxes(rng, 5), random_boxes(rng, 5) + 96.0))
    large = 2700.0 * random_boxes(rng, 9)
    yield Case("large", (large, near(large / 2700.0) * 2700.0))  # up to 6.5e4, the end of float16
    flat = np.array([[1, 1, 1, 1], [1, 1, 1, 5], [1, 1, 5, 1], [2, 2, 6, 6]], np.float64)
    pairs = [np.repeat(flat, 4, 0), np.tile(flat, (4, 1))]
    yield Case("no area", (pairs[0], pairs[1]))
    yield Case("a point against itself", (flat[:1], flat[:1].copy()))
    odd = random_boxes(rng, 8)
    odd[0, 1], odd[1, 2], odd[2, 0], odd[3, :] = np.nan, np.inf, -np.inf, np.nan
    odd[5] = odd[5, [2, 3, 0, 1]]  # corners swapped
    yield Case("NaN, inf, swapped", (odd, odd[::-1].copy()), gradients=False)


def _spec(name: str, kind: str) -> Spec:
    def forward(boxes1: Array, boxes2: Array, reduction: str = "none", eps: float = 1e-7) -> Array:
        return loss(kind, boxes1, boxes2, reduction, eps)

    def gradient(
        dy: Array, boxes1: Array, boxes2: Array, reduction: str = "none", eps: float = 1e-7
    ) -> tuple[Array, Array]:
        return loss_grad(kind, dy, boxes1, boxes2, reduction, eps)

    return Spec(name, "", forward, gradient, lambda: _cases(kind), lambda *args: (TERMS, TERMS), widened=True)


SPECS = (
    _spec("generalized_box_iou_loss", "generalized"),
    _spec("distance_box_iou_loss", "distance"),
    _spec("complete_box_iou_loss", "complete"),
)
