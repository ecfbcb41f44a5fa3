"""RoIAlign in NumPy float64, from its definition: the mean of bilinear samples in each bin (He et al. 2017).

He, Gkioxari, Dollar, Girshick: Mask R-CNN, ICCV 2017, section 3. Conventions are torchvision's: without `aligned` boxes
are not shifted and are at least one pixel wide; samples outside [-1, size] count as 0, at the border they are clamped.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._roi import LOST, ODD, Boxes, OutputSize, bilinear_bins, most_readers, pair, random_boxes, rows_of
from pydl.reference._spec import Case, Spec


def roi_align(
    x: np.ndarray,
    boxes: Boxes,
    output_size: OutputSize,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> np.ndarray:
    """Pools x [N, C, H, W] into [K, C, *output_size], K being the number of boxes."""
    y = np.zeros((len(rows_of(boxes)), x.shape[1], *pair(output_size)))
    for k, image, i, j, pixels, count in bilinear_bins(x, boxes, output_size, spatial_scale, sampling_ratio, aligned):
        for row, col, weight in pixels:
            y[k, :, i, j] += weight * x[image, :, row, col] / max(count, 1)
    return y


def roi_align_grad(
    dy: np.ndarray,
    x: np.ndarray,
    boxes: Boxes,
    output_size: OutputSize,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> tuple[np.ndarray]:
    """Gradient of sum(dy * y) with respect to x; boxes have none."""
    dx = np.zeros(x.shape)
    for k, image, i, j, pixels, count in bilinear_bins(x, boxes, output_size, spatial_scale, sampling_ratio, aligned):
        for row, col, weight in pixels:
            dx[image, :, row, col] += weight * dy[k, :, i, j] / max(count, 1)
    return (dx,)


def _reductions(x, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    """Bins that read the pixel which most of them read."""
    readers = np.zeros((x.shape[0], *x.shape[2:]))
    for _, image, _, _, pixels, _ in bilinear_bins(x, boxes, output_size, spatial_scale, sampling_ratio, aligned):
        for row, col in {(row, col) for row, col, _ in pixels}:
            readers[image, row, col] += 1
    return most_readers(readers)


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: sizes of bins and boxes, borders, degenerate boxes, adaptive and fixed sampling."""
    rng = np.random.default_rng(2017)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    some = random_boxes(rng, 5, 2, 52, 68)
    yield Case("k7 s2", (normal(2, 9, 13, 17), some, 7, 0.25, 2), layouts=True)  # 9 channels: a vector and 1
    yield Case("k7 adaptive", (normal(2, 3, 26, 34), some, 7, 0.5))
    yield Case("k(3,5) aligned", (normal(2, 4, 13, 17), some, (3, 5), 0.25, -1, True), second=True)
    yield Case("k14 s2 aligned", (normal(2, 17, 13, 17), some[:2], 14, 0.25, 2, True))
    yield Case("k1", (normal(2, 3, 13, 17), some, 1, 0.25))
    yield Case("k3 s1, gaps", (normal(2, 3, 13, 17), some, 3, 0.25, 1))  # pixels inside a bin that no sample reads
    yield Case("k9 s3, small boxes", (normal(2, 3, 13, 17), some, 9, 0.03125, 3))  # bins are parts of a pixel
    yield Case("one pixel", (normal(2, 5, 1, 1), some, 3, 0.0625, 2))
    yield Case("one row", (normal(2, 5, 1, 40), some, (2, 4), 0.5))
    yield Case("crowd", (normal(1, 2, 9, 9), random_boxes(rng, 40, 1, 9, 9), 3, 1.0, 2), second=True)
    for aligned in (False, True):
        for ratio in (-1, 2):
            name = f"odd boxes, s{ratio}{' aligned' if aligned else ''}"
            yield Case(name, (normal(2, 3, 8, 9), ODD, 3, 1.0, ratio, aligned))
    yield Case("no boxes", (normal(2, 3, 8, 9), np.zeros((0, 5)), 7))
    yield Case("empty batch", (np.zeros((0, 3, 8, 8)), np.zeros((0, 5)), (2, 3)))
    yield Case("no channels", (np.zeros((1, 0, 8, 8)), ODD[:1], 2))
    special = normal(2, 3, 13, 17)
    special[0, 0, 6, 7], special[1, 1, 3, 3], special[0, 2, 9, 12] = np.nan, np.inf, -np.inf
    yield Case("NaN and inf", (special, some + 0.3 * (np.arange(5) > 0), 7, 0.25, 2), gradients=False)
    yield Case("boxes of NaN and inf", (normal(1, 3, 8, 9), LOST, 2, 1.0, 2), gradients=False)


_COMPOSITION = "pydl.ops._roi_torch:roi_align"
SPECS = (Spec("roi_align", _COMPOSITION, roi_align, roi_align_grad, cases, _reductions, constants=(1,)),)
