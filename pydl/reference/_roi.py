"""What the oracles of RoI pooling share: boxes, sample points of a bin, bilinear interpolation along one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def sample_points(start: float, size: float, bins: int, sampling_ratio: int) -> list[list[float]]:
    """Positions of the samples of each bin along one axis: equidistant, sampling_ratio of them or one per pixel."""
    if not (math.isfinite(start) and math.isfinite(size)):
        return [[math.nan]] * bins
    step = size / bins
    count = sampling_ratio if sampling_ratio > 0 else math.ceil(step)
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
