"""Activations: schema, fake, derivatives and public functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pydl.backend import Family, choose
from pydl.ops._contract import Op

__all__ = ["gelu", "heaviside_step", "leaky_relu", "relu", "sigmoid", "silu", "tanh"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CPU_POLICY = "torch's CPU kernel is at the memory floor (measured by bench/bench_activations.py)"
_INPLACE = "in-place variants are torch's own"


def _family(name: str) -> Family:
    return Family(
        name,
        ops=("activation_fwd", "activation_bwd"),
        order={"cuda": ("triton",)},
        dtypes={"triton": _FLOATS},
        policy={"cpu": _CPU_POLICY},
    )


_FAMILIES = {name: _family(name) for name in __all__}


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0), elementwise; NaN stays NaN.

    Args:
        input: any shape; floating point on a GPU for the kernel, other dtypes go to torch.
        inplace: write into ``input``; torch's own kernel does it.

    Returns:
        Tensor of the input's shape, dtype and (if dense) layout.

    Raises:
        TypeError: input is no tensor.
    """
    return _apply("relu", "relu", input, 0.0, lambda: F.relu(input, inplace), inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x where x > 0, else negative_slope * x.

    Args:
        input: any shape, floating point.
        negative_slope: factor of the negative side.
        inplace: write into ``input``; torch's own kernel does it.

    Returns:
        Tensor of the input's shape, dtype and (if dense) layout.

    Raises:
        TypeError: input is no tensor.
        NotImplementedError: integer input.
    """
    slope = _number("leaky_relu", "negative_slope", negative_slope)
    return _apply("leaky_relu", "leaky_relu", input, slope, lambda: F.leaky_relu(input, slope, inplace), inplace)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), without overflow.

    Args:
        input: any shape; integers give float32, by torch.

    Returns:
        Tensor of the input's shape and dtype.

    Raises:
        TypeError: input is no tensor.
    """
    return _apply("sigmoid", "sigmoid", input, 0.0, lambda: torch.sigmoid(input))


def tanh(input: Tensor) -> Tensor:
    """Hyperbolic tangent.

    Args:
        input: any shape; integers give float32, by torch.

    Returns:
        Tensor of the input's shape and dtype.

    Raises:
        TypeError: input is no tensor.
    """
    return _apply("tanh", "tanh", input, 0.0, lambda: torch.tanh(input))


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x) with the normal distribution function Phi, or its tanh approximation.

    Args:
        input: any shape, floating point.
        approximate: "none" for the exact form, "tanh" for 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Returns:
        Tensor of the input's shape, dtype and (if dense) layout.

    Raises:
        TypeError: input is no tensor, or approximate no str.
        RuntimeError: approximate is neither "none" nor "tanh".
        NotImplementedError: integer input.

    Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.
    """
    if not isinstance(approximate, str):
        raise TypeError(f"gelu: argument 'approximate' must be a str, got {approximate!r}")
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu: argument 'approximate' must be 'none' or 'tanh', got {approximate!r}")
    kind = "gelu" if approximate == "none" else "gelu_tanh"
    return _apply("gelu", kind, input, 0.0, lambda: F.gelu(input, approximate=approximate))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x * sigmoid(x), also called swish.

    Args:
        input: any shape, floating point.
        inplace: write into ``input``; torch's own kernel does it.

    Returns:
        Tensor of the input's shape, dtype and (if dense) layout.

    Raises:
        TypeError: input is no tensor.
        NotImplementedError: integer input.
    """
    return _apply("silu", "silu", input, 0.0, lambda: F.silu(input, inplace), inplace)


def heaviside_step(input: Tensor, threshold: float = 0.0) -> Tensor:
    """1 where x >= threshold, else 0 (NaN gives 0); the neuron of McCulloch and Pitts.

    Its gradient is zero everywhere, by definition here: the step has none at the threshold and zero beside it.
    ``torch.heaviside`` differs: it takes the value at 0 as an argument and has no gradient.

    Args:
        input: any shape, floating point.
        threshold: where the step is.

    Returns:
        Tensor of zeros and ones of the input's shape and dtype.

    Raises:
        TypeError: input is no tensor.
        NotImplementedError: input is not floating point.
    """
    if isinstance(input, Tensor) and not input.is_floating_point():
        raise NotImplementedError(f"heaviside_step: argument 'input' must be floating point, got {input.dtype}")
    threshold = _number("heaviside_step", "threshold", threshold)
    return _apply("heaviside_step", "step", input, threshold, lambda: _step_composition(input, threshold))


def _number(op: str, name: str, value: float) -> float:
    if not isinstance(value, (float, int)) and not hasattr(value, "__float__"):
        raise TypeError(f"{op}: argument {name!r} must be a number, got {value!r}")
    return float(value)


def _step_composition(x: Tensor, threshold: float) -> Tensor:
    above = x >= threshold
    # x passes the inner choice only where the outer one drops it: it stays in the graph with a gradient of exactly
    # zero, also at NaN and inf, and in its layout
    return torch.where(above, 1.0, torch.where(above, x, 0.0))


def _apply(
    name: str, kind: str, input: Tensor, alpha: float, by_torch: Callable[[], Tensor], inplace: bool = False
) -> Tensor:
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: argument 'input' must be a Tensor, got {type(input).__name__}")
    decision = choose(_FAMILIES[name], input, _INPLACE if inplace else "")
    if decision.backend == "torch":
        return by_torch()
    result: Tensor = _fwd(decision, input, kind, alpha)
    return result


# kinds whose derivative is taken from the output, so that the input need not be kept
_FROM_OUTPUT = ("relu", "sigmoid", "tanh")


def _fwd_fake(x: Tensor, kind: str, alpha: float) -> Tensor:
    return torch.empty_like(x)


def _bwd_fake(dy: Tensor, saved: Tensor, kind: str, alpha: float) -> Tensor:
    return torch.empty_like(saved)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    x, kind, alpha = inputs
    ctx.save_for_backward(y if kind in _FROM_OUTPUT else x)
    ctx.kind, ctx.alpha = kind, alpha


def _fwd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    (saved,) = ctx.saved_tensors
    dx = None if dy is None else _bwd(ctx.decision, dy, saved, ctx.kind, ctx.alpha)
    return dx, None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], dx: Tensor) -> None:
    dy, saved, kind, alpha = inputs
    ctx.save_for_backward(dy, saved)
    ctx.kind, ctx.alpha = kind, alpha


def _bwd_backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, ...]:
    """dx = dy f', so dy gets ddx f' and what was saved gets ddx dy times the derivative of f' by it; in torch ops."""
    if ddx is None:
        return None, None, None, None
    dy, saved = ctx.saved_tensors
    work = torch.float64 if saved.dtype == torch.float64 else torch.float32
    slope, curve = _slope_and_curve(ctx.kind, saved.to(work), ctx.alpha)
    grad_dy = (ddx.to(work) * slope).to(dy.dtype)
    grad_saved = (ddx.to(work) * dy.to(work) * curve).to(saved.dtype)
    return grad_dy, grad_saved, None, None


def _slope_and_curve(kind: str, s: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """f' as a function of the saved tensor (output for _FROM_OUTPUT, input otherwise) and its derivative by it."""
    zero = torch.zeros_like(s)
    if kind == "relu":
        return (~(s <= 0)).to(s.dtype), zero
    if kind == "leaky_relu":
        return torch.where(s > 0, 1.0, alpha).to(s.dtype), zero
    if kind == "step":
        return zero, zero
    if kind == "sigmoid":
        return s * (1 - s), 1 - 2 * s
    if kind == "tanh":
        return 1 - s * s, -2 * s
    if kind == "silu":
        g = torch.sigmoid(s)
        return g * (1 + s * (1 - g)), g * (1 - g) * (2 + s * (1 - 2 * g))
    if kind == "gelu":
        density = torch.exp(-0.5 * s * s) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(s / math.sqrt(2))) + s * density, density * (2 - s * s)
    if kind == "gelu_tanh":
        c, a = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(c * (s + a * s**3))
        inner, inner2 = c * (1 + 3 * a * s * s), 6 * c * a * s
        sech2 = 1 - t * t
        return 0.5 * (1 + t) + 0.5 * s * sech2 * inner, sech2 * (inner + 0.5 * s * (inner2 - 2 * t * inner**2))
    raise ValueError(f"activation_bwd: argument 'kind' is unknown: {kind!r}")


_fwd = Op(
    "activation_fwd",
    "(Tensor x, str kind, float alpha) -> Tensor",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
    triton="activations:activation_fwd",
)
_bwd = Op(
    "activation_bwd",
    "(Tensor dy, Tensor saved, str kind, float alpha) -> Tensor",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
    triton="activations:activation_bwd",
)
