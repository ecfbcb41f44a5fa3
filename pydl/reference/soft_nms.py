"""Soft-NMS (Bodla et al. 2017) and Matrix NMS (Wang et al. 2020) in NumPy, from the papers' formulas."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._spec import Case, Spec
from pydl.reference.nms import box_iou, order_by_score, random_boxes


def soft_nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: str = "linear",
    idxs: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices and lowered scores of the boxes in the order in which they are taken, in the arrays' own precision."""
    scores = np.array(scores)
    left = np.flatnonzero(scores.astype(np.float64) >= score_threshold)
    taken, lowered = [], []
    while left.size:
        best = left[np.argmax(scores[left])]
        taken.append(best)
        lowered.append(scores[best])
        left = left[left != best]
        iou = box_iou(boxes[best], boxes[left])
        one = iou.dtype.type(1)
        if method == "linear":
            weight = np.where(iou.astype(np.float64) > iou_threshold, one - iou, one)
        else:
            weight = np.where(iou > 0, np.exp(-(iou * iou) / iou.dtype.type(sigma)), one)
        if idxs is not None:
            weight = np.where(idxs[left] == idxs[best], weight, one)
        scores[left] = scores[left] * weight
        left = left[scores[left].astype(np.float64) >= score_threshold]
    return np.array(taken, dtype=np.int64), np.array(lowered, dtype=scores.dtype)


def matrix_nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    idxs: np.ndarray | None = None,
    sigma: float = 2.0,
    method: str = "gaussian",
) -> np.ndarray:
    """Lowered scores in the order of the scores given; boxes are corners [N, 4] or masks [N, H, W]."""
    order = order_by_score(scores)
    lowered = np.array(scores, dtype=np.float64)
    covered = np.zeros(len(order))
    for place, j in enumerate(order):
        before = order[:place]
        iou = _iou(boxes[j], boxes[before])
        counts = iou > 0 if idxs is None else (iou > 0) & (idxs[before] == idxs[j])
        covered[place] = iou[counts].max(initial=0.0)
        iou, over = iou[counts], covered[:place][counts]
        if method == "gaussian":
            ratio = np.exp(-sigma * iou**2) / np.exp(-sigma * over**2)
        else:  # a box that is covered altogether has no say
            ratio = (1 - iou[over < 1]) / (1 - over[over < 1])
        lowered[j] *= ratio.min(initial=1.0)
    return lowered


def _iou(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    if one.ndim == 1:
        return box_iou(one, others).astype(np.float64)
    common = ((one != 0) & (others != 0)).sum((1, 2))
    return common / np.maximum(((one != 0) | (others != 0)).sum((1, 2)), 1)


def soft_cases() -> Iterator[Case]:
    rng = np.random.default_rng(41)
    for n in (1, 2, 33, 64, 120):  # one, a pair, more than two vectors, a warp's multiple, several decays of each
        boxes, scores = random_boxes(rng, n), rng.uniform(0, 1, n)
        yield Case(f"{n} boxes", (boxes, scores), layouts=n == 33)
        yield Case(f"{n} boxes, gaussian", (boxes, scores, 0.3, 0.5, 0.01, "gaussian"))
    yield Case("classes", (boxes, scores, 0.1, 0.5, 0.05, "linear", rng.integers(-1, 2, n)))
    yield Case("few scores, many ties", (boxes, rng.integers(0, 4, n) / 4.0, 0.3))
    yield Case("no boxes", (np.zeros((0, 4)), np.zeros(0)))


def matrix_cases() -> Iterator[Case]:
    rng = np.random.default_rng(20)
    for n in (1, 2, 33, 64, 90):
        boxes, scores = random_boxes(rng, n), rng.uniform(0, 1, n)
        yield Case(f"{n} boxes", (boxes, scores), layouts=n == 33)
    yield Case("linear", (boxes, scores, None, 2.0, "linear"))
    yield Case("classes", (boxes, scores, rng.integers(-1, 2, n), 1.5))
    yield Case("twins", (np.repeat(boxes[:30], 3, 0), np.repeat(rng.integers(1, 9, 30) / 8.0, 3), None, 2.0, "linear"))
    masks = rng.uniform(0, 1, (7, 9, 13)) < 0.4
    yield Case("masks", (masks.astype(np.float64), rng.uniform(0, 1, 7)))
    yield Case("no boxes", (np.zeros((0, 4)), np.zeros(0)))


SPECS = (
    Spec("soft_nms", "", soft_nms, None, soft_cases),
    Spec("matrix_nms", "", matrix_nms, None, matrix_cases),
)
