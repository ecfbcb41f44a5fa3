"""Average pooling over one to three dimensions in NumPy, from its definition: the mean of each window."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pydl.reference._pool import adaptive_axes
from pydl.reference._pool import per_axis as _list
from pydl.reference._spec import Case, Spec


def windows(
    size: int, kernel: int, stride: int, padding: int, ceil_mode: bool, include: bool
) -> list[tuple[range, int]]:
    """For each window along one axis its positions inside the input, and how many elements the mean counts."""
    room = size + 2 * padding - kernel
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    found = []
    for o in range(count):
        start = o * stride - padding
        if ceil_mode and start >= size:  # a last window must start inside the input or its left padding
            break
        inside = range(max(start, 0), min(start + kernel, size))
        found.append((inside, min(start + kernel, size + padding) - start if include else len(inside)))
    return found


def _axes(x, dims, kernel_size, stride, padding, ceil_mode, include):
    k, p = _list(kernel_size, dims), _list(padding, dims)
    s = k if stride is None else _list(stride, dims)
    return [windows(n, k[i], s[i], p[i], ceil_mode, include) for i, n in enumerate(x.shape[-dims:])]


def _boxes(axes):
    """Each output's place, the slices of its window, and the number of elements that the mean counts."""
    for place in itertools.product(*(range(len(axis)) for axis in axes)):
        chosen = [axis[o] for axis, o in zip(axes, place, strict=True)]
        slices = [slice(inside.start, inside.stop) for inside, _ in chosen]
        yield (..., *place), (..., *slices), int(np.prod([count for _, count in chosen]))


def means(x: np.ndarray, axes: Any, divisor: int | None = None) -> np.ndarray:
    """Sum of each window of the last axes over its number of elements, or over ``divisor``."""
    x = np.asarray(x, dtype=np.longdouble)  # so that no order of summation in float64 is the right one
    dims = len(axes)
    y = np.zeros((*x.shape[:-dims], *(len(axis) for axis in axes)), dtype=np.longdouble)
    for place, box, count in _boxes(axes):
        y[place] = x[box].sum(axis=tuple(range(-dims, 0))) / (divisor or count)
    return y.astype(np.float64)


def means_grad(dy: np.ndarray, x: np.ndarray, axes: Any, divisor: int | None = None) -> tuple[np.ndarray]:
    """Gradient of sum(dy * y) with respect to x: every element of a window receives dy over the divisor."""
    dx = np.zeros(x.shape, dtype=np.longdouble)
    for place, box, count in _boxes(axes):
        share = dy[place].astype(np.longdouble) / (divisor or count)
        dx[box] += share.reshape(*share.shape, *([1] * len(axes)))
    return (dx.astype(np.float64),)


def avg_pool(dims, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor=None):
    """Mean of each window of the last ``dims`` axes."""
    return means(x, _axes(x, dims, kernel_size, stride, padding, ceil_mode, count_include_pad), divisor)


def _avg_pool_grad(
    dims, dy, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor=None
):
    return means_grad(dy, x, _axes(x, dims, kernel_size, stride, padding, ceil_mode, count_include_pad), divisor)


def _parts(x, dims, output_size):
    return [[(part, len(part)) for part in axis] for axis in adaptive_axes(x.shape, dims, output_size)]


def adaptive_avg_pool(dims: int, x: np.ndarray, output_size: Any) -> np.ndarray:
    """Mean of each part of the last ``dims`` axes."""
    return means(x, _parts(x, dims, output_size))


def _adaptive_grad(dims, dy, x, output_size):
    return means_grad(dy, x, _parts(x, dims, output_size))


def _adaptive_reductions(dims, *args, **kwargs):
    return (2**dims,)


def _reductions(dims, x, kernel_size, stride=None, *rest, **options):
    k = _list(kernel_size, dims)
    s = k if stride is None else _list(stride, dims)
    return (int(np.prod([max(1, -(-a // b)) for a, b in zip(k, s, strict=True)])),)


def _cases(dims: int) -> Iterator[Case]:
    rng = np.random.default_rng(dims)
    shapes: dict[int, list[tuple[int, ...]]] = {1: [(35,), (16,)], 2: [(11, 35), (8, 16)], 3: [(5, 7, 19), (4, 6, 16)]}
    odd, even = shapes[dims]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    # 9 channels: a vector and one more; odd sizes: tails and a last window that does not fit
    yield Case("k3 s2 p1", (normal(2, 9, *odd), 3, 2, 1), layouts=True)
    yield Case("k3 s2 p1, inside", (normal(2, 3, *odd), 3, 2, 1, False, False), second=True)
    yield Case("k2 s2", (normal(2, 17, *even), 2))
    yield Case("k2 s2 of odd sizes, ceil", (normal(1, 3, *odd), 2, 2, 0, True))
    yield Case("k3 s1 p1, far from 0", (8 + normal(1, 3, *odd), 3, 1, 1))  # each input belongs to 3 ** dims windows
    yield Case("k4 s3 p2, ceil, inside", (normal(1, 5, *odd), 4, 3, 2, True, False))
    yield Case("k2 s3", (normal(1, 4, *odd), 2, 3))  # gaps: some inputs belong to no window
    uneven = ((4, 1, 3)[:dims], (1, 2, 3)[:dims], (2, 0, 1)[:dims])
    yield Case("one size per axis", (normal(1, 2, *odd), *uneven))
    yield Case("k = input", (normal(2, 3, *even), even))
    yield Case("one element", (normal(2, 3, *([1] * dims)), 1))
    yield Case("k1 s2", (normal(1, 3, *odd), 1, 2))
    yield Case("unbatched", (normal(3, *odd), 3, 2, 1))
    yield Case("empty batch", (np.zeros((0, 3, *even)), 3, 2, 1))
    if dims > 1:
        yield Case("divisor_override", (normal(1, 3, *odd), 3, 2, 1, False, True, 7), second=True)
        yield Case("negative divisor", (normal(1, 3, *odd), 2, 2, 0, True, False, -2))
    special = normal(2, 3, *odd)
    special[0, :, :3] = np.inf
    special[1, ..., 4] = np.nan
    yield Case("NaN and inf", (special, 3, 2, 1), gradients=False)


def _adaptive_cases(dims: int) -> Iterator[Case]:
    rng = np.random.default_rng(10 + dims)
    odd = {1: (35,), 2: (11, 17), 3: (5, 7, 9)}[dims]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    yield Case("to 4", (normal(2, 9, *odd), 4), layouts=True)  # parts of two lengths that overlap
    yield Case("to 3", (normal(2, 3, *odd), 3), second=True)
    yield Case("to one", (normal(2, 17, *odd), 1))
    yield Case("to one, far from 0", (8 + normal(2, 3, *odd), 1))
    yield Case("halves", (normal(2, 3, *({1: (16,), 2: (8, 16), 3: (4, 6, 8)}[dims])), 2))
    yield Case("larger than the input", (normal(1, 2, *([3] * dims)), 7))
    yield Case("one becomes three", (normal(1, 2, 1, *(4, 6)[: dims - 1]), (3, 2, 2)[:dims]))
    if dims > 1:
        yield Case("None keeps a side", (normal(2, 3, *odd), (None, 5, 2)[:dims]))
    yield Case("unbatched", (normal(3, *odd), 4))
    yield Case("empty batch", (np.zeros((0, 3, *odd)), 4))


def lp_pool(dims, x, norm_type, kernel_size, stride=None, ceil_mode=False):
    """(sum of x ** p) ** (1 / p) of each window, a last one that overhangs scaled up to kernel_size elements."""
    if np.isinf(norm_type):
        axes = _axes(x, dims, kernel_size, stride, 0, ceil_mode, True)
        y = np.zeros((*x.shape[:-dims], *(len(axis) for axis in axes)))
        for place, box, _ in _boxes(axes):
            y[place] = np.abs(x[box]).max(axis=tuple(range(-dims, 0)))
        return y
    elements = int(np.prod(_list(kernel_size, dims)))
    return (avg_pool(dims, x**norm_type, kernel_size, stride, 0, ceil_mode) * elements) ** (1 / norm_type)


def _lp_pool_grad(dims, dy, x, norm_type, kernel_size, stride=None, ceil_mode=False):
    elements = int(np.prod(_list(kernel_size, dims)))
    y = lp_pool(dims, x, norm_type, kernel_size, stride, ceil_mode)
    slope = np.where(y == 0, 0, dy * np.where(y == 0, 1, y) ** (1 - norm_type)) * elements
    axes = _axes(x, dims, kernel_size, stride, 0, ceil_mode, True)
    return (means_grad(slope, x, axes)[0] * x ** (norm_type - 1),)


def _lp_cases(dims: int) -> Iterator[Case]:
    rng = np.random.default_rng(20 + dims)
    odd = {1: (35,), 2: (11, 17), 3: (5, 7, 9)}[dims]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    yield Case("p2 k3 s2", (normal(2, 9, *odd), 2, 3, 2), layouts=True)
    yield Case("p3 of positive values, ceil", (np.abs(normal(2, 3, *odd)) + 0.1, 3.0, 2, None, True))
    yield Case("p1", (np.abs(normal(1, 3, *odd)) + 0.1, 1, 3, 1))
    yield Case("infinity", (normal(2, 3, *odd), np.inf, 2), gradients=False)
    yield Case("away from zero", (np.abs(normal(1, 2, *odd)) + 0.5, 2, 2), second=True)
    zeros = normal(2, 2, *odd)
    zeros[0] = 0
    yield Case("windows of zeros", (zeros, 2, 2))
    yield Case("unbatched", (normal(3, *odd), 2, 2))
    yield Case("empty batch", (np.zeros((0, 3, *odd)), 2, 2))


def _spec(dims: int, kind: str) -> Spec:
    bind: Any = functools.partial
    name = f"{kind}_pool{dims}d"
    own: tuple[Any, ...] = {
        "avg": (avg_pool, _avg_pool_grad, _cases, _reductions),
        "adaptive_avg": (adaptive_avg_pool, _adaptive_grad, _adaptive_cases, _adaptive_reductions),
        "lp": (lp_pool, _lp_pool_grad, _lp_cases, _adaptive_reductions),
    }[kind]
    forward, gradient, cases, terms = (bind(function, dims) for function in own)
    return Spec(name, f"nn.functional.{name}", forward, gradient, cases, terms)


SPECS = tuple(_spec(dims, kind) for dims in (1, 2, 3) for kind in ("avg", "adaptive_avg", "lp"))
