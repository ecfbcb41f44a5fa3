"""The arguments of batch normalisation, and what is wrong with them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MaybeTensor = Tensor | None
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = frozenset((torch.float32, torch.float64, *_HALVES))


def fits(
    x: Tensor,
    running_mean: MaybeTensor,
    running_var: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    training: bool,
    momentum: float,
    eps: float,
) -> bool:
    """Whether the arguments are of the usual, plainly valid kind: a cheap test before the one that explains."""
    if not (isinstance(x, Tensor) and type(momentum) is float and type(eps) is float and eps > 0.0):
        return False
    dtype = x.dtype
    if dtype not in _FLOATS or x.is_nested:
        return False
    shape = x.shape
    if len(shape) < 2 or (x.numel() <= shape[1] if training is True else training is not False or running_mean is None):
        return False
    row, cpu = shape[1:2], x.is_cpu
    for t in (weight, bias, running_mean, running_var):
        if t is not None and not (isinstance(t, Tensor) and t.shape == row and t.dtype is dtype and t.is_cpu is cpu):
            # mixed precision: parameters and statistics in float32
            if dtype not in _HALVES or not _all_float32(row, x.device, weight, bias, running_mean, running_var):
                return False
            break
    if running_mean is None or running_var is None:
        return running_mean is running_var
    return not (running_mean.requires_grad or running_var.requires_grad)


def _all_float32(row: torch.Size, device: torch.device, *given: MaybeTensor) -> bool:
    return all(
        t is None or (isinstance(t, Tensor) and t.shape == row and t.dtype is torch.float32 and t.device == device)
        for t in given
    )


def check(
    op: str,
    name: str,
    x: Tensor,
    running_mean: MaybeTensor,
    running_var: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[MaybeTensor, MaybeTensor, float, float]:
    """Explains what does not fit; else weight and bias as vectors, momentum and eps as Python's own numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: argument {name!r} must be a Tensor, got {type(x).__name__}")
    if type(training) is not bool:
        raise TypeError(f"{op}: argument 'training' must be a bool, got {training!r}")
    momentum, eps = _number(op, "momentum", momentum), _number(op, "eps", eps)
    if training and eps <= 0:
        raise ValueError(f"{op}: argument 'eps' must be positive in training, got {eps}")
    if not x.is_floating_point():
        raise NotImplementedError(f"{op}: argument {name!r} must be floating point, got {x.dtype}")
    if x.is_nested or (x.dim() < 2 and x.numel() == 0):  # torch has rules of its own
        return weight, bias, momentum, eps
    _check_batch(op, name, x, training, running_mean)
    _check_running(op, running_mean, running_var, training)
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for parameter, t in given.items():
        if t is not None:
            _check_parameter(op, parameter, t, x)
    dtypes = {parameter: t.dtype for parameter, t in given.items() if t is not None}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{parameter} {dtype}" for parameter, dtype in dtypes.items())
        raise RuntimeError(f"{op}: arguments {', '.join(map(repr, dtypes))} must have one dtype, got {listed}")
    weight, bias = (None if t is None else t.reshape(-1) for t in (weight, bias))
    return weight, bias, momentum, eps


def _number(op: str, name: str, value: Any) -> float:
    # NumPy's numbers and tensors of one element count too
    if isinstance(value, (str, bytes)) or not (isinstance(value, (int, float)) or hasattr(value, "__float__")):
        raise TypeError(f"{op}: argument {name!r} must be a number, got {value!r}")
    return float(value)


def _check_batch(op: str, name: str, x: Tensor, training: bool, running_mean: MaybeTensor) -> None:
    shape = list(x.shape)
    if len(shape) < 2:
        error: type[Exception] = IndexError if training and running_mean is None else RuntimeError
        raise error(f"{op}: argument {name!r} must have shape [N, C, *], got {shape}")
    if training and shape[0] * math.prod(shape[2:]) == 1:
        raise ValueError(
            f"{op}: argument {name!r} must have more than one value per channel in training, got shape {shape}"
        )


def _check_running(op: str, mean: MaybeTensor, var: MaybeTensor, training: bool) -> None:
    if training and (mean is None) != (var is None):
        raise ValueError(f"{op}: arguments 'running_mean' and 'running_var' must both be given or both be None")
    for name, t in (("running_mean", mean), ("running_var", var)):
        if t is None and not training:
            raise RuntimeError(f"{op}: argument {name!r} must be given in evaluation, got None")
        if isinstance(t, Tensor) and t.requires_grad:
            raise RuntimeError(f"{op}: argument {name!r} has no derivative and must not require one")


def _check_parameter(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: argument {name!r} must be a Tensor or None, got {type(t).__name__}")
    channels = x.shape[1]
    if t.numel() != channels or (name.startswith("running") and t.dim() != 1):
        raise RuntimeError(f"{op}: argument {name!r} must have shape [{channels}], got {list(t.shape)}")
    if t.device != x.device:
        raise RuntimeError(f"{op}: argument {name!r} must be on {x.device} as the input, got {t.device}")
    if t.dtype != x.dtype and not (t.dtype is torch.float32 and x.dtype in _HALVES):
        raise RuntimeError(
            f"{op}: argument {name!r} must have the input's dtype {x.dtype}"
            f" (or torch.float32 beside half precision), got {t.dtype}"
        )


def check_residual(op: str, residual: Tensor, x: Tensor) -> None:
    """The residual must be just like x."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"{op}: argument 'residual' must be a Tensor or None, got {type(residual).__name__}")
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise RuntimeError(
            f"{op}: argument 'residual' must be {list(x.shape)} {x.dtype} on {x.device} as x, "
            f"got {list(residual.shape)} {residual.dtype} on {residual.device}"
        )
