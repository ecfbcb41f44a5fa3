"""Max unpooling in NumPy float64, from its definition: each element at its position, zero elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pydl.reference._pool import per_axis
from pydl.reference._spec import Case, Spec
from pydl.reference.max_pool import max_pool


def _size(dims, x, kernel_size, stride, padding, output_size):
    k, p = per_axis(kernel_size, dims), per_axis(padding, dims)
    s = k if stride is None else per_axis(stride, dims)
    if output_size is not None:
        return tuple(output_size)[-dims:]
    return tuple((n - 1) * s[i] - 2 * p[i] + k[i] for i, n in enumerate(x.shape[-dims:]))


def max_unpool(dims, x, indices, kernel_size, stride=None, padding=0, output_size=None):
    """Elements in row-major order, so that of several with one index the last stays."""
    size = _size(dims, x, kernel_size, stride, padding, output_size)
    lead = x.shape[:-dims]
    y = np.zeros((*lead, int(np.prod(size))))
    for place in np.ndindex(x.shape):
        y[place[: len(lead)]][indices[place]] = x[place]
    return y.reshape(*lead, *size)


def _gradient(dims, dy, x, indices, *args, **kwargs):
    lead = x.shape[:-dims]
    flat, places = (a.reshape(*lead, int(np.prod(a.shape[-dims:]))) for a in (dy, indices))
    return (np.take_along_axis(flat, places, -1).reshape(x.shape),)


def _cases(dims: int) -> Iterator[Case]:
    rng = np.random.default_rng(dims)
    odd = {1: (35,), 2: (11, 17), 3: (5, 7, 9)}[dims]
    even = {1: (32,), 2: (8, 16), 3: (4, 6, 8)}[dims]

    def pooled(*shape: int, **window: Any) -> tuple[np.ndarray, np.ndarray]:
        return max_pool(dims, rng.standard_normal(shape), **window)

    yield Case("k2", (*pooled(2, 9, *even, kernel_size=2), 2), layouts=True)
    yield Case("k2, second", (*pooled(1, 2, *even, kernel_size=2), 2), second=True)
    yield Case("k2 of odd sizes", (*pooled(2, 3, *odd, kernel_size=2), 2, None, 0, odd))
    yield Case("the whole shape", (*pooled(2, 3, *odd, kernel_size=3), 3, 3, 0, (2, 3, *odd)))
    yield Case("k3 s3 p1", (*pooled(1, 5, *odd, kernel_size=3, stride=3, padding=1), 3, 3, 1, odd))
    yield Case("unbatched", (*pooled(3, *even, kernel_size=2), 2))
    yield Case("empty batch", (np.zeros((0, 3, *even)), np.zeros((0, 3, *even), dtype=np.int64), 2))


def _spec(dims: int) -> Spec:
    bind: Any = functools.partial
    name = f"max_unpool{dims}d"
    forward, gradient, cases = (bind(f, dims) for f in (max_unpool, _gradient, _cases))
    return Spec(name, f"nn.functional.{name}", forward, gradient, cases)


SPECS = tuple(_spec(dims) for dims in (1, 2, 3))
