"""Local response normalisation across channels: schema, fake, derivative and public function."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from pydl.backend import Family, choose
from pydl.ops._contract import Op

__all__ = ["local_response_norm"]

_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, torch.float64, *_HALVES)
_FAMILY = Family(
    "local_response_norm",
    ops=("local_response_norm_fwd", "local_response_norm_bwd"),
    order={"cpu": ("cpu",), "cuda": ("cuda",)},
    dtypes={"cpu": _FLOATS, "cuda": _FLOATS, "simt": _FLOATS},
)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Divide each value by a power of the mean square of its neighbours in other channels.

    y[c] = x[c] / (k + alpha / size * S[c])^beta, where S[c] is the sum of x[j]^2 for j from c - size // 2 to
    c + (size - 1) // 2 and channels outside the input count as zeros.

    Args:
        input: [N, C, *], three or more dimensions, floating point; contiguous and channels_last layouts are kept.
            Integer tensors go to torch.
        size: number of neighbouring channels, at least 1; it may exceed C.
        alpha: factor of the mean square.
        beta: exponent.
        k: added to the mean square.

    Returns:
        Tensor of the input's shape and dtype. Under autocast float32 where torch's is.

    Raises:
        TypeError: input is no tensor, size no int, or another argument no number.
        ValueError: input has fewer than three dimensions.
        RuntimeError: size is below 1.

    Sums and powers are float32 (float64 for float64), each window is summed by itself: NaN and infinities stay in the
    windows that hold them. One pass over memory each way; the backward keeps nothing but x, has the same bits on every
    run, and can be differentiated again.
    Source: Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks", 2012.
    """
    size, declined = _check(input, size, alpha, beta, k)
    # torch's composition passes through an op that autocast runs in float32: the power, on a CPU the pooling of planes
    if input.dtype in _HALVES and (input.is_cuda or (input.is_cpu and input.dim() >= 4)):
        if torch.is_autocast_enabled(input.device.type):
            input = input.float()
    decision = choose(_FAMILY, input, declined)
    if decision.backend == "torch":
        return torch.nn.functional.local_response_norm(input, size, alpha, beta, k)
    # the kernels' layouts have up to three spatial dimensions; more of them are one to every window
    x = input if input.dim() <= 5 else input.flatten(2)
    y: Tensor = _fwd(decision, x, size, float(alpha), float(beta), float(k))
    return y if input.dim() <= 5 else y.view(input.shape)


def _check(input: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[int, str]:
    """The size in Python's own numbers, and why torch must take the call, if it must."""
    if not isinstance(input, Tensor):
        raise TypeError(f"local_response_norm: argument 'input' must be a Tensor, got {type(input).__name__}")
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"local_response_norm: argument 'size' must be an int, got {size!r}")
    size = operator.index(size)
    declined = ""
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        if isinstance(value, (Tensor, complex)):
            declined = f"{name} is not a real number of Python's"
        elif not hasattr(value, "__float__") or isinstance(value, str):
            raise TypeError(f"local_response_norm: argument {name!r} must be a number, got {value!r}")
    if not declined and not math.isfinite(beta):
        declined = "beta is not finite"
    if input.is_nested:
        return size, declined
    if input.dim() < 3:
        raise ValueError(
            "local_response_norm: argument 'input' must have three or more dimensions [N, C, *], "
            f"got {list(input.shape)}"
        )
    if size < 1:
        raise RuntimeError(f"local_response_norm: argument 'size' must be greater than zero, got {size}")
    return size, declined


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x))


def _fwd_fake(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _empty_like(x)


def _bwd_fake(dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _empty_like(x)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.args = inputs[1:]


def _fwd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    dx = None if dy is None else _bwd(ctx.decision, dy, x, *ctx.args)
    return dx, None, None, None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.args = inputs[2:]


def _window_sum(v: Tensor, before: int, after: int) -> Tensor:
    """Sum over channels [c - before, c + after], those outside counted as zeros."""
    padded = torch.nn.functional.pad(v, (0, 0) * (v.dim() - 2) + (before, after))
    return padded.unfold(1, before + after + 1, 1).sum(-1)


def _bwd_backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of sum(v dx) with respect to dy and x, in torch ops so that it can be differentiated.

    With M the window sum, M' its mirror image, s = k + alpha / size M(x^2) and c = 2 alpha beta / size, the backward is
    dx = dy s^-beta - c x M'(dy x s^(-beta - 1)), and sum(v dx) = sum(dy v s^-beta - c dy x s^(-beta - 1) M(v x)).
    """
    if v is None:
        return (None,) * 6
    dy_, x_ = ctx.saved_tensors
    size, alpha, beta, k = ctx.args
    stat = torch.float64 if x_.dtype == torch.float64 else torch.float32
    dy, x, v = dy_.to(stat), x_.to(stat), v.to(stat)
    most = max(x.shape[1] - 1, 0)
    before, after = min(size // 2, most), min((size - 1) // 2, most)
    scale = alpha / size
    slope = 2 * scale * beta
    base = k + scale * _window_sum(x * x, before, after)
    power, steep = base**-beta, base ** (-beta - 1)
    reached = _window_sum(v * x, before, after)
    grad_dy = power * v - slope * x * steep * reached
    to_base = -beta * dy * v * steep + slope * (beta + 1) * dy * x * reached * steep / base
    grad_x = (
        2 * scale * x * _window_sum(to_base, after, before)
        - slope * dy * steep * reached
        - slope * v * _window_sum(dy * x * steep, after, before)
    )
    return grad_dy.to(dy_.dtype), grad_x.to(x_.dtype), None, None, None, None


_fwd = Op(
    "local_response_norm_fwd",
    "(Tensor x, int size, float alpha, float beta, float k) -> Tensor",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
)
_bwd = Op(
    "local_response_norm_bwd",
    "(Tensor dy, Tensor x, int size, float alpha, float beta, float k) -> Tensor",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
