"""Batch normalisation in NumPy float64, from the formula of Ioffe and Szegedy, "Batch normalization" (2015)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._spec import Case, Spec


def _per_channel(values: np.ndarray, ndim: int) -> np.ndarray:
    """[C] as [1, C, 1, ...]."""
    return np.asarray(values, dtype=np.float64).reshape(1, -1, *([1] * (ndim - 2)))


@np.errstate(invalid="ignore")
def batch_norm_stats(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of each channel of x [N, C, *]."""
    x = np.asarray(x, dtype=np.float64)
    axes = (0, *range(2, x.ndim))
    mean = x.mean(axis=axes)
    return mean, ((x - _per_channel(mean, x.ndim)) ** 2).mean(axis=axes)


def running_stats(
    running_mean: np.ndarray, running_var: np.ndarray, x: np.ndarray, momentum: float = 0.1, biased: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The running mean and variance after a training step: (1 - momentum) * running + momentum * batch."""
    mean, variance = batch_norm_stats(x)
    count = x.size // x.shape[1]
    if not biased:
        variance = variance * count / (count - 1)
    return (1 - momentum) * running_mean + momentum * mean, (1 - momentum) * running_var + momentum * variance


@np.errstate(invalid="ignore")
def _normalise(x, running_mean, running_var, training, eps):
    """(xhat, rstd) with the batch's statistics or the running ones."""
    mean, variance = batch_norm_stats(x) if training else (running_mean, running_var)
    rstd = 1.0 / np.sqrt(_per_channel(variance, x.ndim) + eps)
    return (x - _per_channel(mean, x.ndim)) * rstd, rstd


@np.errstate(invalid="ignore")
def batch_norm_act(
    x,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    residual=None,
    activation=None,
):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, then + residual, then max(y, 0) with "relu"."""
    x = np.asarray(x, dtype=np.float64)
    if x.size == 0:
        return x.copy()
    y, _ = _normalise(x, running_mean, running_var, training, eps)
    if weight is not None:
        y = y * _per_channel(weight, x.ndim)
    if bias is not None:
        y = y + _per_channel(bias, x.ndim)
    if residual is not None:
        y = y + residual
    return np.where(y <= 0, 0.0, y) if activation == "relu" else y


def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, statistics over all axes but the second."""
    return batch_norm_act(x, running_mean, running_var, weight, bias, training, momentum, eps)


@np.errstate(invalid="ignore")
def batch_norm_act_grad(
    dy,
    x,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    residual=None,
    activation=None,
):
    """Gradients of sum(dy * y) with respect to x, weight, bias and residual, as many of them as are given.

    With dz = dy where relu passes and g = dz * weight, the chain rule through mean and variance gives
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), means over a channel; with given statistics dx = rstd * g.
    """
    x, dz = np.asarray(x, dtype=np.float64), np.asarray(dy, dtype=np.float64)
    axes = (0, *range(2, x.ndim))
    if x.size == 0:
        dx, dweight, dbias = np.zeros(x.shape), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    else:
        if activation == "relu":
            y = batch_norm_act(x, running_mean, running_var, weight, bias, training, momentum, eps, residual=residual)
            dz = np.where(y <= 0, 0.0, dz)
        xhat, rstd = _normalise(x, running_mean, running_var, training, eps)
        g = dz if weight is None else dz * _per_channel(weight, x.ndim)
        if training:
            along = (g * xhat).mean(axis=axes, keepdims=True)
            dx = rstd * (g - g.mean(axis=axes, keepdims=True) - xhat * along)
        else:
            dx = rstd * g
        dweight, dbias = (dz * xhat).sum(axis=axes), dz.sum(axis=axes)
    given = ((dx, x), (dweight, weight), (dbias, bias), (dz, residual))
    return tuple(gradient for gradient, tensor in given if tensor is not None)


def batch_norm_grad(dy, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """Gradients of sum(dy * y) with respect to x, weight and bias, as many of them as are given."""
    return batch_norm_act_grad(dy, x, running_mean, running_var, weight, bias, training, momentum, eps)


def _reductions(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, **tail):
    count = max(1, x.size // max(1, x.shape[1]))
    return (1, *(count for t in (weight, bias) if t is not None))


class _Arguments:
    """Draws what a call needs for an x of some shape."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)

    def affine(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        return 1.0 + 0.5 * self.normal(channels), self.normal(channels)

    def train(self, x: np.ndarray, eps: float = 1e-5) -> tuple:
        # without running statistics: a grader's inputs must not change
        return (x, None, None, *self.affine(x.shape[1]), True, 0.1, eps)

    def eval(self, x: np.ndarray, eps: float = 1e-5) -> tuple:
        channels = x.shape[1]
        return (x, self.normal(channels), 0.5 + self.rng.random(channels), *self.affine(channels), False, 0.1, eps)


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: ranks, vector widths, and channels that are hard for the variance."""
    a = _Arguments(2015)
    yield Case("4x9x5x7", a.train(a.normal(4, 9, 5, 7)), layouts=True)  # 9 channels, 35 positions: vectors and tails
    yield Case("4x9x5x7 eval", a.eval(a.normal(4, 9, 5, 7)), layouts=True)
    for channels in (1, 2, 31, 64):  # a single plane; odd; a vector and more, as rows
        yield Case(f"5x{channels}", a.train(a.normal(5, channels)))
    yield Case("3x4x6", a.train(a.normal(3, 4, 6)), second=True)
    yield Case("3x4x6 eval", a.eval(a.normal(3, 4, 6)), second=True)
    yield Case("2x3x4x2x3", a.train(a.normal(2, 3, 4, 2, 3)), second=True)
    yield Case(
        "two values", a.train(a.normal(2, 6)), gradients=False
    )  # xhat is +-1, the gradient a difference of equals
    yield Case("600x33", a.train(a.normal(600, 33)))  # more rows than one chunk
    yield Case("3x2x70x70", a.train(a.normal(3, 2, 70, 70)))  # planes of several blocks
    yield Case("1x2x20000", a.train(a.normal(1, 2, 20000)))  # a plane longer than a piece
    x = a.normal(3, 5, 4)
    yield Case("no parameters", (x, None, None, None, None, True), second=True)
    yield Case("weight only", (x, None, None, a.affine(5)[0], None, True))
    yield Case("bias only, eval", (x, a.normal(5), 0.5 + a.rng.random(5), None, a.normal(5)))
    yield Case("mean 8", a.train(8.0 + a.normal(6, 5, 4, 4)))
    yield Case("mean 1e4", a.train(1e4 + a.normal(6, 5, 8, 8)), gradients=False)
    padded = 1e4 + a.normal(6, 5, 8, 8)
    padded[:2] = 0.0  # what a shift by the first elements gets wrong
    yield Case("mean 1e4 behind zeros", a.train(padded), gradients=False)
    yield Case("large values", a.train(2e4 * a.normal(4, 3, 5)))
    yield Case("tiny values", a.train(1e-4 * a.normal(4, 3, 5), 1e-12))
    yield Case("eps 0.1", a.train(a.normal(4, 3, 5), 0.1))
    # 2.5 for all: no rounding in the mean
    yield Case("constant channels", a.train(np.full((3, 4, 5), 2.5)))
    # the course's free test: a weight of sqrt(var + eps) and a bias of mean give x back
    mean, variance = batch_norm_stats(x)
    yield Case("identity", (x, None, None, np.sqrt(variance + 1e-5), mean, True))
    special = a.normal(4, 6, 5)
    special[1, 1, 3], special[2, 3, 0], special[0, 4, 1] = np.nan, np.inf, -np.inf
    yield Case("NaN and inf", a.train(special), gradients=False)
    yield Case("NaN and inf, eval", a.eval(special), gradients=False)
    yield Case("empty batch", a.train(np.zeros((0, 3, 4, 4))))
    yield Case("no positions, eval", a.eval(np.zeros((2, 3, 0))))


def act_cases() -> Iterator[Case]:
    """The same with an addition and relu behind it."""
    a = _Arguments(1512)

    def tail(x: np.ndarray, add: bool = True, relu: bool = True) -> dict:
        return {
            **({"residual": a.normal(*x.shape)} if add else {}),
            **({"activation": "relu"} if relu else {}),
        }

    for name, arguments in (("train", a.train), ("eval", a.eval)):
        x = a.normal(4, 9, 5, 7)
        yield Case(f"add and relu, {name}", arguments(x), tail(x), layouts=True)
        yield Case(f"relu, {name}", arguments(x), tail(x, add=False))
        yield Case(f"add, {name}", arguments(x), tail(x, relu=False))
        yield Case(f"neither, {name}", arguments(x))
        small = a.normal(3, 2, 4)
        # so large that no value is near the kink of relu
        kinked = {"residual": 8.0 * np.sign(a.normal(3, 2, 4)), "activation": "relu"}
        yield Case(f"second, {name}", arguments(small), kinked, second=True)
        rows = a.normal(37, 67)  # 67 channels: the bits of a row do not end with a byte
        yield Case(f"rows, {name}", arguments(rows), tail(rows))
        one = a.normal(5, 1, 7)
        yield Case(f"one channel, {name}", arguments(one), tail(one))
    long = a.normal(2, 3, 2100)
    yield Case("long planes", a.train(long), tail(long))
    special = a.normal(4, 6, 5)
    special[1, 1, 3], special[2, 3, 0] = np.nan, np.inf
    yield Case("NaN and inf", a.eval(special), tail(special), gradients=False)
    empty = np.zeros((0, 3, 4))
    yield Case("empty batch", a.train(empty), tail(empty))


SPECS = (
    Spec(
        "batch_norm",
        "nn.functional.batch_norm",
        batch_norm,
        batch_norm_grad,
        cases,
        _reductions,
        constants=(1, 2),
    ),
    Spec(
        "batch_norm_act",
        "pydl.ops.batch_norm:torch_batch_norm_act",
        batch_norm_act,
        batch_norm_act_grad,
        act_cases,
        _reductions,
        constants=(1, 2),
    ),
)
