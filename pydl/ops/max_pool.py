"""Max pooling over one to three dimensions, plain and adaptive: schemas, fakes, derivatives, public functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op, wants
from pydl.ops._pool import (
    FLOATS,
    Ints,
    adaptive_size,
    channels_last,
    check_window,
    empty_pool,
    need_bool,
    need_tensor,
    output_size,
    widened,
)

__all__ = [
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
]

_FAMILIES = {
    name: Family(
        name,
        ops=("max_pool_values", "max_pool_with_indices", "max_pool_bwd", "max_pool_gather"),
        order={"cpu": ("cpu",), "cuda": ("cuda",)},
        dtypes={"cpu": FLOATS, "cuda": FLOATS, "simt": FLOATS},
    )
    for name in __all__
}
# an offset inside the window is one byte; a larger window keeps torch's flat index
MAX_OFFSET_WINDOW = 255

_Pooled = Tensor | tuple[Tensor, Tensor]


def max_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Pooled:
    """Largest value of each window of a sequence.

    Args:
        input: [N, C, L] or [C, L], floating point; a transposed [N, L, C] layout is kept. Integer tensors go to torch.
        kernel_size: window length, an int or a tuple of one.
        stride: step between windows, default the kernel size.
        padding: -inf on each side, at most half of kernel_size.
        dilation: step between the taps of a window.
        ceil_mode: also keep a last window that overhangs the input, if it starts inside input or left padding.
        return_indices: also return each maximum's position, int64.

    Returns:
        [N, C, L_out] (or without N), and the indices if asked for.

    Raises:
        TypeError: input is no tensor, or an argument is no int.
        RuntimeError: a rank, size, or argument that makes no sense; the message names it.

    NaN, ties and derivatives are those of :func:`max_pool2d`.
    """
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Pooled:
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
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Pooled:
    """Largest value of each window of a volume.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], floating point; contiguous and channels_last_3d layouts are kept.
            Integer tensors go to torch.
        kernel_size: window depth, height and width, one int or three.
        stride: step between windows, default the kernel size.
        padding: border of -inf on each side, at most half of kernel_size.
        dilation: step between the taps of a window.
        ceil_mode: also keep a last window that overhangs the input, if it starts inside input or left padding.
        return_indices: also return each maximum's flat position (d * H + h) * W + w in its volume, int64.

    Returns:
        [N, C, D_out, H_out, W_out] (or without N), and the indices if asked for.

    Raises:
        TypeError: input is no tensor, or an argument is no int.
        RuntimeError: a rank, size, or argument that makes no sense; the message names it.

    NaN, ties and derivatives are those of :func:`max_pool2d`; torch's own backward on a GPU adds up with atomics.
    """
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def adaptive_max_pool1d(input: Tensor, output_size: Ints, return_indices: bool = False) -> _Pooled:
    """Largest value of each of output_size nearly equal parts of a sequence.

    Args:
        input: [N, C, L] or [C, L], floating point.
        output_size: number of parts, an int or a tuple of one.
        return_indices: also return each maximum's position, int64.

    Returns:
        [N, C, output_size] (or without N), and the indices if asked for.

    Raises:
        TypeError: input is no tensor, or output_size no int.
        RuntimeError: a rank or size that makes no sense; the message names it.

    Part o is [floor(o * L / output_size), ceil((o + 1) * L / output_size)): neighbours may share an element. NaN, ties
    and derivatives are those of :func:`max_pool2d`.
    """
    return _adaptive(1, input, output_size, return_indices)


def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
) -> _Pooled:
    """Largest value of each of output_size nearly equal parts of a plane.

    Args:
        input: [N, C, H, W] or [C, H, W], floating point; contiguous and channels_last layouts are kept.
        output_size: height and width of the result, one int or two; None keeps the input's.
        return_indices: also return each maximum's flat position h * W + w in its plane, int64.

    Returns:
        [N, C, *output_size] (or without N), and the indices if asked for.

    Raises:
        TypeError: input is no tensor, or output_size no int.
        ValueError: output_size has as many entries as input.
        RuntimeError: a rank or size that makes no sense; the message names it.

    The parts are those of :func:`adaptive_max_pool1d` along each axis.
    """
    return _adaptive(2, input, output_size, return_indices)


def adaptive_max_pool3d(
    input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
) -> _Pooled:
    """Largest value of each of output_size nearly equal parts of a volume.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], floating point; contiguous and channels_last_3d layouts are kept.
        output_size: depth, height and width of the result, one int or three; None keeps the input's.
        return_indices: also return each maximum's flat position (d * H + h) * W + w in its volume, int64.

    Returns:
        [N, C, *output_size] (or without N), and the indices if asked for.

    Raises:
        TypeError: input is no tensor, or output_size no int.
        ValueError: output_size has as many entries as input.
        RuntimeError: a rank or size that makes no sense; the message names it.

    The parts are those of :func:`adaptive_max_pool1d` along each axis.
    """
    return _adaptive(3, input, output_size, return_indices)


def _max_pool(
    dims: int,
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    return_indices: bool,
) -> _Pooled:
    name = f"max_pool{dims}d"
    need_tensor(name, input)
    need_bool(name, "ceil_mode", ceil_mode)
    plain = type(kernel_size) is int and type(padding) is int and type(dilation) is int
    simple = plain and (stride is None or type(stride) is int) and not torch.compiler.is_compiling()
    window = (_check_once if simple else _check)(dims, input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    input = widened(dims, input)
    decision = choose(_FAMILIES[name], input)
    if decision.backend == "torch":
        function = getattr(torch.nn.functional, name)
        parts = (window[i * dims : (i + 1) * dims] for i in range(4))
        pooled: _Pooled = function(input, *parts, ceil_mode, return_indices)
        return pooled
    return _run(decision, dims, input, window, ceil_mode, return_indices)


def _check(
    dims: int, shape: torch.Size, kernel_size: Ints, stride: Ints | None, padding: Ints, dilation: Ints, ceil_mode: bool
) -> list[int]:
    """The window as the raw operators take it: kernel_size, stride, padding, dilation, ``dims`` of each."""
    return check_window(f"max_pool{dims}d", shape, dims, kernel_size, stride, padding, dilation, ceil_mode)[1]


# a loop asks the same question each time; an error is never remembered
_check_once = functools.lru_cache(maxsize=1024)(_check)


def _adaptive(dims: int, input: Tensor, size: int | Sequence[int | None], return_indices: bool) -> _Pooled:
    name = f"adaptive_max_pool{dims}d"
    need_tensor(name, input)
    window = adaptive_size(name, input.shape, dims, size)
    if 0 in input.shape[-dims - 1 :]:
        raise RuntimeError(f"{name}: argument 'input' must only have N possibly 0, got {list(input.shape)}")
    input = widened(dims, input)
    decision = choose(_FAMILIES[name], input)
    if decision.backend == "torch":
        pooled: _Pooled = getattr(torch.nn.functional, name)(input, window, return_indices)
        return pooled
    return _run(decision, dims, input, window, False, return_indices)


def _run(decision: Any, dims: int, input: Tensor, window: list[int], ceil_mode: bool, return_indices: bool) -> _Pooled:
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    indices = None
    if return_indices or wants((input,)):
        y, indices = _with_indices(decision, x, window, ceil_mode, return_indices)
    else:
        y = _values(decision, x, window, ceil_mode)
    if x is not input:
        y = y.squeeze(0)
        indices = None if indices is None else indices.squeeze(0)
    return (y, indices) if return_indices and indices is not None else y


def _out_size(x: Tensor, window: list[int], ceil_mode: bool) -> list[int]:
    dims = x.dim() - 2
    if len(window) == dims:
        return window
    k, s, p, d = (window[i * dims : (i + 1) * dims] for i in range(4))
    return [output_size(x.shape[2 + i], k[i], s[i], p[i], d[i], ceil_mode) for i in range(dims)]


def _out_fake(x: Tensor, window: list[int], ceil_mode: bool) -> Tensor:
    return empty_pool(x, _out_size(x, window, ceil_mode), channels_last(x))


def _taps(x: Tensor, window: list[int]) -> int:
    """Most taps of a window; along an adaptive axis whose parts differ a bound."""
    dims = x.dim() - 2
    if len(window) > dims:
        return math.prod(window[:dims])
    sides = zip(x.shape[2:], window, strict=True)
    return math.prod(1 if o == 0 else n // o if n % o == 0 else min(n // o + 2, n) for n, o in sides)


def _with_indices_fake(x: Tensor, window: list[int], ceil_mode: bool, flat: bool) -> tuple[Tensor, Tensor]:
    y = _out_fake(x, window, ceil_mode)
    dtype = torch.int64 if flat or _taps(x, window) > MAX_OFFSET_WINDOW else torch.uint8
    return y, torch.empty_like(y, dtype=dtype)


def _bwd_fake(dy: Tensor, indices: Tensor, size: list[int], window: list[int]) -> Tensor:
    return empty_pool(dy, size, channels_last(indices))


def _gather_fake(x: Tensor, indices: Tensor, window: list[int]) -> Tensor:
    return torch.empty_like(indices, dtype=x.dtype)


def _with_indices_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    x, window, _, _ = inputs
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(outputs[1])
    ctx.size, ctx.window = x.shape[2:], window


def _with_indices_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    dx = None if dy is None else _bwd(ctx.decision, dy, indices, ctx.size, ctx.window)
    return dx, None, None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, _, window = inputs
    ctx.save_for_backward(indices)
    ctx.window = window


def _bwd_backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    ddy = None if ddx is None else _gather(ctx.decision, ddx, indices, ctx.window)
    return ddy, None, None, None


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, window = inputs
    ctx.save_for_backward(indices)
    ctx.size, ctx.window = x.shape[2:], window


def _gather_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    dx = None if dy is None else _bwd(ctx.decision, dy, indices, ctx.size, ctx.window)
    return dx, None, None


# kernel_size, stride, padding, dilation, or the output sizes of adaptive windows, in one list: each list costs a
# microsecond on its way through the dispatcher
_WINDOW = "SymInt[] window"

_with_indices = Op(
    "max_pool_with_indices",
    f"(Tensor x, {_WINDOW}, bool ceil_mode, bool flat) -> (Tensor, Tensor)",
    fake=_with_indices_fake,
    setup=_with_indices_setup,
    backward=_with_indices_backward,
)
_bwd = Op(
    "max_pool_bwd",
    f"(Tensor dy, Tensor indices, SymInt[] size, {_WINDOW}) -> Tensor",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
_gather = Op(
    "max_pool_gather",
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
    return _bwd(ctx.decision, dy, indices, x.shape[2:], window), None, None


_values = Op(
    "max_pool_values",
    f"(Tensor x, {_WINDOW}, bool ceil_mode) -> Tensor",
    fake=_out_fake,
    setup=_values_setup,
    backward=_values_backward,
)
