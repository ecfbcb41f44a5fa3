"""Max pooling over planes: schemas, fakes, derivatives and the public function."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from pydl.backend import Family, choose
from pydl.ops._contract import Op, wants

__all__ = ["max_pool2d"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FAMILY = Family(
    "max_pool2d",
    ops=("max_pool2d_values", "max_pool2d_with_indices", "max_pool2d_bwd", "max_pool2d_gather"),
    order={"cpu": ("cpu",), "cuda": ("cuda",)},
    dtypes={"cpu": _FLOATS, "cuda": _FLOATS, "simt": _FLOATS},
)
# an offset inside the window is one byte; a larger window keeps torch's flat index
MAX_OFFSET_WINDOW = 255
# sizes of windows from which products of addresses could pass 2^63
LIMIT = 2**31

_Ints = int | Sequence[int]


def max_pool2d(
    input: Tensor,
    kernel_size: _Ints,
    stride: _Ints | None = None,
    padding: _Ints = 0,
    dilation: _Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Largest value of each window of a plane.

    Args:
        input: [N, C, H, W] or [C, H, W], floating point; contiguous and channels_last layouts are kept. Integer
            tensors go to torch.
        kernel_size: window height and width in pixels, one int or two.
        stride: step between windows, default the kernel size.
        padding: border of -inf on each side, at most half of kernel_size.
        dilation: step between the taps of a window.
        ceil_mode: also keep a last window that overhangs the input, if it starts inside input or left padding.
        return_indices: also return each maximum's flat position h * W + w in its plane, int64.

    Returns:
        [N, C, H_out, W_out] (or without N), and the indices if asked for.

    Raises:
        TypeError: input is no tensor, or an argument is no int.
        RuntimeError: a rank, size, or argument that makes no sense; the message names it.

    NaN propagates; of equal maxima the first in row order wins. When no gradient and no indices are wanted only values
    are computed; for a gradient one byte per output is kept (windows to 255 taps). The backward uses no atomics: the
    same bits on every run. It can be differentiated again.
    """
    window = _window(input, kernel_size, stride, padding, dilation, ceil_mode)
    decision = choose(_FAMILY, input)
    if decision.backend == "torch":
        return _torch(input, *(window[i : i + 2] for i in (0, 2, 4, 6)), ceil_mode, return_indices)
    x = input if input.dim() == 4 else input.unsqueeze(0)
    indices = None
    if return_indices or wants((input,)):
        y, indices = _with_indices(decision, x, window, ceil_mode, return_indices)
    else:
        y = _values(decision, x, window, ceil_mode)
    if input.dim() == 3:
        y = y.squeeze(0)
        indices = None if indices is None else indices.squeeze(0)
    return (y, indices) if return_indices and indices is not None else y


def _torch(input: Tensor, *args: Any) -> Tensor | tuple[Tensor, Tensor]:
    result: Tensor | tuple[Tensor, Tensor] = torch.nn.functional.max_pool2d(input, *args)
    return result


def _pair(name: str, value: _Ints) -> list[int]:
    if type(value) is int:
        return [value, value]
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    if any(isinstance(v, bool) or not (isinstance(v, (int, torch.SymInt)) or hasattr(v, "__index__")) for v in values):
        raise TypeError(f"max_pool2d: argument {name!r} must be an int or a tuple of two ints, got {value!r}")
    # NumPy's integers count too
    values = [v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in values]  # type: ignore[arg-type]
    if len(values) not in (1, 2):
        raise RuntimeError(f"max_pool2d: argument {name!r} must be an int or a tuple of two ints, got {value!r}")
    return [values[0], values[-1]]  # type: ignore[list-item]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Windows along one axis, by torch's rule: with ceil_mode a last window must start inside input or left padding."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = (span + stride - 1) // stride + 1
    return out - 1 if (out - 1) * stride >= size + padding else out


def _window(
    input: Tensor, kernel_size: _Ints, stride: _Ints | None, padding: _Ints, dilation: _Ints, ceil_mode: bool
) -> list[int]:
    """The window as the raw operators take it: kernel_size, stride, padding, dilation, two of each."""
    if not isinstance(input, Tensor):
        raise TypeError(f"max_pool2d: argument 'input' must be a Tensor, got {type(input).__name__}")
    if type(ceil_mode) is not bool:
        raise TypeError(f"max_pool2d: argument 'ceil_mode' must be a bool, got {ceil_mode!r}")
    plain = type(kernel_size) is int and type(padding) is int and type(dilation) is int
    if plain and (stride is None or type(stride) is int) and not torch.compiler.is_compiling():
        return _check_once(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    return _check(input.shape, kernel_size, stride, padding, dilation, ceil_mode)


def _check(
    shape: torch.Size, kernel_size: _Ints, stride: _Ints | None, padding: _Ints, dilation: _Ints, ceil_mode: bool
) -> list[int]:
    k = _pair("kernel_size", kernel_size)
    s = k if stride is None or (isinstance(stride, (tuple, list)) and not stride) else _pair("stride", stride)
    p, d = _pair("padding", padding), _pair("dilation", dilation)
    if len(shape) not in (3, 4) or any(n == 0 for n in shape[-3:]):
        raise RuntimeError(
            "max_pool2d: argument 'input' must have shape [N, C, H, W] or [C, H, W] with only N possibly 0, "
            f"got {list(shape)}"
        )
    for axis in (0, 1):
        if k[axis] <= 0 or s[axis] <= 0 or d[axis] <= 0:
            name, value = next((n, v) for n, v in (("kernel_size", k), ("stride", s), ("dilation", d)) if v[axis] <= 0)
            raise RuntimeError(f"max_pool2d: argument {name!r} must be greater than zero, got {value}")
        if max(k[axis], s[axis], d[axis]) >= LIMIT:
            raise RuntimeError(
                "max_pool2d: arguments 'kernel_size', 'stride' and 'dilation' must be below 2^31, "
                f"got kernel_size={k}, stride={s}, dilation={d}"
            )
        if p[axis] < 0 or 2 * p[axis] > k[axis]:
            raise RuntimeError(
                f"max_pool2d: argument 'padding' must be non-negative and at most half of kernel_size={k}, got {p}"
            )
        if output_size(shape[axis - 2], k[axis], s[axis], p[axis], d[axis], ceil_mode) < 1:
            raise RuntimeError(
                f"max_pool2d: argument 'kernel_size' must fit the padded input, got kernel_size={k}, padding={p}, "
                f"dilation={d} for an input of size {list(shape)}"
            )
    return [*k, *s, *p, *d]


# a loop asks the same question each time; an error is never remembered
_check_once = functools.lru_cache(maxsize=1024)(_check)


def _channels_last(x: Tensor) -> bool:
    """Whether the strides descend in the order N, H, W, C: by this torch and the kernels choose the layout."""
    return suggest_memory_format(x) is torch.channels_last


def _empty_planes(x: Tensor, like: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [N, C, height, width] in the memory format of ``like``."""
    layout = torch.channels_last if _channels_last(like) else torch.contiguous_format
    size = (x.shape[0], x.shape[1], height, width)
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=layout)


def _out_fake(x: Tensor, window: list[int], ceil_mode: bool) -> Tensor:
    (kh, sh, ph, dh), (kw, sw, pw, dw) = window[::2], window[1::2]
    height = output_size(x.shape[2], kh, sh, ph, dh, ceil_mode)
    width = output_size(x.shape[3], kw, sw, pw, dw, ceil_mode)
    return _empty_planes(x, x, height, width, x.dtype)


def _with_indices_fake(x: Tensor, window: list[int], ceil_mode: bool, flat: bool) -> tuple[Tensor, Tensor]:
    y = _out_fake(x, window, ceil_mode)
    dtype = torch.int64 if flat or window[0] * window[1] > MAX_OFFSET_WINDOW else torch.uint8
    return y, torch.empty_like(y, dtype=dtype)


def _bwd_fake(dy: Tensor, indices: Tensor, height: int, width: int, window: list[int]) -> Tensor:
    return _empty_planes(dy, indices, height, width, dy.dtype)


def _gather_fake(x: Tensor, indices: Tensor, window: list[int]) -> Tensor:
    return torch.empty_like(indices, dtype=x.dtype)


def _with_indices_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    x, window, _, _ = inputs
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(outputs[1])
    ctx.size, ctx.window = x.shape[2:], window


def _with_indices_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    dx = None if dy is None else _bwd(ctx.decision, dy, indices, *ctx.size, ctx.window)
    return dx, None, None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, _, _, window = inputs
    ctx.save_for_backward(indices)
    ctx.window = window


def _bwd_backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    ddy = None if ddx is None else _gather(ctx.decision, ddx, indices, ctx.window)
    return ddy, None, None, None, None


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, window = inputs
    ctx.save_for_backward(indices)
    ctx.size, ctx.window = x.shape[2:], window


def _gather_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    dx = None if dy is None else _bwd(ctx.decision, dy, indices, *ctx.size, ctx.window)
    return dx, None, None


# kernel_size, stride, padding, dilation in one list: each list costs a microsecond on its way through the dispatcher
_WINDOW = "int[] window"

_with_indices = Op(
    "max_pool2d_with_indices",
    f"(Tensor x, {_WINDOW}, bool ceil_mode, bool flat) -> (Tensor, Tensor)",
    fake=_with_indices_fake,
    setup=_with_indices_setup,
    backward=_with_indices_backward,
)
_bwd = Op(
    "max_pool2d_bwd",
    f"(Tensor dy, Tensor indices, SymInt height, SymInt width, {_WINDOW}) -> Tensor",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
_gather = Op(
    "max_pool2d_gather",
    f"(Tensor x, Tensor indices, {_WINDOW}) -> Tensor",
    fake=_gather_fake,
    setup=_gather_setup,
    backward=_gather_backward,
)


def _values_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.args = inputs[1:]


def _values_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Only for a direct call of the operator with a gradient: the positions are found again, then used as above."""
    if dy is None:
        return None, None, None
    (x,) = ctx.saved_tensors
    window, ceil_mode = ctx.args
    _, indices = _with_indices(ctx.decision, x.detach(), window, ceil_mode, False)
    return _bwd(ctx.decision, dy, indices, *x.shape[2:], window), None, None


_values = Op(
    "max_pool2d_values",
    f"(Tensor x, {_WINDOW}, bool ceil_mode) -> Tensor",
    fake=_out_fake,
    setup=_values_setup,
    backward=_values_backward,
)
