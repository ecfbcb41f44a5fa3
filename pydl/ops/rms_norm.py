"""RMS normalisation over the last dimensions: schema, fake, derivative and public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op
from pydl.ops._row_arguments import check_input, check_parameter, check_shape, dtype_fits, fits, sizes_of

__all__ = ["rms_norm"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FAMILY = Family(
    "rms_norm",
    ops=("rms_norm_fwd", "rms_norm_bwd"),
    order={"cpu": ("cpu",), "cuda": ("triton",)},
    dtypes={"cpu": (*_FLOATS, torch.float64), "triton": _FLOATS},
)
# torch's default: the epsilon of the type that sums are taken in
_EPS = {torch.float64: torch.finfo(torch.float64).eps}
_EPS_32 = torch.finfo(torch.float32).eps


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Divide each sample by its root mean square over the last dimensions: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        input: [*, *normalized_shape], float32, float16 or bfloat16 (float64 on CPU); any strides, any device. Complex
            tensors go to torch.
        normalized_shape: sizes of the trailing dimensions that one mean covers.
        weight: normalized_shape, the input's dtype or float32 beside a half-precision input, or None for 1. Other
            dtypes go to torch.
        eps: added to the mean square; None for the epsilon of float32 (float64 for float64), as torch.

    Returns:
        Contiguous tensor of the input's shape and dtype. Under CUDA autocast float32, as torch.

    Raises:
        TypeError: input is no tensor, or normalized_shape no sequence of ints.
        ValueError: input has fewer dimensions than normalized_shape.
        RuntimeError: shapes or devices that do not fit together.
        NotImplementedError: an input of integers.

    Sums are float32 (float64 for float64). The weight's gradient is summed in two stages in a fixed order: the same
    bits on every run. Differentiable at any order.
    Source: Zhang, Sennrich, "Root mean square layer normalization", 2019.
    """
    declined = ""
    if (eps is not None and type(eps) is not float) or not fits(input, normalized_shape, weight):
        normalized_shape, eps, declined = _check(input, normalized_shape, weight, eps)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()
        weight = None if weight is None else weight.float()
    decision = choose(_FAMILY, input, declined)
    if decision.backend == "torch":
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)  # type: ignore[arg-type]
    eps = _EPS.get(input.dtype, _EPS_32) if eps is None else eps
    y: Tensor = _fwd(decision, input, normalized_shape, weight, eps)
    return y


def _check(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Sequence[int], float | None, str]:
    """Explains what does not fit; else the shape and eps in Python's own numbers, and why torch must take the call."""
    check_input("rms_norm", input, normalized_shape, 0.0 if eps is None else eps)
    size = sizes_of("rms_norm", normalized_shape)
    eps = None if eps is None else float(eps)
    if input.is_nested:
        return size, eps, ""
    if not (input.is_floating_point() or input.is_complex()):
        raise NotImplementedError(f"rms_norm: argument 'input' must be floating point, got {input.dtype}")
    check_shape("rms_norm", input, size, ValueError)
    if weight is not None:
        check_parameter("rms_norm", "weight", weight, input, size)
        if not dtype_fits(weight, input):
            return size, eps, f"weight is {weight.dtype} beside an input of {input.dtype}"
    return size, eps, ""


def _stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fwd_fake(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.shape[: x.dim() - len(normalized_shape)]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=_stat_dtype(x))


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    parameter = x if weight is None else weight
    return (
        x.new_empty(x.shape if output_mask[0] else (0,)),
        parameter.new_empty(normalized_shape) if output_mask[1] else x.new_empty(0),
    )


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, normalized_shape, weight, _ = inputs
    ctx.save_for_backward(x, weight, outputs[1])
    ctx.normalized_shape = normalized_shape


def _fwd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    dx, dweight = _bwd(ctx.decision, dy, x, ctx.normalized_shape, rstd, weight, mask)
    return dx if mask[0] else None, None, dweight if mask[1] else None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    dy, x, normalized_shape, rstd, weight, _ = inputs
    ctx.save_for_backward(dy, x, weight, rstd)
    ctx.normalized_shape = normalized_shape


def _bwd_backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of (dx, dweight) with respect to (dy, x, weight), in torch ops so that it can be differentiated.

    With xhat = x rstd, g = dy w and P(v) = v - xhat mean(v xhat), a symmetric map, the backward is dx = rstd P(g),
    dweight = sum dy xhat. Its cotangents v and a then give
    dy: w rstd P(v) + a xhat;  w: sum dy rstd P(v);
    x: rstd P(a dy - rstd (v mean(g xhat) + g mean(v xhat))) - rstd^2 xhat mean(v P(g)).
    """
    dy_, x_, weight_, saved_rstd = ctx.saved_tensors
    dims = list(range(-len(ctx.normalized_shape), 0))
    stat = _stat_dtype(x_)
    dy, x = dy_.to(stat), x_.to(stat)
    weight = torch.ones((), dtype=stat, device=x.device) if weight_ is None else weight_.to(stat)

    def average(v: Tensor) -> Tensor:
        return v.mean(dims, keepdim=True)

    # from x, not from the saved statistic: that is a constant to autograd and a third derivative needs it to move
    square = average(x * x)
    eps = (saved_rstd.reshape(square.shape) ** -2 - square).detach()
    rstd = torch.rsqrt(square + eps)
    xhat = x * rstd

    def project(v: Tensor) -> Tensor:
        return v - xhat * average(v * xhat)

    g = dy * weight
    grad_dy, to_xhat, grad_x = torch.zeros_like(dy), torch.zeros_like(dy), torch.zeros_like(x)
    grad_weight = None
    if ddx is not None and ddx.numel():
        v = ddx.to(stat)
        projected = rstd * project(v)
        grad_dy = grad_dy + weight * projected
        if weight_ is not None:
            grad_weight = (dy * projected).sum_to_size(weight_.shape).to(weight_.dtype)
        to_xhat = to_xhat - rstd * (v * average(g * xhat) + g * average(v * xhat))
        grad_x = grad_x - rstd**2 * xhat * average(v * project(g))
    if ddweight is not None and ddweight.numel():
        grad_dy = grad_dy + ddweight.to(stat) * xhat
        to_xhat = to_xhat + ddweight.to(stat) * dy
    grad_x = grad_x + rstd * project(to_xhat)
    return grad_dy.to(dy_.dtype), grad_x.to(x_.dtype), None, None, grad_weight, None


_fwd = Op(
    "rms_norm_fwd",
    "(Tensor x, SymInt[] normalized_shape, Tensor? weight, float eps) -> (Tensor, Tensor)",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
    hidden=1,
    triton="rms_norm:rms_norm_fwd",
)
_bwd = Op(
    "rms_norm_bwd",
    "(Tensor dy, Tensor x, SymInt[] normalized_shape, Tensor rstd, Tensor? weight, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
    triton="rms_norm:rms_norm_bwd",
)
