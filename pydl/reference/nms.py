"""Greedy non-maximum suppression in NumPy, box by box, in the precision of the boxes it is given."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._spec import Case, Spec


def order_by_score(scores: np.ndarray) -> np.ndarray:
    """Indices by decreasing score; NaN comes first, equal scores keep their order."""
    scores = np.asarray(scores, dtype=np.float64)
    return np.lexsort((np.where(np.isnan(scores), 0.0, -scores), ~np.isnan(scores)))


def box_iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """inter / (area + areas - inter) of one box with others, in their dtype; corners are x1, y1, x2, y2."""
    zero = others.dtype.type(0)
    with np.errstate(all="ignore"):
        area = (box[2] - box[0]) * (box[3] - box[1])
        areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
        width = np.fmax(np.fmin(box[2], others[:, 2]) - np.fmax(box[0], others[:, 0]), zero)
        height = np.fmax(np.fmin(box[3], others[:, 3]) - np.fmax(box[1], others[:, 1]), zero)
        inter = width * height
        return inter / (area + areas - inter)


def greedy(boxes: np.ndarray, order: np.ndarray, idxs: np.ndarray | None, iou_threshold: float) -> np.ndarray:
    """The boxes of `order` that no kept box before them suppresses: IoU above the threshold, same class."""
    boxes = np.asarray(boxes)
    boxes = boxes if boxes.dtype == np.float32 else boxes.astype(np.float64)
    kept = []
    while order.size:
        first, order = order[0], order[1:]
        kept.append(first)
        gone = box_iou(boxes[first], boxes[order]).astype(np.float64) > iou_threshold
        if idxs is not None:
            gone &= idxs[order] == idxs[first]
        order = order[~gone]
    return np.array(kept, dtype=np.int64)


def nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Indices of the kept boxes [N, 4] by decreasing score."""
    return greedy(boxes, order_by_score(scores), None, iou_threshold)


def batched_nms(boxes: np.ndarray, scores: np.ndarray, idxs: np.ndarray, iou_threshold: float) -> np.ndarray:
    """As nms, but only boxes of one class suppress each other."""
    return greedy(boxes, order_by_score(scores), np.asarray(idxs), iou_threshold)


def nms_padded(
    boxes: np.ndarray,
    scores: np.ndarray,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None = None,
    idxs: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """nms of each image among its boxes above the score threshold, cut or filled with -1 to max_output."""
    indices = np.full((len(boxes), max_output), -1, dtype=np.int64)
    counts = np.zeros(len(boxes), dtype=np.int64)
    for image in range(len(boxes)):
        order = order_by_score(scores[image])
        if score_threshold is not None:
            order = order[np.asarray(scores[image], dtype=np.float64)[order] > score_threshold]
        kept = greedy(boxes[image], order, None if idxs is None else idxs[image], iou_threshold)[:max_output]
        indices[image, : len(kept)] = kept
        counts[image] = len(kept)
    return indices, counts


def random_boxes(rng: np.random.Generator, *shape: int, extent: float = 100.0) -> np.ndarray:
    """Boxes with centres in a square and sides of 5 to 40."""
    center, half = rng.uniform(0, extent, (*shape, 2)), rng.uniform(2.5, 20, (*shape, 2))
    return np.concatenate([center - half, center + half], axis=-1)


SIZES = (1, 2, 31, 64, 65, 150)  # one, a pair, below, at and above a vector of lanes or a warp


def nms_cases() -> Iterator[Case]:
    rng = np.random.default_rng(2017)
    for n in SIZES:
        for threshold in (0.2, 0.5, 0.8)[: 1 if n < 31 else 3]:
            args = (random_boxes(rng, n), rng.uniform(0, 1, n), threshold)
            yield Case(f"{n} boxes, {threshold}", args, layouts=(n, threshold) == (65, 0.5))
    few = rng.integers(0, 4, 90) / 4.0
    yield Case("ties everywhere", (np.round(random_boxes(rng, 90) / 8) * 8, few, 0.5))
    yield Case("one box forty times", (np.tile([[1.0, 2, 5, 9]], (40, 1)), rng.uniform(0, 1, 40), 0.5))
    yield Case("no boxes", (np.zeros((0, 4)), np.zeros(0), 0.5))


def batched_cases() -> Iterator[Case]:
    rng = np.random.default_rng(2018)
    for n in SIZES:
        idxs = rng.integers(-2, 3, n)
        yield Case(f"{n} boxes", (random_boxes(rng, n, extent=60), rng.uniform(0, 1, n), idxs, 0.5), layouts=n == 65)
    yield Case("one class", (random_boxes(rng, 50), rng.uniform(0, 1, 50), np.full(50, 2**40), 0.5))
    yield Case("no boxes", (np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64), 0.5))


def padded_cases() -> Iterator[Case]:
    rng = np.random.default_rng(2019)
    for batch, n, most in ((1, 1, 3), (2, 33, 40), (3, 64, 7), (2, 80, 0)):
        args = (random_boxes(rng, batch, n), rng.uniform(0, 1, (batch, n)), 0.5, most)
        yield Case(f"{batch} images of {n}", args, layouts=n == 33)
    scores = rng.uniform(0, 1, (3, 40))
    scores[0, 25:], scores[1] = -np.inf, -np.inf
    idxs = rng.integers(0, 3, (3, 40))
    yield Case("ragged with classes", (random_boxes(rng, 3, 40, extent=60), scores, 0.5, 40, -np.inf, idxs))
    yield Case("scores above", (random_boxes(rng, 3, 40, extent=60), scores, 0.5, 8, 0.25))
    yield Case("no images", (np.zeros((0, 5, 4)), np.zeros((0, 5)), 0.5, 4))
    yield Case("no boxes", (np.zeros((2, 0, 4)), np.zeros((2, 0)), 0.5, 4))


SPECS = (
    Spec("nms", "", nms, None, nms_cases),
    Spec("batched_nms", "", batched_nms, None, batched_cases),
    Spec("nms_padded", "", nms_padded, None, padded_cases),
)
