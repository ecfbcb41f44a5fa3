"""RMS normalisation in NumPy float64, from the formula of Zhang and Sennrich (2019)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pydl.reference._spec import Case, Spec


def _axes(x: np.ndarray, normalized_shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes that number the rows, and axes that are normalised over."""
    rows = x.ndim - len(normalized_shape)
    return tuple(range(rows)), tuple(range(rows, x.ndim))


@np.errstate(invalid="ignore")
def rms_norm(
    x: np.ndarray, normalized_shape: Sequence[int], weight: np.ndarray | None = None, eps: float | None = None
) -> np.ndarray:
    """y = x / sqrt(mean(x^2) + eps) * weight; eps must be given: torch's default depends on the dtype."""
    if eps is None:
        raise ValueError("rms_norm: eps must be given")
    x = np.asarray(x, dtype=np.float64)
    if x.size == 0:
        return x.copy()
    _, axes = _axes(x, normalized_shape)
    y = x / np.sqrt((x * x).mean(axis=axes, keepdims=True) + eps)
    return y if weight is None else y * weight


def rms_norm_grad(
    dy: np.ndarray,
    x: np.ndarray,
    normalized_shape: Sequence[int],
    weight: np.ndarray | None = None,
    eps: float | None = None,
) -> tuple[np.ndarray, ...]:
    """Gradients of sum(dy * y) with respect to x and, where there is one, the weight.

    With q = mean(x^2) + eps and g = dy * weight: d(x q^-1/2) = dx q^-1/2 - x q^-3/2 mean(x dx), so that
    dx = g q^-1/2 - x q^-3/2 mean(g x).
    """
    if eps is None:
        raise ValueError("rms_norm: eps must be given")
    x, dy = np.asarray(x, dtype=np.float64), np.asarray(dy, dtype=np.float64)
    rows, axes = _axes(x, normalized_shape)
    if x.size == 0:
        return (x.copy(),) if weight is None else (x.copy(), np.zeros(tuple(normalized_shape)))
    q = (x * x).mean(axis=axes, keepdims=True) + eps
    g = dy if weight is None else dy * weight
    dx = g / np.sqrt(q) - x / q**1.5 * (g * x).mean(axis=axes, keepdims=True)
    return (dx,) if weight is None else (dx, (dy * x / np.sqrt(q)).sum(axis=rows))


def _reductions(x, normalized_shape, weight=None, eps=None):
    rows = int(np.prod(x.shape[: x.ndim - len(normalized_shape)]))
    return (1, max(rows, 1))


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: sizes around vector widths and tile edges, and rows of every magnitude."""
    rng = np.random.default_rng(2019)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    def weight(*shape: int) -> np.ndarray:
        return 1.0 + 0.5 * normal(*shape)

    for n in (1, 2, 31, 64, 257, 1000):  # one element, odd, one vector, a power of two + 1, several tiles with a tail
        yield Case(f"row of {n}", (normal(5, n), (n,), weight(n), 1e-5), layouts=n == 64, second=n == 31)
    yield Case("rows 300", (normal(300, 48), (48,), weight(48), 1e-5))  # more rows than one block of the reduction
    yield Case("long row", (normal(2, 9001), (9001,), weight(9001), 1e-5))  # longer than a single tile
    yield Case("two axes", (normal(2, 3, 4, 5), (4, 5), weight(4, 5), 1e-5), second=True)
    yield Case("all axes", (normal(3, 7), (3, 7), weight(3, 7), 1e-5))
    yield Case("no weight", (normal(4, 33), (33,), None, 1e-5), second=True)
    yield Case("mean 8", (8.0 + normal(6, 120), (120,), weight(120), 1e-5))
    yield Case("large values", (2e4 * normal(3, 50), (50,), weight(50), 1e-5))
    yield Case("tiny values", (1e-4 * normal(3, 50), (50,), weight(50), 1e-12))
    yield Case("eps 0.1", (normal(3, 50), (50,), weight(50), 0.1))
    yield Case("all equal", (np.full((3, 40), 2.5), (40,), weight(40), 1e-5))
    special = normal(4, 19)
    special[1, 3], special[2, 18] = np.nan, np.inf
    yield Case("NaN and inf", (special, (19,), weight(19), 1e-5), gradients=False)
    yield Case("no rows", (np.zeros((0, 16)), (16,), weight(16), 1e-5))


SPECS = (Spec("rms_norm", "nn.functional.rms_norm", rms_norm, rms_norm_grad, cases, _reductions),)
