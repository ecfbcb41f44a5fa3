"""Max pooling over regions of interest in NumPy float64, from its definition (Girshick 2015).

Girshick: Fast R-CNN, ICCV 2015, section 2.1. Conventions are torchvision's: bounds are rounded, halves away from zero,
and both belong to the box; a bin beside the map is 0; the first maximum in row order wins, and only pixels above the
lowest float32 can, which NaN is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pydl.reference._roi import LOST, ODD, Boxes, OutputSize, most_readers, pair, random_boxes, rows_of
from pydl.reference._spec import Case, Spec

LOWEST = float(np.finfo(np.float32).min)


def windows(low: float, high: float, length: int, bins: int, kind: type = np.float64) -> list[range]:
    """Pixels of each bin along an axis of `length` between scaled bounds; `kind` is the arithmetic's precision."""
    start, end = (int(math.copysign(math.floor(abs(v) + 0.5), v)) for v in (low, high))
    step = kind(max(end - start + 1, 1)) / kind(bins)
    firsts = [math.floor(kind(i) * step) + start for i in range(bins)]
    stops = [math.ceil(kind(i + 1) * step) + start for i in range(bins)]
    return [range(max(first, 0), max(min(stop, length), 0)) for first, stop in zip(firsts, stops, strict=True)]


def _bins(x: np.ndarray, boxes: Boxes, output_size: OutputSize, spatial_scale: float):
    """(box, image, bin row, bin column, rows of its window, columns of its window) of each bin of a finite box."""
    out_h, out_w = pair(output_size)
    for k, (image, *corners) in enumerate(rows_of(boxes)):
        x1, y1, x2, y2 = (v * spatial_scale for v in corners)
        if not np.isfinite([x1, y1, x2, y2]).all():
            continue
        cols = windows(x1, x2, x.shape[3], out_w)
        for i, rows in enumerate(windows(y1, y2, x.shape[2], out_h)):
            for j in range(out_w):
                yield k, int(image), i, j, rows, cols[j]


def _maxima(x: np.ndarray, boxes: Boxes, output_size: OutputSize, spatial_scale: float):
    """(box, image, channel, bin row, bin column, largest value, its row or None, its column) of each bin."""
    for k, image, i, j, rows, cols in _bins(x, boxes, output_size, spatial_scale):
        for c in range(x.shape[1]):
            best, place = (LOWEST if rows and cols else 0.0), (None, None)
            for row in rows:
                for col in cols:
                    if x[image, c, row, col] > best:
                        best, place = x[image, c, row, col], (row, col)
            yield k, image, c, i, j, best, *place


def roi_pool(x: np.ndarray, boxes: Boxes, output_size: OutputSize, spatial_scale: float = 1.0) -> np.ndarray:
    """Pools x [N, C, H, W] into [K, C, *output_size], K being the number of boxes; boxes that are not finite to NaN."""
    y = np.full((len(rows_of(boxes)), x.shape[1], *pair(output_size)), np.nan)
    for k, _, c, i, j, best, _, _ in _maxima(x, boxes, output_size, spatial_scale):
        y[k, c, i, j] = best
    return y


def roi_pool_grad(
    dy: np.ndarray, x: np.ndarray, boxes: Boxes, output_size: OutputSize, spatial_scale: float = 1.0
) -> tuple[np.ndarray]:
    """Gradient of sum(dy * y) with respect to x, which goes to the maxima; boxes have none."""
    dx = np.zeros(x.shape)
    for k, image, c, i, j, _, row, col in _maxima(x, boxes, output_size, spatial_scale):
        if row is not None:
            dx[image, c, row, col] += dy[k, c, i, j]
    return (dx,)


def _reductions(x, boxes, output_size, spatial_scale=1.0):
    """Bins whose maximum the pixel is which is that of most of them."""
    ones = np.ones((len(rows_of(boxes)), x.shape[1], *pair(output_size)))
    return most_readers(roi_pool_grad(ones, x, boxes, output_size, spatial_scale)[0])


def boxes_of_sizes(rng: np.random.Generator, images: int, sizes: tuple[int, ...]) -> np.ndarray:
    """[K, 5] boxes at halves of a pixel, a third of them over an edge, that hold so many pixels along each axis."""
    low = rng.integers(-6, 30, (len(sizes), 2)) / 2
    image = rng.integers(0, images, len(sizes)).astype(np.float64)
    extent = np.stack([sizes, sizes[::-1]], 1) - 1
    return np.column_stack([image, low, low + extent])


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: windows that overlap and that have gaps, borders, degenerate boxes, ties.

    Sizes of boxes are such that float32 and float64 round the bounds of a bin to the same pixel, as the oracle has one
    precision for all dtypes.
    """
    rng = np.random.default_rng(2015)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    some = boxes_of_sizes(rng, 2, (3, 7, 8, 14, 21))
    yield Case("k7", (normal(2, 9, 13, 17), some, 7), layouts=True)  # 9 channels: a vector and 1
    yield Case("k(2,4), half scale", (normal(2, 3, 8, 9), some, (2, 4), 0.5), second=True)
    yield Case("k1", (normal(2, 17, 13, 17), some, 1))
    yield Case("k8, more bins than pixels", (normal(2, 3, 13, 17), some[:3], 8, 0.25))
    yield Case("one pixel", (normal(2, 5, 1, 1), some, 4, 0.0625))
    yield Case("one row", (normal(2, 5, 1, 40), some, (2, 4), 0.5))
    yield Case("crowd", (normal(1, 2, 9, 9), np.abs(random_boxes(rng, 40, 1, 9, 9)).round(), 2), second=True)
    yield Case("odd boxes", (normal(2, 3, 8, 9), ODD, 4))
    yield Case("ties", (np.round(normal(2, 3, 8, 9)), ODD, 2))
    yield Case("no boxes", (normal(2, 3, 8, 9), np.zeros((0, 5)), 7))
    yield Case("empty batch", (np.zeros((0, 3, 8, 8)), np.zeros((0, 5)), (2, 3)))
    yield Case("no channels", (np.zeros((1, 0, 8, 8)), ODD[:1], 2))
    special = normal(2, 3, 8, 9)
    special[0, 0, 3:5, 2:7], special[1, 1, 3, 3], special[0, 2] = np.nan, np.inf, -np.inf
    yield Case("NaN and inf", (special, ODD, 4))
    yield Case("boxes of NaN and inf", (normal(1, 3, 8, 9), LOST, 2), gradients=False)


_COMPOSITION = "pydl.ops._roi_torch:roi_pool"
SPECS = (Spec("roi_pool", _COMPOSITION, roi_pool, roi_pool_grad, cases, _reductions, constants=(1,)),)
