"""Max pooling over one to three dimensions in NumPy float64, from its definition: the largest value of each window."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pydl.reference._pool import Ints, adaptive_axes, per_axis
from pydl.reference._spec import Case, Spec


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Number of windows along one axis; with `ceil_mode` the last must start inside the input or its left padding."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    windows = -(-room // stride) + 1
    if (windows - 1) * stride >= size + padding:
        windows -= 1
    return windows


def maxima(x: np.ndarray, axes: Sequence[Sequence[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Maximum of each window of the last axes of x, and its place in the flattened axes.

    ``axes`` holds for each axis and output the positions of the taps, of which those outside are left out. Taps are
    visited in row-major order. The first of several equal maxima wins. A NaN wins over every number, and of several NaN
    the last, as in torch. Padding is never chosen; a window of nothing but -inf names its first tap inside.
    """
    x = np.asarray(x, dtype=np.float64)
    dims = len(axes)
    sizes = x.shape[-dims:]
    y = np.full((*x.shape[:-dims], *(len(axis) for axis in axes)), -np.inf)
    indices = np.full(y.shape, -1, dtype=np.int64)
    for output in itertools.product(*(range(len(axis)) for axis in axes)):
        at: Any = (..., *output)
        best, place = y[at], indices[at]
        for tap in itertools.product(*(axis[o] for axis, o in zip(axes, output, strict=True))):
            if not all(0 <= i < n for i, n in zip(tap, sizes, strict=True)):
                continue
            inner: Any = (..., *tap)
            value = x[inner]
            wins = (place < 0) | (value > best) | np.isnan(value)
            best = np.where(wins, value, best)
            place = np.where(wins, np.ravel_multi_index(tap, sizes), place)
        y[at], indices[at] = best, place
    return y, indices


def max_pool(
    dims: int,
    x: np.ndarray,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Maximum of each window of the last ``dims`` axes and its place in them."""
    k, p, d = (per_axis(v, dims) for v in (kernel_size, padding, dilation))
    s = k if stride is None else per_axis(stride, dims)
    axes = []
    for i, n in enumerate(x.shape[-dims:]):
        count = output_size(n, k[i], s[i], p[i], d[i], ceil_mode)
        axes.append([[o * s[i] - p[i] + tap * d[i] for tap in range(k[i])] for o in range(count)])
    return maxima(x, axes)


def max_pool_grad(dy: np.ndarray, indices: np.ndarray, *sizes: int) -> np.ndarray:
    """Gradient of sum(dy * y) with respect to x: each dy is added at the place its maximum came from."""
    dy = np.asarray(dy, dtype=np.float64)
    lead = dy.shape[: -len(sizes)]
    dx = np.zeros((*lead, int(np.prod(sizes))))
    for place in np.ndindex(dy.shape):
        if indices[place] >= 0:
            dx[place[: len(lead)]][indices[place]] += dy[place]
    return dx.reshape(*lead, *sizes)


def _forward(dims, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    y, indices = max_pool(dims, x, kernel_size, stride, padding, dilation, ceil_mode)
    return (y, indices) if return_indices else y


def _gradient(dims, dy, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    _, indices = max_pool(dims, x, kernel_size, stride, padding, dilation, ceil_mode)
    return (max_pool_grad(dy, indices, *x.shape[-dims:]),)


def _reductions(dims, x, kernel_size, stride=None, *rest, **options):
    k = per_axis(kernel_size, dims)
    s = k if stride is None else per_axis(stride, dims)
    return (int(np.prod([max(1, -(-a // b)) for a, b in zip(k, s, strict=True)])),)


def _adaptive(dims, x, output_size, return_indices=False):
    y, indices = maxima(x, adaptive_axes(x.shape, dims, output_size))
    return (y, indices) if return_indices else y


def _adaptive_gradient(dims, dy, x, output_size, return_indices=False):
    _, indices = maxima(x, adaptive_axes(x.shape, dims, output_size))
    return (max_pool_grad(dy, indices, *x.shape[-dims:]),)


def _adaptive_reductions(dims, *args, **kwargs):
    return (2**dims,)


def _special(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    values[rng.random(values.shape) < 0.1] = np.nan
    values[0, :, :4] = -np.inf
    values[1, ..., 7] = np.inf
    return values


def _cases(dims: int) -> Iterator[Case]:
    """Inputs for `pydl verify`: window shapes, overlap, padding, both rounding modes, ties, NaN and -inf."""
    rng = np.random.default_rng(dims)
    odd = {1: (35,), 2: (11, 17), 3: (5, 7, 9)}[dims]
    even = {1: (64,), 2: (12, 12), 3: (4, 6, 8)}[dims]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    yield Case("k3 s2 p1", (normal(2, 9, *odd), 3, 2, 1), layouts=True)  # the usual stem; 9 channels: a vector and 1
    yield Case("k2 s2", (normal(2, 16, *even), 2))
    size = 2 * int(np.prod(even))  # exact in every dtype up to 384 / 2 and no two equal: no kink nearby
    distinct = rng.permutation(size).reshape(1, 2, *even) - size / 2.0
    yield Case("distinct", (distinct, 3, 2, 1), second=True)
    yield Case("k3 s1 p1", (normal(1, 3, *odd), 3, 1, 1))  # each input belongs to 3 ** dims windows
    yield Case("k2 s3", (normal(1, 5, *odd), 2, 3))  # gaps: some inputs belong to none
    uneven = ((2, 5, 1)[:dims], (1, 3, 2)[:dims], (1, 2, 0)[:dims])
    yield Case("one size per axis", (normal(1, 2, *odd), *uneven))
    yield Case("k3 s2 p1 d2", (normal(1, 4, *odd), 3, 2, 1, 2))
    yield Case("k3 s2 p1 ceil", (normal(1, 4, *even), 3, 2, 1, 1, True))  # the last window hangs over the edge
    many = {1: (256,), 2: (16, 16), 3: (4, 8, 8)}[dims]
    yield Case("256 taps", (normal(1, 2, *(2 * n for n in many)), many))  # one more than a byte can number
    yield Case("k = input", (normal(2, 3, *even), even))
    yield Case("k3 p1 over one", (normal(2, 3, 1, *odd[1:]), 3, 2, 1))  # a single output, but more taps than one
    yield Case("one element", (normal(2, 3, *([1] * dims)), 1))
    yield Case("unbatched", (normal(3, *odd), 3, 2, 1))
    yield Case("empty batch", (np.zeros((0, 3, *even)), 3, 2, 1))
    yield Case("return_indices", (normal(2, 3, *odd), 3, 2, 1, 1, False, True))
    yield Case("ties", (np.round(normal(2, 8, *odd)), 3, 2, 1, 1, False, True))
    yield Case("NaN and inf", (_special(normal(2, 8, *odd), rng), 3, 2, 1, 1, False, True))


def _adaptive_cases(dims: int) -> Iterator[Case]:
    rng = np.random.default_rng(10 + dims)
    odd = {1: (35,), 2: (11, 17), 3: (5, 7, 9)}[dims]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    yield Case("to 4", (normal(2, 9, *odd), 4), layouts=True)  # parts of two lengths that overlap
    yield Case("to one", (normal(2, 5, *odd), 1, True))
    yield Case("halves", (normal(2, 3, *({1: (16,), 2: (8, 16), 3: (4, 6, 8)}[dims])), 2, True))
    yield Case("larger than the input", (normal(1, 2, *([3] * dims)), 7, True))
    yield Case("one becomes three", (normal(1, 2, 1, *(4, 6)[: dims - 1]), (3, 2, 2)[:dims], True))
    size = int(np.prod(odd))  # up to 315 in a plane: exact in every dtype around 0, and no two equal
    distinct = np.stack([rng.permutation(size) for _ in range(2)]).reshape(1, 2, *odd) - float(size // 2)
    yield Case("distinct", (distinct, 3), second=True)
    if dims > 1:
        yield Case("None keeps a side", (normal(2, 3, *odd), (None, 5, 2)[:dims], True))
    yield Case("unbatched", (normal(3, *odd), 4))
    yield Case("empty batch", (np.zeros((0, 3, *odd)), 4))
    yield Case("ties", (np.round(normal(2, 8, *odd)), 4, True))
    yield Case("NaN and inf", (_special(normal(2, 8, *odd), rng), 4, True))
    long = {1: (200,), 2: (5, 200), 3: (3, 5, 200)}[dims]  # parts of 67 and 68 columns: several vectors
    yield Case("long parts, ties", (np.round(normal(2, 2, *long)), 3, True))
    yield Case("long parts, NaN and inf", (_special(normal(2, 2, *long), rng), 3, True))


def _spec(dims: int, adaptive: bool) -> Spec:
    bind: Any = functools.partial
    name = f"{'adaptive_' if adaptive else ''}max_pool{dims}d"
    own: tuple[Any, ...]
    if adaptive:
        own = (_adaptive, _adaptive_gradient, _adaptive_cases, _adaptive_reductions)
    else:
        own = (_forward, _gradient, _cases, _reductions)
    forward, gradient, cases, terms = (bind(function, dims) for function in own)
    return Spec(name, f"nn.functional.{name}", forward, gradient, cases, terms)


SPECS = tuple(_spec(dims, adaptive) for dims in (1, 2, 3) for adaptive in (False, True))
