"""Position-sensitive RoIAlign in NumPy float64, from its definition: RoIAlign where each bin has channels of its own.

Dai, Li, He, Sun: R-FCN, NeurIPS 2016, section 2; bilinear samples as in Li et al.: Light-Head R-CNN, 2017. Conventions
are torchvision's: boxes are shifted by half a pixel, samples outside [-1, size] count as 0, those at the border are
clamped, and a bin without samples is 0 / 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._roi import LOST, ODD, Boxes, OutputSize, bilinear_bins, most_readers, pair, random_boxes, rows_of
from pydl.reference._spec import Case, Spec


def _by_bin(x: np.ndarray, output_size: OutputSize) -> np.ndarray:
    """x as [N, C, out_h, out_w, H, W]: channel (c * out_h + i) * out_w + j belongs to bin (i, j)."""
    bins = pair(output_size)
    return x.reshape(x.shape[0], x.shape[1] // (bins[0] * bins[1]), *bins, *x.shape[2:])


def ps_roi_align(
    x: np.ndarray, boxes: Boxes, output_size: OutputSize, spatial_scale: float = 1.0, sampling_ratio: int = -1
) -> np.ndarray:
    """Pools x [N, C * out_h * out_w, H, W] into [K, C, out_h, out_w], K being the number of boxes."""
    own = _by_bin(x, output_size)
    y = np.zeros((len(rows_of(boxes)), *own.shape[1:4]))
    for k, image, i, j, pixels, count in bilinear_bins(x, boxes, output_size, spatial_scale, sampling_ratio, True):
        if count == 0:
            y[k, :, i, j] = np.nan
        for row, col, weight in pixels:
            y[k, :, i, j] += weight * own[image, :, i, j, row, col] / count
    return y


def ps_roi_align_grad(
    dy: np.ndarray,
    x: np.ndarray,
    boxes: Boxes,
    output_size: OutputSize,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> tuple[np.ndarray]:
    """Gradient of sum(dy * y) with respect to x; boxes have none."""
    dx = np.zeros(_by_bin(x, output_size).shape)
    for k, image, i, j, pixels, count in bilinear_bins(x, boxes, output_size, spatial_scale, sampling_ratio, True):
        for row, col, weight in pixels:
            dx[image, :, i, j, row, col] += weight * dy[k, :, i, j] / count
    return (dx.reshape(x.shape),)


def _reductions(x, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1):
    """Boxes that read the pixel which most of them read through one bin."""
    readers = np.zeros((x.shape[0], *pair(output_size), *x.shape[2:]))
    for _, image, i, j, pixels, _ in bilinear_bins(x, boxes, output_size, spatial_scale, sampling_ratio, True):
        for row, col in {(row, col) for row, col, _ in pixels}:
            readers[image, i, j, row, col] += 1
    return most_readers(readers)


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: sizes of bins and boxes, borders, degenerate boxes, adaptive and fixed sampling."""
    rng = np.random.default_rng(2016)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    some = random_boxes(rng, 5, 2, 52, 68)
    yield Case("k3 s2", (normal(2, 18, 13, 17), some, 3, 0.25, 2), layouts=True)
    yield Case("k7 adaptive", (normal(2, 49, 26, 34), some, 7, 0.5))
    yield Case("k(2,3)", (normal(2, 6, 13, 17), some, (2, 3), 0.25), second=True)
    yield Case("k1", (normal(2, 3, 13, 17), some, 1, 0.25))
    yield Case("k5 s3, small boxes", (normal(2, 25, 13, 17), some, 5, 0.03125, 3))  # bins are parts of a pixel
    yield Case("one pixel", (normal(2, 8, 1, 1), some, 2, 0.0625, 2))
    yield Case("crowd", (normal(1, 8, 9, 9), random_boxes(rng, 40, 1, 9, 9), 2, 1.0, 2), second=True)
    yield Case("odd boxes, s2", (normal(2, 9, 8, 9), ODD, 3, 1.0, 2))
    yield Case("odd boxes, s-1", (normal(2, 9, 8, 9), ODD, 3, 1.0, -1))
    yield Case("no boxes", (normal(2, 4, 8, 9), np.zeros((0, 5)), 2))
    yield Case("empty batch", (np.zeros((0, 6, 8, 8)), np.zeros((0, 5)), (2, 3)))
    yield Case("no channels", (np.zeros((1, 0, 8, 8)), ODD[:1], 2))
    special = normal(2, 4, 13, 17)
    special[0, 0, 6, 7], special[1, 1, 3, 3], special[0, 2, 9, 12] = np.nan, np.inf, -np.inf
    yield Case("NaN and inf", (special, some + 0.3 * (np.arange(5) > 0), 2, 0.25, 2), gradients=False)
    yield Case("boxes of NaN and inf", (normal(1, 4, 8, 9), LOST, 2, 1.0, 2), gradients=False)


_COMPOSITION = "pydl.ops._roi_torch:ps_roi_align"
SPECS = (Spec("ps_roi_align", _COMPOSITION, ps_roi_align, ps_roi_align_grad, cases, _reductions, constants=(1,)),)
