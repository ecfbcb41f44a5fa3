"""What the raw operators of group normalisation promise: layouts, shapes, and the derivative of the derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydl.ops._batch_norm_formulas import _like, _stat_dtype, _vector

MaybeTensor = Tensor | None
# what the operators call an activation
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2}


def fwd_fake(
    x: Tensor, groups: int, weight: MaybeTensor, bias: MaybeTensor, activation: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and biased variance of each group of each sample."""
    statistics = [x.new_empty((x.shape[0], groups), dtype=_stat_dtype(x)) for _ in range(2)]
    return _like(x), statistics[0], statistics[1]


def bwd_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    groups: int,
    activation: int,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; what is not wanted is empty."""
    dx = _like(x) if output_mask[0] else x.new_empty((0,))
    return dx, _vector(x, output_mask[1]), _vector(x, output_mask[2])


def _slopes(z: Tensor, activation: int) -> tuple[Tensor | None, Tensor | None]:
    """First and second derivative of the activation; None for 1 and 0."""
    if activation == ACTIVATIONS["relu"]:
        return torch.where(z <= 0, 0.0, torch.ones_like(z)), None
    if activation == ACTIVATIONS["silu"]:
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))
    return None, None


def second_derivative(
    saved: Sequence[MaybeTensor],
    groups: int,
    activation: int,
    eps: float,
    cotangents: Sequence[MaybeTensor],
) -> tuple[MaybeTensor, ...]:
    """Gradient of (dx, dweight, dbias) with respect to (dy, x, weight, bias), in torch operations.

    With xhat = (x - mean) rstd, z = xhat w + bias, dz = dy act'(z), g = dz w and the symmetric map
    P(u) = u - mean(u) - xhat mean(u xhat), the backward is dx = rstd P(g), dweight = sum dz xhat, dbias = sum dz. Its
    cotangents v, a, b give
    dz: u = w rstd P(v) + a xhat + b;  dy: u act'(z);  z: t = u dy act''(z);
    w: sum dz rstd P(v) + sum t xhat;  bias: sum t;
    x: rstd P(a dz + t w - rstd (v mean(g xhat) + g mean(v xhat))) - rstd^2 xhat mean(v P(g)).
    """
    dy_, x_, weight_, bias_ = saved
    assert dy_ is not None and x_ is not None
    stat, shape = _stat_dtype(x_), x_.shape
    split = (shape[0], groups, shape[1] // groups, -1) if x_.numel() else (shape[0], groups, shape[1] // groups, 0)

    def grouped(t: Tensor) -> Tensor:
        return t.to(stat).reshape(split)

    def channels(t: Tensor) -> Tensor:
        return t.to(stat).view(1, groups, -1, 1)

    def average(u: Tensor) -> Tensor:
        return u.mean((2, 3), keepdim=True)

    def project(u: Tensor) -> Tensor:
        return u - average(u) - xhat * average(u * xhat)

    dy, x = grouped(dy_), grouped(x_)
    weight = torch.ones((), dtype=stat, device=x.device) if weight_ is None else channels(weight_)
    # from x: the saved statistics are constants to autograd, and a third derivative needs them to move
    spread, centre = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    rstd = torch.rsqrt(spread + eps)
    xhat = (x - centre) * rstd
    z = xhat * weight if bias_ is None else xhat * weight + channels(bias_)
    first, second = _slopes(z, activation)
    dz = dy if first is None else dy * first

    v, a, b = cotangents
    u, to_xhat, grad_x = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(x)
    grad_weight, grad_bias = torch.zeros_like(dy), None
    if v is not None:
        v = grouped(v)
        projected, g = rstd * project(v), dz * weight
        u = u + weight * projected
        grad_weight = grad_weight + dz * projected
        to_xhat = to_xhat - rstd * (v * average(g * xhat) + g * average(v * xhat))
        grad_x = grad_x - rstd**2 * xhat * average(v * project(g))
    if a is not None:
        u = u + channels(a) * xhat
        to_xhat = to_xhat + channels(a) * dz
    if b is not None:
        u = u + channels(b)
    if second is not None:
        t = u * dy * second
        to_xhat = to_xhat + t * weight
        grad_weight = grad_weight + t * xhat
        grad_bias = None if bias_ is None else t.sum((0, 3)).flatten().to(bias_.dtype)
    grad_x = grad_x + rstd * project(to_xhat)
    grad_dy = u if first is None else u * first
    return (
        grad_dy.reshape(shape).to(dy_.dtype),
        grad_x.reshape(shape).to(x_.dtype),
        None,
        None,
        None if weight_ is None else grad_weight.sum((0, 3)).flatten().to(weight_.dtype),
        grad_bias,
    )
