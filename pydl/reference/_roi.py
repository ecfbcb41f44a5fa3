"""What the oracles of RoI pooling share: boxes, sample points of a bin, bilinear interpolation along one axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

OutputSize = int | Sequence[int]
Boxes = np.ndarray | Sequence[np.ndarray]


def pair(output_size: OutputSize) -> tuple[int, int]:
    """Height and width of an output."""
    if isinstance(output_size, int):
        return output_size, output_size
    return int(output_size[0]), int(output_size[1])


def rows_of(boxes: Boxes) -> np.ndarray:
    """Boxes as [K, 5] rows (image, x1, y1, x2, y2), from that or from one [L, 4] array for each image."""
    if isinstance(boxes, np.ndarray):
        return np.asarray(boxes, dtype=np.float64)
    parts = [np.column_stack([np.full(len(b), float(n)), b]) for n, b in enumerate(boxes)]
    return np.concatenate([np.zeros((0, 5)), *parts])


def sample_count(size: float, bins: int, sampling_ratio: int) -> int:
    """Samples of a bin along one axis: sampling_ratio, or one per pixel; less than one for an inverted box."""
    if sampling_ratio > 0 or not math.isfinite(size):
        return max(sampling_ratio, 1)
    return math.ceil(size / bins)


def sample_points(start: float, size: float, bins: int, sampling_ratio: int) -> list[list[float]]:
    """Positions of the samples of each bin along one axis, equidistant."""
    if not (math.isfinite(start) and math.isfinite(size)):
        return [[math.nan]] * bins
    step, count = size / bins, sample_count(size, bins, sampling_ratio)
    return [[start + i * step + (k + 0.5) * step / count for k in range(count)] for i in range(bins)]


def interpolated(position: float, length: int) -> list[tuple[int, float]]:
    """The pixels (index, weight) that linear interpolation reads at a position; none outside [-1, length]."""
    if math.isnan(position):
        return [(0, math.nan)]
    if position < -1.0 or position > length:
        return []
    position = max(position, 0.0)
    low = int(position)
    if low >= length - 1:
        return [(length - 1, 1.0)]
    return [(i, w) for i, w in ((low, 1.0 - (position - low)), (low + 1, position - low)) if w != 0.0]


def corners(ys: Sequence[float], xs: Sequence[float], height: int, width: int) -> list[tuple[int, int, float]]:
    """(row, column, weight) of every pixel that is read for every sample of a grid."""
    found = []
    for y in ys:
        for x in xs:
            for row, row_weight in interpolated(y, height):
                found += [(row, col, row_weight * col_weight) for col, col_weight in interpolated(x, width)]
    return found


def bilinear_bins(
    x: np.ndarray, boxes: Boxes, output_size: OutputSize, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Iterator[tuple[int, int, int, int, list[tuple[int, int, float]], int]]:
    """(box, image, bin row, bin column, corners of its samples, number of samples) of each bin."""
    out_h, out_w = pair(output_size)
    offset = 0.5 if aligned else 0.0
    for k, (image, x1, y1, x2, y2) in enumerate(rows_of(boxes)):
        left, top = x1 * spatial_scale - offset, y1 * spatial_scale - offset
        width, height = x2 * spatial_scale - offset - left, y2 * spatial_scale - offset - top
        if not aligned:
            width, height = np.maximum(width, 1.0), np.maximum(height, 1.0)
        rows = sample_points(top, height, out_h, sampling_ratio)
        cols = sample_points(left, width, out_w, sampling_ratio)
        count = sample_count(height, out_h, sampling_ratio) * sample_count(width, out_w, sampling_ratio)
        for i, ys in enumerate(rows):
            for j, xs in enumerate(cols):
                yield k, int(image), i, j, corners(ys, xs, *x.shape[2:]), count


def most_readers(reads: np.ndarray) -> tuple[int]:
    """`reductions` of a gradient from how often each pixel was read."""
    return (max(1, int(reads.max(initial=0))),)


def random_boxes(rng: np.random.Generator, count: int, images: int, height: float, width: float) -> np.ndarray:
    """[count, 5] boxes with sides of at least a pixel that lie in the images, or hang over an edge by a little."""
    rows = np.sort(rng.uniform(-1.0, height + 1.0, (count, 2)), axis=1)
    cols = np.sort(rng.uniform(-1.0, width + 1.0, (count, 2)), axis=1)
    image = rng.integers(0, images, count).astype(np.float64)
    return np.column_stack([image, cols[:, 0], rows[:, 0], cols[:, 1] + 1, rows[:, 1] + 1])


ODD = np.array(
    [
        [0, 3, 3, 3, 3],  # empty
        [1, 6, 5, 2, 1],  # inverted
        [0, 6, 1, 2, 5],  # inverted along one axis
        [1, -30, -30, -20, -20],  # beside the map
        [0, 100, 2, 120, 5],
        [1, -5, -5, 40, 40],  # larger than the map
        [0, -1, -1, 0, 0],  # up to the border
        [1, 7, 8, 9, 10],
        [0, 0, 0, 9, 8],  # and some over all of it, so that no pixel stands out
        [1, 0, 0, 9, 8],
        [0, 1, 1, 8, 7],
        [1, 0, 1, 9, 7],
    ],
    dtype=np.float64,
)
"""Boxes at the edges of the rules, for two maps of 8 x 9 pixels."""

LOST = np.array([[0, np.nan, 1, 5, 5], [0, 1, 1, np.inf, 5], [0, 1, 1, 5, 5], [0, 1, -np.inf, 5, 5]])
"""Boxes that are not finite, and one that is."""
