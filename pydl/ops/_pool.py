"""What the pooling ops share: their arguments, the number of windows, and the layouts they keep."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# sizes of windows from which products of addresses could pass 2^63
LIMIT = 2**31
SHAPES = {1: "[N, C, L] or [C, L]", 2: "[N, C, H, W] or [C, H, W]", 3: "[N, C, D, H, W] or [C, D, H, W]"}
_COUNTS = {1: "one int", 2: "two ints", 3: "three ints"}

Ints = int | Sequence[int]


def integers(op: str, name: str, value: Any, dims: int) -> list[int]:
    """An argument of one int, or one for each dimension, as a list; NumPy's integers count too."""
    if type(value) is int:
        return [value] * dims
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    if any(isinstance(v, bool) or not (isinstance(v, (int, torch.SymInt)) or hasattr(v, "__index__")) for v in values):
        raise TypeError(f"{op}: argument {name!r} must be an int or a tuple of {_COUNTS[dims]}, got {value!r}")
    if len(values) not in (1, dims):
        raise RuntimeError(f"{op}: argument {name!r} must be an int or a tuple of {_COUNTS[dims]}, got {value!r}")
    values = [v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in values]
    return values * dims if len(values) == 1 else values


def need_tensor(op: str, input: Any) -> None:
    """The first argument is a tensor."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: argument 'input' must be a Tensor, got {type(input).__name__}")


def need_bool(op: str, name: str, value: Any) -> None:
    """A flag is True or False, as torch's parser wants it."""
    if type(value) is not bool:
        raise TypeError(f"{op}: argument {name!r} must be a bool, got {value!r}")


def widened(dims: int, input: Tensor) -> Tensor:
    """The input, in float32 where torch's autocast on a CPU wants volumes in it."""
    if dims == 3 and input.dtype.itemsize == 2 and input.is_cpu and torch.is_autocast_enabled("cpu"):
        return input.float()
    return input


def check_shape(op: str, shape: torch.Size, dims: int) -> None:
    """A batch of images, or one; only the batch may be empty."""
    if len(shape) not in (dims + 1, dims + 2) or any(n == 0 for n in shape[-dims - 1 :]):
        raise RuntimeError(
            f"{op}: argument 'input' must have shape {SHAPES[dims]} with only N possibly 0, got {list(shape)}"
        )


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Windows along one axis, by torch's rule: with ceil_mode a last window must start inside input or left padding."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = (span + stride - 1) // stride + 1
    return out - 1 if (out - 1) * stride >= size + padding else out


def check_window(
    op: str,
    shape: torch.Size,
    dims: int,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
) -> tuple[list[int], list[int]]:
    """The numbers of windows, and kernel_size, stride, padding and dilation in one list, ``dims`` of each.

    Raises:
        TypeError: an argument is no int.
        RuntimeError: a rank, size, or argument that makes no sense.
    """
    k = integers(op, "kernel_size", kernel_size, dims)
    empty = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    s = k if empty else integers(op, "stride", stride, dims)
    p, d = integers(op, "padding", padding, dims), integers(op, "dilation", dilation, dims)
    check_shape(op, shape, dims)
    out = []
    for axis in range(dims):
        if k[axis] <= 0 or s[axis] <= 0 or d[axis] <= 0:
            name, value = next((n, v) for n, v in (("kernel_size", k), ("stride", s), ("dilation", d)) if v[axis] <= 0)
            raise RuntimeError(f"{op}: argument {name!r} must be greater than zero, got {value}")
        if max(k[axis], s[axis], d[axis]) >= LIMIT:
            raise RuntimeError(
                f"{op}: arguments 'kernel_size', 'stride' and 'dilation' must be below 2^31, "
                f"got kernel_size={k}, stride={s}, dilation={d}"
            )
        if p[axis] < 0 or 2 * p[axis] > k[axis]:
            raise RuntimeError(
                f"{op}: argument 'padding' must be non-negative and at most half of kernel_size={k}, got {p}"
            )
        out.append(output_size(shape[axis - dims], k[axis], s[axis], p[axis], d[axis], ceil_mode))
        if out[axis] < 1:
            raise RuntimeError(
                f"{op}: argument 'kernel_size' must fit the padded input, got kernel_size={k}, padding={p}, "
                f"dilation={d} for an input of size {list(shape)}"
            )
    return out, [*k, *s, *p, *d]


def adaptive_size(op: str, shape: torch.Size, dims: int, size: Any) -> list[int]:
    """The output sizes of an adaptive pooling; None keeps the input's, except for a sequence, as in torch.

    Raises:
        TypeError: a size is no int.
        ValueError: as many sizes as the input has dimensions.
        RuntimeError: a number of sizes, a size or a rank that makes no sense.
    """
    several = isinstance(size, (tuple, list))
    given = list(size) if several else [size] * dims
    if several and dims > 1 and len(given) >= len(shape):
        raise ValueError(f"{op}: argument 'output_size' must have {_COUNTS[dims]}, got {size!r} for {list(shape)}")
    if several and dims > 1:
        kept = shape[len(shape) - len(given) :]
        given = [n if v is None else v for v, n in zip(given, kept, strict=True)]
    for v in given:
        if isinstance(v, bool) or not (isinstance(v, (int, torch.SymInt)) or hasattr(v, "__index__")):
            raise TypeError(f"{op}: argument 'output_size' must be an int or a tuple of {_COUNTS[dims]}, got {size!r}")
    if len(given) != dims:
        raise RuntimeError(f"{op}: argument 'output_size' must be an int or a tuple of {_COUNTS[dims]}, got {size!r}")
    given = [v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in given]
    if any(v < 0 or v >= LIMIT for v in given):
        raise RuntimeError(f"{op}: argument 'output_size' must be in [0, 2^31), got {size!r}")
    if len(shape) not in (dims + 1, dims + 2) or any(n == 0 for n in shape[-dims:]):
        raise RuntimeError(
            f"{op}: argument 'input' must have shape {SHAPES[dims]} and no empty side, got {list(shape)}"
        )
    return given


def channels_last(x: Tensor) -> bool:
    """Whether the strides descend in the order N, spatial dimensions, C: so torch and the kernels choose the layout."""
    if x.dim() == 3:
        x = x.unsqueeze(-2)
    return suggest_memory_format(x) is not torch.contiguous_format


def empty_pool(x: Tensor, size: Sequence[int], last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [N, C, *size] for the images of ``x``, channels last or contiguous."""
    n, c = x.shape[:2]
    if last:
        return x.new_empty((n, *size, c), dtype=dtype).movedim(-1, 1)
    return x.new_empty((n, c, *size), dtype=dtype)
