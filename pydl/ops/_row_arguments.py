"""Checks of arguments that the normalisations over the last dimensions share."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

_INTS = (int, torch.SymInt)


def fits(input: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> bool:
    """Whether the arguments are of the usual, plainly valid kind: a cheap test before the one that explains."""
    if not (isinstance(input, Tensor) and type(shape) is tuple and shape and input.is_floating_point()):
        return False
    if type(shape[0]) is not int or input.is_nested or input.shape[-len(shape) :] != shape:
        return False
    dtype, device = input.dtype, input.device
    for t in parameters:
        if t is not None and not (
            isinstance(t, Tensor) and t.dtype is dtype and t.shape == shape and t.device == device
        ):
            return False
    return True


def check_input(op: str, input: Tensor, normalized_shape: Sequence[int], eps: object) -> None:
    """Explains which of these is of the wrong kind."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: argument 'input' must be a Tensor, got {type(input).__name__}")
    if not isinstance(normalized_shape, (tuple, list)):
        kind = type(normalized_shape).__name__
        raise TypeError(f"{op}: argument 'normalized_shape' must be a tuple of ints, got {kind}")
    if not isinstance(eps, (float, int)) and not hasattr(eps, "__float__"):
        raise TypeError(f"{op}: argument 'eps' must be a number, got {eps!r}")


def sizes_of(op: str, normalized_shape: Sequence[int]) -> list[int]:
    """The shape in Python's own numbers; NumPy's count too."""
    if any(isinstance(s, bool) or not (isinstance(s, _INTS) or hasattr(s, "__index__")) for s in normalized_shape):
        raise TypeError(f"{op}: argument 'normalized_shape' must be a tuple of ints, got {normalized_shape!r}")
    return [s if isinstance(s, _INTS) else operator.index(s) for s in normalized_shape]  # type: ignore[misc]


def check_shape(op: str, input: Tensor, size: list[int], rank_error: type[Exception] = RuntimeError) -> None:
    """The input must end in the sizes; ``rank_error`` is what torch raises for one of too few dimensions."""
    n = len(size)
    if n == 0:
        raise RuntimeError(f"{op}: argument 'normalized_shape' must have at least one dimension, got []")
    if input.dim() < n or list(input.shape[-n:]) != size:
        raise (rank_error if input.dim() < n else RuntimeError)(
            f"{op}: argument 'input' must have shape [*, {', '.join(map(str, size))}] for "
            f"normalized_shape={size}, got {list(input.shape)}"
        )


def check_parameter(op: str, name: str, t: Tensor, input: Tensor, size: list[int]) -> None:
    """A parameter must be a tensor of the normalised shape on the input's device; its dtype is not looked at."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: argument {name!r} must be a Tensor or None, got {type(t).__name__}")
    if list(t.shape) != size:
        raise RuntimeError(f"{op}: argument {name!r} must have shape {size}, got {list(t.shape)}")
    if t.device != input.device:
        raise RuntimeError(f"{op}: argument {name!r} must be on {input.device} as the input, got {t.device}")


def dtype_fits(t: Tensor, input: Tensor) -> bool:
    """Whether kernels take a parameter of this dtype: the input's, or float32 beside half precision."""
    return t.dtype == input.dtype or (t.dtype is torch.float32 and input.dtype in (torch.float16, torch.bfloat16))
