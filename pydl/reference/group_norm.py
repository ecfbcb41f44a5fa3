"""Group and instance normalisation in NumPy float64, from the formulas of Wu and He, "Group normalization" (2018), and
Ulyanov, Vedaldi, Lempitsky, "Instance normalization" (2016)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._spec import Case, Spec


def _per_channel(values: np.ndarray | None, ndim: int, absent: float) -> np.ndarray:
    """[C] as [1, C, 1, ...]."""
    if values is None:
        return np.full((1,) * ndim, absent)
    return np.asarray(values, dtype=np.float64).reshape(1, -1, *([1] * (ndim - 2)))


def group_means(values: np.ndarray, groups: int) -> np.ndarray:
    """The mean over each group of each sample, repeated over the group: [N, C, *]."""
    rows = values.reshape(values.shape[0], groups, -1)
    return np.broadcast_to(rows.mean(axis=2, keepdims=True), rows.shape).reshape(values.shape)


@np.errstate(invalid="ignore")
def _normalise(x: np.ndarray, groups: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(xhat, rstd), both [N, C, *]."""
    deviation = x - group_means(x, groups)
    rstd = 1.0 / np.sqrt(group_means(deviation**2, groups) + eps)
    return deviation * rstd, rstd


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -z))


@np.errstate(invalid="ignore")
def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, *, activation=None):
    """act((x - mean) / sqrt(variance + eps) * weight + bias), statistics over groups of channels of each sample."""
    x = np.asarray(x, dtype=np.float64)
    if x.size == 0:
        return x.copy()
    xhat, _ = _normalise(x, num_groups, eps)
    z = xhat * _per_channel(weight, x.ndim, 1.0) + _per_channel(bias, x.ndim, 0.0)
    if activation == "relu":
        return np.where(z <= 0, 0.0, z)
    return z * _sigmoid(z) if activation == "silu" else z


@np.errstate(invalid="ignore")
def group_norm_grad(dy, x, num_groups, weight=None, bias=None, eps=1e-5, *, activation=None):
    """Gradients of sum(dy * y) with respect to x, weight and bias, as many of them as are given.

    With z the value before the activation, dz = dy * act'(z) and g = dz * weight, the chain rule through mean and
    variance gives dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), means over a group.
    """
    x, dz = np.asarray(x, dtype=np.float64), np.asarray(dy, dtype=np.float64)
    axes = (0, *range(2, x.ndim))
    if x.size == 0:
        dx, dweight, dbias = np.zeros(x.shape), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    else:
        xhat, rstd = _normalise(x, num_groups, eps)
        scale = _per_channel(weight, x.ndim, 1.0)
        z = xhat * scale + _per_channel(bias, x.ndim, 0.0)
        if activation == "relu":
            dz = np.where(z <= 0, 0.0, dz)
        elif activation == "silu":
            s = _sigmoid(z)
            dz = dz * s * (1 + z * (1 - s))
        g = dz * scale
        dx = rstd * (g - group_means(g, num_groups) - xhat * group_means(g * xhat, num_groups))
        dweight, dbias = (dz * xhat).sum(axis=axes), dz.sum(axis=axes)
    given = ((dx, x), (dweight, weight), (dbias, bias))
    return tuple(gradient for gradient, tensor in given if tensor is not None)


def instance_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    """(x - mean) / sqrt(variance + eps) * weight + bias, statistics over the positions of each channel and sample."""
    if use_input_stats or np.size(x) == 0:
        return group_norm(x, max(1, np.shape(x)[1]), weight, bias, eps)
    x = np.asarray(x, dtype=np.float64)
    xhat = (x - _per_channel(running_mean, x.ndim, 0.0)) / np.sqrt(_per_channel(running_var, x.ndim, 1.0) + eps)
    return xhat * _per_channel(weight, x.ndim, 1.0) + _per_channel(bias, x.ndim, 0.0)


def instance_norm_grad(
    dy, x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    """Gradients of sum(dy * y) with respect to x, weight and bias, as many of them as are given."""
    if use_input_stats or np.size(x) == 0:
        return group_norm_grad(dy, x, max(1, np.shape(x)[1]), weight, bias, eps)
    x, dy = np.asarray(x, dtype=np.float64), np.asarray(dy, dtype=np.float64)
    axes = (0, *range(2, x.ndim))
    rstd = 1 / np.sqrt(_per_channel(running_var, x.ndim, 1.0) + eps)
    xhat = (x - _per_channel(running_mean, x.ndim, 0.0)) * rstd
    gradients = (dy * rstd * _per_channel(weight, x.ndim, 1.0), (dy * xhat).sum(axis=axes), dy.sum(axis=axes))
    return tuple(g for g, t in zip(gradients, (x, weight, bias), strict=True) if t is not None)


def instance_running_stats(
    running_mean: np.ndarray, running_var: np.ndarray, x: np.ndarray, momentum: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """The running statistics after a call: (1 - momentum) * running + momentum * the average over the samples."""
    axes = tuple(range(2, x.ndim))
    mean, variance = x.mean(axis=axes).mean(axis=0), x.var(axis=axes, ddof=1).mean(axis=0)
    return (1 - momentum) * running_mean + momentum * mean, (1 - momentum) * running_var + momentum * variance


def _reductions(x, num_groups, weight=None, bias=None, eps=1e-5, **tail):
    count = max(1, x.size // max(1, x.shape[1]))
    return (1, *(count for t in (weight, bias) if t is not None))


def _instance_reductions(x, running_mean=None, running_var=None, weight=None, bias=None, *rest, **named):
    return _reductions(x, 1, weight, bias)


class _Arguments:
    """Draws what a call needs for an x of some shape."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)

    def affine(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        return 1.0 + 0.5 * self.normal(channels), self.normal(channels)

    def group(self, x: np.ndarray, groups: int, eps: float = 1e-5) -> tuple:
        return (x, groups, *self.affine(x.shape[1]), eps)

    def instance(self, x: np.ndarray, eps: float = 1e-5) -> tuple:
        # without running statistics: a grader's inputs must not change
        return (x, None, None, *self.affine(x.shape[1]), True, 0.1, eps)

    def eval(self, x: np.ndarray) -> tuple:
        channels = x.shape[1]
        return (x, self.normal(channels), 0.5 + self.rng.random(channels), *self.affine(channels), False)


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: group sizes, vector widths, and groups that are hard for the variance."""
    a = _Arguments(2018)
    yield Case("4x9x5x7 by 3", a.group(a.normal(4, 9, 5, 7), 3), layouts=True)  # 35 positions: vectors and tails
    for groups in (1, 4, 12):  # one group; some; a group for each channel
        yield Case(f"2x12x3x5 by {groups}", a.group(a.normal(2, 12, 3, 5), groups))
    for channels, groups in ((62, 2), (128, 8), (31, 1)):  # one position: a group is a row of channels
        yield Case(f"5x{channels} by {groups}", a.group(a.normal(5, channels), groups))
    yield Case("3x4x6 by 2", a.group(a.normal(3, 4, 6), 2), second=True)
    for activation in ("relu", "silu"):
        # away from relu's kink
        x = a.normal(2, 4, 3)
        weight, bias = a.affine(4)
        arguments = (x, 2, weight, 8.0 * np.sign(bias) if activation == "relu" else bias)
        yield Case(f"second, {activation}", arguments, {"activation": activation}, second=True)
        yield Case(f"4x9x5x7, {activation}", a.group(a.normal(4, 9, 5, 7), 3), {"activation": activation}, layouts=True)
        yield Case(f"3x34 by 2, {activation}", a.group(a.normal(3, 34), 2), {"activation": activation})
        yield Case(f"no parameters, {activation}", (a.normal(2, 6, 5), 3), {"activation": activation})
    yield Case("2x3x4x2x3 by 3", a.group(a.normal(2, 3, 4, 2, 3), 3), second=True)
    yield Case("1x2x70x70 by 1", a.group(a.normal(1, 2, 70, 70), 1))  # a plane of several blocks
    yield Case("1x2x20000 by 1", a.group(a.normal(1, 2, 20000), 1))  # longer than a piece
    yield Case("5x3 by 3", a.group(a.normal(5, 3), 3), gradients=False)  # one value: y is the bias, dx 0
    yield Case("two values", a.group(a.normal(3, 6, 1), 3), gradients=False)  # the gradient is a difference of equals
    x = a.normal(3, 6, 4)
    yield Case("no parameters", (x, 2), second=True)
    yield Case("weight only", (x, 2, a.affine(6)[0]))
    yield Case("bias only", (x, 2, None, a.normal(6)))
    yield Case("weight of zeros", (x, 3, np.zeros(6), a.normal(6)))
    yield Case("mean 8", a.group(8.0 + a.normal(3, 6, 4, 4), 2))
    yield Case("mean 1e4", a.group(1e4 + a.normal(3, 6, 8, 8), 2), gradients=False)
    uneven = 1e4 + a.normal(3, 6, 8, 8)
    uneven[:, ::3] = 0.0  # channels of a group with different means, and a poor first guess
    yield Case("mean 1e4 behind zeros", a.group(uneven, 2), gradients=False)
    yield Case("large values", a.group(2e4 * a.normal(4, 4, 5), 2))
    yield Case("tiny values", a.group(1e-4 * a.normal(4, 4, 5), 2, 1e-12))
    yield Case("eps 0.1", a.group(a.normal(4, 4, 5), 2, 0.1))
    yield Case("constant groups", a.group(np.full((3, 4, 5), 2.5), 2))  # 2.5 for all: no rounding in the mean
    special = a.normal(4, 6, 5)
    special[1, 1, 3], special[2, 3, 0], special[0, 4, 1] = np.nan, np.inf, -np.inf
    yield Case("NaN and inf", a.group(special, 3), gradients=False)
    yield Case("empty batch", a.group(np.zeros((0, 6, 4, 4)), 3))
    yield Case("no positions", a.group(np.zeros((2, 6, 0)), 3))


def instance_cases() -> Iterator[Case]:
    """The same with one channel per group, and with given statistics."""
    a = _Arguments(2016)
    yield Case("4x9x5x7", a.instance(a.normal(4, 9, 5, 7)), layouts=True)
    yield Case("4x9x5x7, given statistics", a.eval(a.normal(4, 9, 5, 7)), layouts=True)
    yield Case("3x4x6", a.instance(a.normal(3, 4, 6)), second=True)
    yield Case("3x4x6, given statistics", a.eval(a.normal(3, 4, 6)), second=True)
    yield Case("2x3x4x2x3", a.instance(a.normal(2, 3, 4, 2, 3)))
    yield Case("1x1x17", a.instance(a.normal(1, 1, 17)))
    yield Case("rows, given statistics", a.eval(a.normal(5, 33)))
    yield Case("no parameters", (a.normal(3, 5, 4),), second=True)
    yield Case("mean 1e4", a.instance(1e4 + a.normal(3, 6, 8, 8)), gradients=False)
    special = a.normal(4, 6, 5)
    special[1, 1, 3], special[2, 3, 0] = np.nan, np.inf
    yield Case("NaN and inf", a.instance(special), gradients=False)
    yield Case("empty batch", (np.zeros((0, 3, 4, 4)),))  # with parameters torch fails


SPECS = (
    Spec("group_norm", "pydl.ops.group_norm:torch_group_norm", group_norm, group_norm_grad, cases, _reductions),
    Spec(
        "instance_norm",
        "nn.functional.instance_norm",
        instance_norm,
        instance_norm_grad,
        instance_cases,
        _instance_reductions,
        constants=(1, 2),
    ),
)
