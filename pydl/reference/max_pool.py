"""Two-dimensional max pooling in NumPy float64, from its definition: the largest value of each window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pydl.reference._spec import Case, Spec

IntOrPair = int | Sequence[int]


def _pair(value: IntOrPair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(int(v) for v in value)
    return (values[0], values[-1])


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Number of windows along one axis; with `ceil_mode` the last must start inside the input or its left padding."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    windows = -(-room // stride) + 1
    if (windows - 1) * stride >= size + padding:
        windows -= 1
    return windows


def max_pool2d(
    x: np.ndarray,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Maximum of each window of x [..., H, W] and its place ih * W + iw.

    Taps are visited row by row. The first of several equal maxima wins. A NaN wins over every number, and of several
    NaN the last, as in torch. Padding is never chosen; a window of nothing but -inf names its first tap inside.
    """
    x = np.asarray(x, dtype=np.float64)
    (kh, kw), (ph, pw), (dh, dw) = _pair(kernel_size), _pair(padding), _pair(dilation)
    sh, sw = (kh, kw) if stride is None else _pair(stride)
    height, width = x.shape[-2:]
    rows = output_size(height, kh, sh, ph, dh, ceil_mode)
    columns = output_size(width, kw, sw, pw, dw, ceil_mode)
    y = np.full((*x.shape[:-2], rows, columns), -np.inf)
    indices = np.full(y.shape, -1, dtype=np.int64)
    for row in range(rows):
        for column in range(columns):
            best, place = y[..., row, column], indices[..., row, column]
            for i in range(kh):
                for j in range(kw):
                    ih, iw = row * sh - ph + i * dh, column * sw - pw + j * dw
                    if not (0 <= ih < height and 0 <= iw < width):
                        continue
                    value = x[..., ih, iw]
                    wins = (place < 0) | (value > best) | np.isnan(value)
                    best[...] = np.where(wins, value, best)
                    place[...] = np.where(wins, ih * width + iw, place)
    return y, indices


def max_pool2d_grad(dy: np.ndarray, indices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Gradient of sum(dy * y) with respect to x: each dy is added at the place its maximum came from."""
    dy = np.asarray(dy, dtype=np.float64)
    dx = np.zeros((*dy.shape[:-2], height * width))
    for place in np.ndindex(dy.shape):
        plane = place[:-2]
        if indices[place] >= 0:
            dx[plane][indices[place]] += dy[place]
    return dx.reshape(*dy.shape[:-2], height, width)


def _forward(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    y, indices = max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    return (y, indices) if return_indices else y


def _gradient(dy, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    _, indices = max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    return (max_pool2d_grad(dy, indices, *x.shape[-2:]),)


def _reductions(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    kh, kw = _pair(kernel_size)
    sh, sw = (kh, kw) if stride is None else _pair(stride)
    return (max(1, -(-kh // sh)) * max(1, -(-kw // sw)),)


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: window shapes, overlap, padding, both rounding modes, ties, NaN and -inf."""
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    yield Case("k3 s2 p1", (normal(2, 9, 15, 17), 3, 2, 1), layouts=True)  # the usual stem; 9 channels: a vector and 1
    yield Case("k2 s2", (normal(2, 16, 12, 12), 2))
    distinct = rng.permutation(128).reshape(1, 2, 8, 8) - 64.0  # exact in every dtype and no two equal: no kink nearby
    yield Case("distinct", (distinct, 3, 2, 1), second=True)
    yield Case("k3 s1 p1", (normal(1, 3, 8, 33), 3, 1, 1))  # each input belongs to nine windows
    yield Case("k2 s3", (normal(1, 5, 11, 11), 2, 3))  # gaps: some inputs belong to none
    yield Case("k(2,5) s(1,3) p(1,2)", (normal(1, 2, 7, 19), (2, 5), (1, 3), (1, 2)))
    yield Case("k3 s2 p1 d2", (normal(1, 4, 13, 14), 3, 2, 1, 2))
    yield Case("k3 s2 p1 ceil", (normal(1, 4, 10, 12), 3, 2, 1, 1, True))  # the last window hangs over the edge
    yield Case("k16 s16", (normal(1, 2, 32, 32), 16))  # 256 taps: one more than a byte can number
    yield Case("k = input", (normal(2, 3, 6, 5), (6, 5)))
    yield Case("1 x 1", (normal(2, 3, 1, 1), 1))
    yield Case("unbatched", (normal(3, 9, 9), 3, 2, 1))
    yield Case("empty batch", (np.zeros((0, 3, 8, 8)), 3, 2, 1))
    yield Case("return_indices", (normal(2, 3, 9, 9), 3, 2, 1, 1, False, True))
    ties = np.round(normal(2, 8, 9, 9))
    yield Case("ties", (ties, 3, 2, 1, 1, False, True))
    special = normal(2, 8, 9, 9)
    special[rng.random(special.shape) < 0.1] = np.nan
    special[0, :, :4] = -np.inf
    special[1, :, :, 7] = np.inf
    yield Case("NaN and inf", (special, 3, 2, 1, 1, False, True))


SPECS = (Spec("max_pool2d", "nn.functional.max_pool2d", _forward, _gradient, cases, _reductions),)
