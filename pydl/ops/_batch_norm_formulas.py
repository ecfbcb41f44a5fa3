"""What the raw operators of batch normalisation promise: layouts, shapes, and the derivative of the derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

MaybeTensor = Tensor | None


def _memory_format(x: Tensor) -> torch.memory_format:
    """channels_last or channels_last_3d if the strides descend in that order, else contiguous."""
    if x.dim() not in (4, 5):
        return torch.contiguous_format
    return suggest_memory_format(x)


def _rows(x: Tensor) -> bool:
    """Whether the channels are innermost: positions follow one another as rows of channels."""
    channels = x.shape[1]
    return channels > 1 and (_memory_format(x) is not torch.contiguous_format or x.numel() == x.shape[0] * channels)


def _mask_bytes(x: Tensor) -> int:
    """Bytes of one bit per element: planes begin with a byte each, rows follow one another without gaps."""
    channels = x.shape[1]
    if _rows(x) or channels <= 1:
        return (x.numel() + 7) // 8
    inner = math.prod(x.shape[2:])
    return x.shape[0] * channels * ((inner + 7) // 8)


def _unpack(mask: Tensor, x: Tensor) -> Tensor:
    """The bits as booleans of x's shape."""
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    if _rows(x) or x.shape[1] <= 1:
        flat = bits.flatten()[: x.numel()].bool()
        if _memory_format(x) is torch.contiguous_format:
            return flat.view(x.shape)
        last = (x.shape[0], *x.shape[2:], x.shape[1])
        return flat.view(last).movedim(-1, 1)
    planes = bits.view(x.shape[0] * x.shape[1], -1)
    return planes[:, : math.prod(x.shape[2:])].bool().view(x.shape)


def _stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _vector(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty((x.shape[1] if wanted else 0,), dtype=_stat_dtype(x))


def _mask(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty((_mask_bytes(x) if wanted else 0,), dtype=torch.uint8)


def train_fake(
    x: Tensor, weight: MaybeTensor, bias: MaybeTensor, residual: MaybeTensor, relu: bool, eps: float
) -> tuple[Tensor, ...]:
    return _like(x), _vector(x), _vector(x), _mask(x, relu)


def eval_fake(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    relu: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    return _like(x), _mask(x, relu and keep)


def bwd_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: MaybeTensor,
    mask: MaybeTensor,
    training: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    def planes(wanted: bool) -> Tensor:
        return _like(x) if wanted else x.new_empty((0,))

    return planes(output_mask[0]), _vector(x, output_mask[1]), _vector(x, output_mask[2]), planes(output_mask[3])


def update_fake(
    running_mean: MaybeTensor, running_var: MaybeTensor, mean: Tensor, var: Tensor, momentum: float, correction: float
) -> None:
    """Nothing is returned."""


def stats_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance."""
    return _vector(x), _vector(x)


def dx_fake(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: MaybeTensor, dweight: Tensor, dbias: Tensor, eps: float
) -> Tensor:
    """dx, laid out as x."""
    return _like(x)


def second_derivative(
    saved: Sequence[MaybeTensor], training: bool, eps: float, cotangents: Sequence[MaybeTensor]
) -> tuple[MaybeTensor, ...]:
    """Gradient of (dx, dweight, dbias, dresidual) with respect to (dy, x, mean, var, weight), in torch operations.

    With dz the masked dy, xhat = (x - mean) rstd, g = dz w and P(u) = u - mean(u) - xhat mean(u xhat), a symmetric map,
    the backward in training is dx = rstd P(g), dweight = sum dz xhat, dbias = sum dz, dresidual = dz. Its cotangents v,
    a, b, r give
    dz: w rstd P(v) + a xhat + b + r;  w: sum dz rstd P(v);
    x: rstd P(a dz - rstd (v mean(g xhat) + g mean(v xhat))) - rstd^2 xhat mean(v P(g)).
    With given statistics P is the identity and xhat moves with x alone.
    """
    dy_, x_, mean, var, weight_, mask = saved
    assert dy_ is not None and x_ is not None and mean is not None and var is not None
    dims = [d for d in range(x_.dim()) if d != 1]
    stat = _stat_dtype(x_)

    def channels(t: Tensor) -> Tensor:
        return t.to(stat).view(1, -1, *([1] * (x_.dim() - 2)))

    x, dz = x_.to(stat), dy_.to(stat)
    if mask is not None:
        kept = _unpack(mask, x_)
        dz = torch.where(kept, dz, 0.0)
    weight = torch.ones((), dtype=stat, device=x.device) if weight_ is None else channels(weight_)
    if training:  # from x: the saved statistics are constants to autograd, and a third derivative needs them to move
        spread, centre = torch.var_mean(x, dims, correction=0, keepdim=True)
    else:
        spread, centre = channels(var), channels(mean)
    rstd = torch.rsqrt(spread + eps)
    xhat = (x - centre) * rstd

    def average(u: Tensor) -> Tensor:
        return u.mean(dims, keepdim=True)

    def project(u: Tensor) -> Tensor:
        return u - average(u) - xhat * average(u * xhat) if training else u

    v, a, b, r = (None if t is None else t.to(stat) for t in cotangents)
    grad_dz, grad_x, grad_weight = torch.zeros_like(dz), torch.zeros_like(x), None
    to_xhat = torch.zeros_like(x)
    if v is not None:
        projected = rstd * project(v)
        grad_dz = grad_dz + weight * projected
        grad_weight = None if weight_ is None else (dz * projected).sum(dims).to(weight_.dtype)
        if training:
            g = dz * weight
            to_xhat = to_xhat - rstd * (v * average(g * xhat) + g * average(v * xhat))
            grad_x = grad_x - rstd**2 * xhat * average(v * project(g))
    if a is not None:
        grad_dz = grad_dz + channels(a) * xhat
        to_xhat = to_xhat + channels(a) * dz
    if b is not None:
        grad_dz = grad_dz + channels(b)
    if r is not None:
        grad_dz = grad_dz + r
    grad_x = grad_x + rstd * project(to_xhat)
    grad_dy = grad_dz if mask is None else torch.where(kept, grad_dz, 0.0)
    return grad_dy.to(dy_.dtype), grad_x.to(x_.dtype), None, None, grad_weight
