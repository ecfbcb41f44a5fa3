"""Local response normalisation in NumPy float64, from the formula of Krizhevsky, Sutskever and Hinton (2012).

torch's version of it: the mean over `size` neighbouring channels in place of their sum, zeros beyond the last channel.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._spec import Case, Spec


def _window_sum(v: np.ndarray, before: int, after: int) -> np.ndarray:
    """Sum of v[:, c - before : c + after + 1] for each channel c."""
    total = np.zeros_like(v)
    channels = v.shape[1]
    for c in range(channels):
        total[:, c] = v[:, max(0, c - before) : min(channels, c + after + 1)].sum(axis=1)
    return total


@np.errstate(all="ignore")
def local_response_norm(
    x: np.ndarray, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> np.ndarray:
    """y = x / (k + alpha / size * window sum of x^2)^beta over the channels, axis 1."""
    x = np.asarray(x, dtype=np.float64)
    base = k + alpha / size * _window_sum(x * x, size // 2, (size - 1) // 2)
    return x / base**beta


@np.errstate(all="ignore")
def local_response_norm_grad(
    dy: np.ndarray, x: np.ndarray, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> tuple[np.ndarray]:
    """Gradient of sum(dy * y): each x enters its own quotient and the denominators of all windows that hold it."""
    x, dy = np.asarray(x, dtype=np.float64), np.asarray(dy, dtype=np.float64)
    before, after = size // 2, (size - 1) // 2
    base = k + alpha / size * _window_sum(x * x, before, after)
    to_base = -beta * dy * x / base ** (beta + 1)
    return (dy / base**beta + 2 * alpha / size * x * _window_sum(to_base, after, before),)


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: sizes around vectors and tiles, windows of every kind, powers of every kind."""
    rng = np.random.default_rng(2012)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    # alpha 1: with 1e-4 the denominator would hardly differ from 1
    yield Case("planes", (normal(2, 7, 5, 6), 5, 1.0, 0.75, 1.0), layouts=True, second=True)
    yield Case("defaults", (10 * normal(2, 8, 4, 4), 5))
    yield Case("sequence", (normal(2, 9, 13), 3, 0.5, 0.75, 2.0), layouts=True)
    yield Case("volumes", (normal(2, 6, 3, 2, 5), 3, 0.5, 0.75, 2.0))
    yield Case("four spatial axes", (normal(1, 4, 2, 3, 2, 2), 2, 0.5, 0.75, 1.0))
    yield Case("even window", (normal(2, 6, 3, 3), 4, 1.0, 0.75, 1.0), second=True)
    yield Case("one channel in a window", (normal(2, 6, 3, 3), 1, 1.0, 0.75, 1.0))
    yield Case("window of all channels", (normal(2, 6, 3, 3), 11, 1.0, 0.75, 1.0))
    yield Case("window beyond all channels", (normal(2, 6, 3, 3), 100, 5.0, 0.75, 1.0))
    yield Case("one channel", (normal(2, 1, 3, 3), 5, 1.0, 0.75, 1.0))
    yield Case("wide window", (normal(1, 50, 2, 3), 40, 1.0, 0.75, 1.0))  # wider than a tile's margin
    yield Case("many channels", (normal(1, 137, 5), 5, 1.0, 0.75, 1.0))  # more than a tile of either layout
    yield Case("long plane", (normal(1, 3, 1037), 3, 1.0, 0.75, 1.0))  # more than a tile
    for beta in (0.5, 1.0, 2.3, 0.0, -0.5):
        yield Case(f"beta {beta}", (normal(2, 7, 4, 4), 5, 1.0, beta, 1.5), second=beta == 2.3)
    yield Case("large values", (1e3 * normal(2, 7, 4, 4), 5, 10.0, 0.75, 1.0))
    yield Case("large values, beta 0.6", (1e3 * normal(2, 7, 4, 4), 5, 10.0, 0.6, 1.0))
    yield Case("tiny values without k", (1e-3 * normal(2, 7, 4, 4), 5, 1.0, 0.7, 0.0))
    yield Case("all equal", (np.full((2, 5, 3, 3), 2.0), 3, 1.0, 0.75, 1.0))
    special = normal(1, 12, 2, 5)
    special[0, 3, 0, 1], special[0, 8, 1, 2], special[0, 4, 1, 4] = np.nan, np.inf, -np.inf
    yield Case("NaN and inf", (special, 5, 1.0, 0.75, 1.0), gradients=False)
    yield Case("NaN and inf, beta 0.6", (special, 3, 1.0, 0.6, 1.0), gradients=False)
    yield Case("empty batch", (np.zeros((0, 3, 4, 4)), 5, 1.0, 0.75, 1.0))


def _reductions(x, size, alpha=1e-4, beta=0.75, k=1.0):
    return (min(size, x.shape[1]),)


SPECS = (
    Spec(
        "local_response_norm",
        "nn.functional.local_response_norm",
        local_response_norm,
        local_response_norm_grad,
        cases,
        _reductions,
    ),
)
