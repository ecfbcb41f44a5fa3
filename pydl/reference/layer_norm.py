"""Layer normalisation in NumPy float64, from the formula of Ba, Kiros and Hinton, "Layer Normalization" (2016)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pydl.reference._spec import Case, Spec


def _split(x: np.ndarray, normalized_shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes that number the rows, and axes that are normalised over."""
    rows = x.ndim - len(normalized_shape)
    if tuple(x.shape[rows:]) != tuple(normalized_shape):
        raise ValueError(f"x has shape {x.shape}, which does not end in {tuple(normalized_shape)}")
    return tuple(range(rows)), tuple(range(rows, x.ndim))


@np.errstate(invalid="ignore")
def layer_norm_stats(
    x: np.ndarray, normalized_shape: Sequence[int], eps: float = 1e-5
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / sqrt(biased variance + eps) of each row, normalised axes kept with length 1."""
    x = np.asarray(x, dtype=np.float64)
    _, axes = _split(x, normalized_shape)
    mean = x.mean(axis=axes, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=axes, keepdims=True)
    return mean, 1.0 / np.sqrt(variance + eps)


@np.errstate(invalid="ignore")
def layer_norm(
    x: np.ndarray,
    normalized_shape: Sequence[int],
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    eps: float = 1e-5,
) -> np.ndarray:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, statistics over the trailing `normalized_shape`."""
    x = np.asarray(x, dtype=np.float64)
    if x.size == 0:
        return x.copy()
    mean, rstd = layer_norm_stats(x, normalized_shape, eps)
    y = (x - mean) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y


@np.errstate(invalid="ignore")
def layer_norm_grad(
    dy: np.ndarray,
    x: np.ndarray,
    normalized_shape: Sequence[int],
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    eps: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients (dx, dweight, dbias) of sum(dy * y); the last two are computed also when the parameter is absent.

    With x_hat = (x - mean) * rstd and g = dy * weight, the chain rule through mean and variance gives
    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), means over the normalised axes.
    """
    x = np.asarray(x, dtype=np.float64)
    dy = np.asarray(dy, dtype=np.float64)
    rows, axes = _split(x, normalized_shape)
    if x.size == 0:
        return np.zeros(x.shape), np.zeros(tuple(normalized_shape)), np.zeros(tuple(normalized_shape))
    mean, rstd = layer_norm_stats(x, normalized_shape, eps)
    x_hat = (x - mean) * rstd
    g = dy if weight is None else dy * weight
    projection = (g * x_hat).mean(axis=axes, keepdims=True)
    dx = rstd * (g - g.mean(axis=axes, keepdims=True) - x_hat * projection)
    return dx, (dy * x_hat).sum(axis=rows), dy.sum(axis=rows)


def _gradient(dy, x, normalized_shape, weight=None, bias=None, eps=1e-5):
    dx, dweight, dbias = layer_norm_grad(dy, x, normalized_shape, weight, bias, eps)
    present = [True, weight is not None, bias is not None]
    return tuple(g for g, wanted in zip((dx, dweight, dbias), present, strict=True) if wanted)


def _reductions(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    rows = int(np.prod(x.shape[: x.ndim - len(normalized_shape)]))
    return (1, max(rows, 1), max(rows, 1))


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: sizes around vector widths and tile edges, and rows that are hard for the variance."""
    rng = np.random.default_rng(2016)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    def affine(*shape: int) -> tuple[np.ndarray, np.ndarray]:
        return 1.0 + 0.5 * normal(*shape), normal(*shape)

    for n in (1, 2, 31, 64, 257, 1000):  # one element, odd, one vector, a power of two + 1, several tiles with a tail
        yield Case(f"row of {n}", (normal(5, n), (n,), *affine(n), 1e-5), layouts=n == 64, second=n == 31)
    yield Case("rows 300", (normal(300, 48), (48,), *affine(48), 1e-5))  # more rows than one block of the reduction
    yield Case("long row", (normal(2, 9001), (9001,), *affine(9001), 1e-5))  # longer than a single tile
    yield Case("two axes", (normal(2, 3, 4, 5), (4, 5), *affine(4, 5), 1e-5), second=True)
    yield Case("all axes", (normal(3, 7), (3, 7), *affine(3, 7), 1e-5))
    yield Case("no parameters", (normal(4, 33), (33,), None, None, 1e-5), second=True)
    yield Case("weight only", (normal(4, 33), (33,), affine(33)[0], None, 1e-5))
    yield Case("bias only", (normal(4, 33), (33,), None, affine(33)[1], 1e-5))
    yield Case("mean 8", (8.0 + normal(6, 120), (120,), *affine(120), 1e-5))
    yield Case("mean 1e4", (1e4 + normal(6, 120), (120,), *affine(120), 1e-5), gradients=False)
    yield Case("large values", (2e4 * normal(3, 50), (50,), *affine(50), 1e-5))
    yield Case("tiny values", (1e-4 * normal(3, 50), (50,), *affine(50), 1e-12))
    yield Case("eps 0.1", (normal(3, 50), (50,), *affine(50), 0.1))
    yield Case("constant rows", (np.full((3, 40), 2.5), (40,), *affine(40), 1e-5))
    special = normal(4, 19)
    special[1, 3], special[2, 18] = np.nan, np.inf
    yield Case("NaN and inf", (special, (19,), *affine(19), 1e-5), gradients=False)
    yield Case("no rows", (np.zeros((0, 16)), (16,), *affine(16), 1e-5))


SPECS = (Spec("layer_norm", "nn.functional.layer_norm", layer_norm, _gradient, cases, _reductions),)
