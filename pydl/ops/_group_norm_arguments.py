"""The arguments of group and instance normalisation, and what is wrong with them."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from pydl.ops._batch_norm_arguments import _number as number
from pydl.ops._row_arguments import dtype_fits

MaybeTensor = Tensor | None
_FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def fits(x: Tensor, groups: int, weight: MaybeTensor, bias: MaybeTensor, eps: float) -> bool:
    """Whether these are of the usual, plainly valid kind: a cheap test before the one that explains."""
    if not (isinstance(x, Tensor) and type(eps) is float and x.dtype in _FLOATS and not x.is_nested and x.dim() >= 2):
        return False
    dtype, shape, device = x.dtype, x.shape, x.device
    if type(groups) is not int or groups <= 0 or shape[1] % groups != 0 or x.numel() // groups == 1:
        return False
    row = shape[1:2]
    for t in (weight, bias):
        if t is not None and not (isinstance(t, Tensor) and t.dtype is dtype and t.shape == row and t.device == device):
            return False
    return True


def check(op: str, x: Tensor, groups: Any, weight: MaybeTensor, bias: MaybeTensor, eps: float) -> tuple[int, float]:
    """Explains what does not fit; else num_groups and eps in Python's own numbers."""
    check_input(op, x)
    eps = number(op, "eps", eps)
    if x.is_nested:  # torch has rules of its own
        return groups, eps
    groups = check_groups(op, x, groups)
    check_floating(op, x)
    check_affine(op, x, weight, bias)
    return groups, eps


def check_input(op: str, x: Tensor) -> None:
    """The input must be a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: argument 'input' must be a Tensor, got {type(x).__name__}")


def check_floating(op: str, x: Tensor) -> None:
    """The input must be real and floating point."""
    if not x.is_floating_point():
        raise NotImplementedError(f"{op}: argument 'input' must be floating point, got {x.dtype}")


def check_groups(op: str, x: Tensor, groups: Any) -> int | torch.SymInt:
    """The number of groups as an int that divides the channels of x."""
    if isinstance(groups, bool) or not (isinstance(groups, (int, torch.SymInt)) or hasattr(groups, "__index__")):
        raise TypeError(f"{op}: argument 'num_groups' must be an int, got {groups!r}")
    if not isinstance(groups, (int, torch.SymInt)):
        groups = operator.index(groups)
    shape = list(x.shape)
    if len(shape) < 2:
        raise RuntimeError(f"{op}: argument 'input' must have shape [N, C, *], got {shape}")
    if groups == 0:
        raise ZeroDivisionError(f"{op}: argument 'num_groups' must be positive, got 0")
    if shape[0] * shape[1] // groups * math.prod(shape[2:]) == 1:
        raise ValueError(f"{op}: argument 'input' must have more than one value per group, got shape {shape}")
    if groups < 0 or shape[1] % groups != 0:
        raise RuntimeError(
            f"{op}: argument 'num_groups' must be positive and divide the input's {shape[1]} channels, got {groups}"
        )
    return groups


def check_affine(op: str, x: Tensor, weight: MaybeTensor, bias: MaybeTensor) -> None:
    """Weight and bias must be vectors over the channels, of one dtype."""
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _check_channels(op, name, t, x)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise RuntimeError(
            f"{op}: arguments 'weight' and 'bias' must have one dtype, got {weight.dtype} and {bias.dtype}"
        )


def _check_channels(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: argument {name!r} must be a Tensor or None, got {type(t).__name__}")
    if list(t.shape) != [x.shape[1]]:
        raise RuntimeError(f"{op}: argument {name!r} must have shape [{x.shape[1]}], got {list(t.shape)}")
    if t.device != x.device:
        raise RuntimeError(f"{op}: argument {name!r} must be on {x.device} as the input, got {t.device}")
    if not dtype_fits(t, x):
        raise RuntimeError(
            f"{op}: argument {name!r} must have the input's dtype {x.dtype}"
            f" (or torch.float32 beside half precision), got {t.dtype}"
        )


def check_instance(
    op: str,
    x: Tensor,
    running_mean: MaybeTensor,
    running_var: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> tuple[float, float]:
    """Explains what does not fit; else momentum and eps in Python's own numbers."""
    check_input(op, x)
    if type(use_input_stats) is not bool:
        raise TypeError(f"{op}: argument 'use_input_stats' must be a bool, got {use_input_stats!r}")
    momentum, eps = number(op, "momentum", momentum), number(op, "eps", eps)
    if x.is_nested:  # torch has rules of its own
        return momentum, eps
    shape = list(x.shape)
    if use_input_stats and math.prod(shape[2:]) == 1:
        raise ValueError(f"{op}: argument 'input' must have more than one position per instance, got shape {shape}")
    if len(shape) < 2:
        raise IndexError(f"{op}: argument 'input' must have shape [N, C, *], got {shape}")
    running = {"running_mean": running_mean, "running_var": running_var}
    if not use_input_stats and None in (running_mean, running_var):
        raise RuntimeError(f"{op}: arguments 'running_mean' and 'running_var' must be given without input statistics")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: arguments 'running_mean' and 'running_var' must both be given or both be None")
    check_floating(op, x)
    for name, t in running.items():
        if t is not None:
            _check_channels(op, name, t, x)
            if t.requires_grad:
                raise RuntimeError(f"{op}: argument {name!r} has no derivative and must not require one")
    check_affine(op, x, weight, bias)
    return momentum, eps
