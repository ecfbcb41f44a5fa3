"""Areas, forms, clipping and sizes of boxes in NumPy float64, from their definitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pydl.reference._spec import Case, Spec
from pydl.reference.box_iou import as_corners, random_boxes

Array = np.ndarray


@np.errstate(invalid="ignore")
def box_area(boxes: Array, fmt: str = "xyxy") -> Array:
    """Width times height."""
    size = boxes[..., 2:] - boxes[..., :2] if fmt == "xyxy" else boxes[..., 2:]
    return size.prod(-1)


def box_area_grad(dy: Array, boxes: Array, fmt: str = "xyxy") -> tuple[Array]:
    """Gradient of sum(dy * box_area)."""
    size = boxes[..., 2:] - boxes[..., :2] if fmt == "xyxy" else boxes[..., 2:]
    d_size = dy[..., None] * size[..., ::-1]
    return (np.concatenate((-d_size if fmt == "xyxy" else np.zeros_like(d_size), d_size), -1),)


@np.errstate(invalid="ignore")
def box_convert(boxes: Array, in_fmt: str, out_fmt: str) -> Array:
    """Through corners; a size that both forms have is kept."""
    if in_fmt == out_fmt:
        return boxes.copy()
    corners = as_corners(boxes, in_fmt)
    if out_fmt == "xyxy":
        return corners
    size = corners[..., 2:] - corners[..., :2] if in_fmt == "xyxy" else boxes[..., 2:]
    start = corners[..., :2] if out_fmt == "xywh" else (corners[..., :2] + corners[..., 2:]) / 2
    return np.concatenate((start, size), -1)


def box_convert_grad(dy: Array, boxes: Array, in_fmt: str, out_fmt: str) -> tuple[Array]:
    """Gradient of sum(dy * box_convert): the conversion is linear, so its matrix is read off the unit boxes."""
    matrix = box_convert(np.eye(4), in_fmt, out_fmt)  # row i: what the i-th number contributes
    return (dy @ matrix.T,)


def clip_boxes_to_image(boxes: Array, size: Sequence[float]) -> Array:
    """Each coordinate moved into [0, width] or [0, height]; NaN stays."""
    height, width = size
    return np.minimum(np.maximum(boxes, 0.0), np.array([width, height, width, height], np.float64))


def clip_boxes_to_image_grad(dy: Array, boxes: Array, size: Sequence[float]) -> tuple[Array]:
    """Gradient of sum(dy * clip): dy where the coordinate was inside, borders included."""
    height, width = size
    inside = (boxes >= 0) & (boxes <= np.array([width, height, width, height]))
    return (np.where(inside, dy, 0.0),)


@np.errstate(invalid="ignore")
def remove_small_boxes(boxes: Array, min_size: float) -> Array:
    """Indices of boxes whose sides are at least min_size."""
    return np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= min_size).all(-1))


def _boxes() -> Iterator[tuple[str, Array, bool]]:
    rng = np.random.default_rng(20)
    for n in (1, 31, 521):  # primes: no vector or block divides them
        yield f"{n} boxes", random_boxes(rng, n), n == 31
    yield "3 x 5 boxes", random_boxes(rng, 3, 5), False
    yield "one box", random_boxes(rng), False
    yield "no boxes", np.zeros((0, 4)), False
    large = 3800.0 * random_boxes(rng, 9)  # up to 6.5e4, the end of float16
    yield "large", large, False


_ODD = np.array([[np.nan, 1, 2, 3], [1, np.inf, 2, np.inf], [-np.inf, 1, 5, 2], [7, 9, 3, 2]])


def _area_cases() -> Iterator[Case]:
    for fmt in ("xyxy", "xywh", "cxcywh"):
        for name, boxes, layouts in _boxes():
            # areas of large boxes pass the end of float16, and so do their gradients
            yield Case(f"{name} {fmt}", (boxes, fmt), layouts=layouts, second=layouts, gradients=name != "large")
        yield Case(f"NaN, inf, swapped {fmt}", (_ODD, fmt), gradients=False)


def _convert_cases() -> Iterator[Case]:
    formats = ("xyxy", "xywh", "cxcywh")
    for fmt in formats:
        for out in formats:
            for name, boxes, layouts in _boxes():
                yield Case(f"{name} {fmt} {out}", (boxes, fmt, out), layouts=layouts, second=layouts)
            yield Case(f"NaN, inf, swapped {fmt} {out}", (_ODD, fmt, out), gradients=False)


def _clip_cases() -> Iterator[Case]:
    for name, boxes, layouts in _boxes():
        yield Case(name, (boxes - 4.0, (12, 9.5)), layouts=layouts)
    inside = np.array([[-3.0, 1.0, 20.0, 5.0], [2.0, -7.0, 3.0, 50.0]])  # no coordinate near a border
    yield Case("distinct", (inside, (12, 9)), second=True)
    yield Case("borders", (np.array([[0.0, 0.0, 9.0, 12.0], [-1.0, 12.0, 10.0, 0.0]]), (12, 9)))
    yield Case("NaN, inf, swapped", (_ODD, (4, 2)))


def _small_cases() -> Iterator[Case]:
    for name, boxes, layouts in _boxes():
        if boxes.ndim == 2:
            yield Case(name, (boxes, 8.01), layouts=layouts)  # no side rounds across it
    sides = np.array([[0, 0, 2, 2], [0, 0, 2, 1.75], [0, 0, 1.75, 2], [0, 0, 4, 4], [3, 3, 1, 1]], np.float64)
    yield Case("equal to the least", (sides, 2.0))
    yield Case("all", (sides, -9.0))
    yield Case("NaN, inf, swapped", (_ODD, 1.0))


SPECS = (
    Spec("box_area", "", box_area, box_area_grad, _area_cases, widened=True),
    Spec("box_convert", "", box_convert, box_convert_grad, _convert_cases),
    Spec("clip_boxes_to_image", "", clip_boxes_to_image, clip_boxes_to_image_grad, _clip_cases),
    Spec("remove_small_boxes", "", remove_small_boxes, None, _small_cases),
)
