"""Layer normalisation over the last dimensions: schema, fake, derivative and public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op, cast
from pydl.ops._row_arguments import check_input, check_parameter, check_shape, dtype_fits, fits, sizes_of

__all__ = ["layer_norm"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FAMILY = Family(
    "layer_norm",
    ops=("layer_norm_fwd", "layer_norm_bwd"),
    order={"cpu": ("cpu",), "cuda": ("triton",)},
    dtypes={"cpu": (*_FLOATS, torch.float64), "triton": _FLOATS},
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each sample over its last dimensions: (x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        input: [*, *normalized_shape], float32, float16 or bfloat16 (float64 on CPU); any strides, any device.
        normalized_shape: sizes of the trailing dimensions that one mean and one variance cover.
        weight: normalized_shape, the input's dtype (float32 is legal beside a half-precision input), or None for 1.
        bias: like weight, or None for 0.
        eps: added to the biased variance before the root.

    Returns:
        Contiguous tensor of the input's shape and dtype. Under CUDA autocast float32, as torch.

    Raises:
        TypeError: input is no tensor, or normalized_shape no sequence of ints.
        RuntimeError: shapes, dtypes or devices that do not fit together.
        NotImplementedError: an input that is not floating point.

    Statistics are float32 (float64 for float64) from deviations around the mean, so a large mean costs no digits.
    Weight gradients are summed in two stages in a fixed order: the same bits on every run. Differentiable at any order.
    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    if type(eps) is not float or not fits(input, normalized_shape, weight, bias):
        normalized_shape, eps = _check(input, normalized_shape, weight, bias, eps)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()
        weight, bias = (t if t is None else t.float() for t in (weight, bias))
    decision = choose(_FAMILY, input)
    if decision.backend == "torch":
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
    y: Tensor = _fwd(decision, input, normalized_shape, weight, bias, eps)
    return y


def _check(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Sequence[int], float]:
    """Explains what does not fit; else the shape and eps in Python's own numbers."""
    check_input("layer_norm", input, normalized_shape, eps)
    if not input.is_floating_point():
        raise NotImplementedError(f"layer_norm: argument 'input' must be floating point, got {input.dtype}")
    size = sizes_of("layer_norm", normalized_shape)
    eps = float(eps)
    if input.is_nested:  # ragged: torch has rules of its own
        return size, eps
    check_shape("layer_norm", input, size)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_parameter("layer_norm", name, t, input, size)
            if not dtype_fits(t, input):
                raise RuntimeError(
                    f"layer_norm: argument {name!r} must have the input's dtype {input.dtype}"
                    f" (or torch.float32 beside half precision), got {t.dtype}"
                )
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise RuntimeError(
            f"layer_norm: arguments 'weight' and 'bias' must have one dtype, got {weight.dtype} and {bias.dtype}"
        )
    return size, eps


def _stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fwd_fake(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[: x.dim() - len(normalized_shape)]
    stat = _stat_dtype(x)
    return x.new_empty(x.shape), x.new_empty(rows, dtype=stat), x.new_empty(rows, dtype=stat)


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    parameter = x if weight is None else weight
    return (
        x.new_empty(x.shape if output_mask[0] else (0,)),
        parameter.new_empty(normalized_shape if output_mask[1] else (0,), dtype=None if output_mask[1] else x.dtype),
        parameter.new_empty(normalized_shape if output_mask[2] else (0,), dtype=None if output_mask[2] else x.dtype),
    )


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, normalized_shape, weight, bias, _ = inputs
    _, mean, rstd = outputs
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.normalized_shape = normalized_shape
    ctx.bias_dtype = None if bias is None else bias.dtype


def _fwd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
    dx, dweight, dbias = _bwd(ctx.decision, dy, x, ctx.normalized_shape, mean, rstd, weight, mask)
    return (
        dx if mask[0] else None,
        None,
        dweight if mask[1] else None,
        cast(dbias, ctx.bias_dtype) if mask[2] else None,
        None,
    )


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    dy, x, normalized_shape, _, rstd, weight, _ = inputs
    ctx.save_for_backward(dy, x, weight, rstd)
    ctx.normalized_shape = normalized_shape


def _bwd_backward(
    ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradient of (dx, dweight, dbias) with respect to (dy, x, weight), in torch ops so that it can be differentiated.

    With xhat = (x - mean) rstd, g = dy w and P(v) = v - mean(v) - xhat mean(v xhat), a symmetric map, the backward is
    dx = rstd P(g), dweight = sum dy xhat, dbias = sum dy. Its cotangents v, a, b then give
    dy: w rstd P(v) + a xhat + b;  w: sum dy rstd P(v);
    x: rstd P(a dy - rstd (v mean(g xhat) + g mean(v xhat))) - rstd^2 xhat mean(v P(g)).
    """
    dy_, x_, weight_, saved_rstd = ctx.saved_tensors
    dims = list(range(-len(ctx.normalized_shape), 0))
    stat = _stat_dtype(x_)
    dy, x = dy_.to(stat), x_.to(stat)
    weight = torch.ones((), dtype=stat, device=x.device) if weight_ is None else weight_.to(stat)
    # from x, not from the saved statistics: those are constants to autograd and a third derivative needs them to move
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    eps = (saved_rstd.reshape(var.shape) ** -2 - var).detach()
    rstd = torch.rsqrt(var + eps)
    xhat = (x - mean) * rstd

    def average(v: Tensor) -> Tensor:
        return v.mean(dims, keepdim=True)

    def project(v: Tensor) -> Tensor:
        return v - average(v) - xhat * average(v * xhat)

    g = dy * weight
    grad_dy = torch.zeros_like(dy)
    to_xhat = torch.zeros_like(dy)
    grad_x = torch.zeros_like(x)
    grad_weight = None
    if ddx is not None and ddx.numel():
        v = ddx.to(stat)
        projected = rstd * project(v)
        grad_dy = grad_dy + weight * projected
        grad_weight = _sum_to(dy * projected, weight_)
        to_xhat = to_xhat - rstd * (v * average(g * xhat) + g * average(v * xhat))
        grad_x = grad_x - rstd**2 * xhat * average(v * project(g))
    if ddweight is not None and ddweight.numel():
        grad_dy = grad_dy + ddweight.to(stat) * xhat
        to_xhat = to_xhat + ddweight.to(stat) * dy
    if ddbias is not None and ddbias.numel():
        grad_dy = grad_dy + ddbias.to(stat)
    grad_x = grad_x + rstd * project(to_xhat)
    return grad_dy.to(dy_.dtype), grad_x.to(x_.dtype), None, None, None, grad_weight, None


def _sum_to(v: Tensor, weight: Tensor | None) -> Tensor | None:
    """Sum over the leading dimensions down to the weight's shape and dtype."""
    return None if weight is None else v.sum_to_size(weight.shape).to(weight.dtype)


_fwd = Op(
    "layer_norm_fwd",
    "(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
    hidden=2,
    triton="layer_norm:layer_norm_fwd",
)
_bwd = Op(
    "layer_norm_bwd",
    "(Tensor dy, Tensor x, SymInt[] normalized_shape, Tensor mean, Tensor rstd, Tensor? weight, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
    triton="layer_norm:layer_norm_bwd",
)
