"""Average pooling over one to three dimensions, plain and adaptive: schemas, fakes, derivatives, public functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Decision, Family, choose
from pydl.ops._contract import Op
from pydl.ops._pool import (
    FLOATS,
    Ints,
    adaptive_size,
    channels_last,
    check_window,
    empty_pool,
    need_bool,
    need_tensor,
    widened,
)
from pydl.ops.max_pool import max_pool1d, max_pool2d, max_pool3d

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
]

_LARGEST = {1: max_pool1d, 2: max_pool2d, 3: max_pool3d}
_FAMILIES = {
    name: Family(
        name,
        ops=("avg_pool_fwd", "avg_pool_bwd"),
        order={"cpu": ("cpu",), "cuda": ("cuda",)},
        dtypes={"cpu": FLOATS, "cuda": FLOATS, "simt": FLOATS},
    )
    for name in __all__
}


def avg_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Mean of each window of a sequence.

    Args:
        input: [N, C, L] or [C, L], floating point; a transposed [N, L, C] layout is kept. Integer tensors go to torch.
        kernel_size: window length, an int or a tuple of one.
        stride: step between windows, default the kernel size.
        padding: zeros on each side, at most half of kernel_size.
        ceil_mode: also keep a last window that overhangs the input, if it starts inside input or left padding.
        count_include_pad: whether padding counts as elements of a window.

    Returns:
        [N, C, L_out] (or without N).

    Raises:
        TypeError: input is no tensor, or an argument is no int.
        RuntimeError: a rank, size, or argument that makes no sense; the message names it.

    Sums are float32 for half precision. The same bits on every run, derivatives of any order.
    """
    return _avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean of each window of a plane.

    Args:
        input: [N, C, H, W] or [C, H, W], floating point; contiguous and channels_last layouts are kept. Integer
            tensors go to torch.
        kernel_size: window height and width, one int or two.
        stride: step between windows, default the kernel size.
        padding: border of zeros on each side, at most half of kernel_size.
        ceil_mode: also keep a last window that overhangs the input, if it starts inside input or left padding.
        count_include_pad: whether padding counts as elements of a window.
        divisor_override: divides each sum instead of the number of elements; not 0.

    Returns:
        [N, C, H_out, W_out] (or without N).

    Raises:
        TypeError: input is no tensor, or an argument is no int.
        RuntimeError: a rank, size, or argument that makes no sense; the message names it.
        IndexError: input has fewer than three dimensions.

    A window's rows are added up first, in float32 for half precision. The backward gathers from the windows that hold
    an element: no atomics, the same bits on every run. It is linear and can be differentiated again.
    """
    return _avg_pool(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean of each window of a volume.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], floating point; contiguous and channels_last_3d layouts are kept, where
            torch's CPU kernel gives contiguous results. Integer tensors go to torch. No side may be shorter than the
            window's.
        kernel_size: window depth, height and width, one int or three.
        stride: step between windows, default the kernel size.
        padding: border of zeros on each side, at most half of kernel_size.
        ceil_mode: also keep a last window that overhangs the input, if it starts inside input or left padding.
        count_include_pad: whether padding counts as elements of a window.
        divisor_override: divides each sum instead of the number of elements; not 0.

    Returns:
        [N, C, D_out, H_out, W_out] (or without N).

    Raises:
        TypeError: input is no tensor, or an argument is no int.
        RuntimeError: a rank, size, or argument that makes no sense; the message names it.

    The same kernels as :func:`avg_pool2d`; torch's own backward on a GPU adds up with atomics where windows overlap.
    """
    return _avg_pool(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool1d(input: Tensor, output_size: Ints) -> Tensor:
    """Mean of each of output_size nearly equal parts of a sequence.

    Args:
        input: [N, C, L] or [C, L], floating point; a transposed [N, L, C] layout is kept.
        output_size: number of parts, an int or a tuple of one.

    Returns:
        [N, C, output_size] (or without N).

    Raises:
        TypeError: input is no tensor, or output_size no int.
        RuntimeError: a rank or size that makes no sense; the message names it.

    Part o is [floor(o * L / output_size), ceil((o + 1) * L / output_size)): neighbours may share an element. Numerics
    and derivatives are those of :func:`avg_pool2d`.
    """
    return _adaptive(1, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """Mean of each of output_size nearly equal parts of a plane.

    Args:
        input: [N, C, H, W] or [C, H, W], floating point; contiguous and channels_last layouts are kept.
        output_size: height and width of the result, one int or two; None keeps the input's. 1 averages whole planes.

    Returns:
        [N, C, *output_size] (or without N).

    Raises:
        TypeError: input is no tensor, or output_size no int.
        ValueError: output_size has as many entries as input.
        RuntimeError: a rank or size that makes no sense; the message names it.

    The parts are those of :func:`adaptive_avg_pool1d` along each axis; torch's own backward on a GPU adds up with
    atomics.
    """
    return _adaptive(2, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """Mean of each of output_size nearly equal parts of a volume.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], floating point; contiguous and channels_last_3d layouts are kept.
        output_size: depth, height and width of the result, one int or three; None keeps the input's.

    Returns:
        [N, C, *output_size] (or without N).

    Raises:
        TypeError: input is no tensor, or output_size no int.
        ValueError: output_size has as many entries as input.
        RuntimeError: a rank or size that makes no sense; the message names it.

    The parts are those of :func:`adaptive_avg_pool1d` along each axis.
    """
    return _adaptive(3, input, output_size)


def lp_pool1d(
    input: Tensor, norm_type: int | float, kernel_size: Ints, stride: Ints | None = None, ceil_mode: bool = False
) -> Tensor:
    """The p-th root of the sum of p-th powers of each window of a sequence.

    Args:
        input: [N, C, L] or [C, L], floating point.
        norm_type: p; infinity is the largest magnitude.
        kernel_size: window length, an int or a tuple of one.
        stride: step between windows, default the kernel size.
        ceil_mode: also keep a last window that overhangs the input; its sum is scaled up to kernel_size elements.

    Returns:
        [N, C, L_out] (or without N).

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: a rank, size, or argument that makes no sense; the message names it.

    (kernel_size * mean(x ** p)) ** (1 / p) on the kernels of :func:`avg_pool1d`; where the sum is zero the gradient is.
    """
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor, norm_type: int | float, kernel_size: Ints, stride: Ints | None = None, ceil_mode: bool = False
) -> Tensor:
    """The p-th root of the sum of p-th powers of each window of a plane.

    Args:
        input: [N, C, H, W] or [C, H, W], floating point.
        norm_type: p; infinity is the largest magnitude.
        kernel_size: window height and width, one int or two.
        stride: step between windows, default the kernel size.
        ceil_mode: as for :func:`lp_pool1d`.

    Returns:
        [N, C, H_out, W_out] (or without N).

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: a rank, size, or argument that makes no sense; the message names it.
    """
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor, norm_type: int | float, kernel_size: Ints, stride: Ints | None = None, ceil_mode: bool = False
) -> Tensor:
    """The p-th root of the sum of p-th powers of each window of a volume.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], floating point.
        norm_type: p; infinity is the largest magnitude.
        kernel_size: window depth, height and width, one int or three.
        stride: step between windows, default the kernel size.
        ceil_mode: as for :func:`lp_pool1d`.

    Returns:
        [N, C, D_out, H_out, W_out] (or without N).

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: a rank, size, or argument that makes no sense; the message names it.
    """
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)


def _lp_pool(
    dims: int, input: Tensor, p: int | float, kernel_size: Ints, stride: Ints | None, ceil_mode: bool
) -> Tensor:
    name = f"lp_pool{dims}d"
    need_tensor(name, input)
    window = _check(dims, input.shape, kernel_size, stride, 0, ceil_mode, True, None)
    decision = choose(_FAMILIES[name], input)
    k, s = window[dims : 2 * dims], window[2 * dims : 3 * dims]
    if decision.backend == "torch":
        one = dims == 1  # torch multiplies by the kernel size, which must be a number there
        y: Tensor = getattr(torch.nn.functional, name)(input, p, k[0] if one else k, s[0] if one else s, ceil_mode)
        return y
    if p in (math.inf, -math.inf):
        sign = 1 if p > 0 else -1
        largest = _LARGEST[dims](sign * input.abs(), k, s, 0, 1, ceil_mode)
        assert isinstance(largest, Tensor)
        return sign * largest
    x = input.float() if input.dtype.itemsize == 2 else input  # every step would round again in half precision
    total = _run(decision, dims, x.pow(p), window, True, None) * math.prod(k)
    # the root's slope is infinite at zero: torch's gradient there is zero, for which one branch is held fixed
    empty = total == 0
    y = torch.where(empty, total.detach().pow(1 / p), torch.where(empty, 1, total).pow(1 / p))
    return y.to(widened(dims, input).dtype)


def _adaptive(dims: int, input: Tensor, size: int | Sequence[int | None]) -> Tensor:
    name = f"adaptive_avg_pool{dims}d"
    need_tensor(name, input)
    window = adaptive_size(name, input.shape, dims, size)
    if dims == 3 and input.shape[-4] == 0:
        raise RuntimeError(f"{name}: argument 'input' must have channels, got {list(input.shape)}")
    input = widened(dims, input)
    decision = choose(_FAMILIES[name], input)
    if decision.backend == "torch":
        y: Tensor = getattr(torch.nn.functional, name)(input, window)
        return y
    return _run(decision, dims, input, window, False, None)


def _run(
    decision: Decision, dims: int, input: Tensor, window: list[int], include_padding: bool, divisor: int | None
) -> Tensor:
    if input.dim() == dims + 1:
        return _fwd(decision, input.unsqueeze(0), window, include_padding, divisor).squeeze(0)
    y: Tensor = _fwd(decision, input, window, include_padding, divisor)
    return y


def _avg_pool(
    dims: int,
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    ceil_mode: bool,
    include_padding: bool,
    divisor: int | None,
) -> Tensor:
    plain = type(kernel_size) is int and type(padding) is int and (stride is None or type(stride) is int)
    check = _check_once if plain and isinstance(input, Tensor) and not torch.compiler.is_compiling() else _check
    need_tensor(f"avg_pool{dims}d", input)
    input = widened(dims, input)
    window = check(dims, input.shape, kernel_size, stride, padding, ceil_mode, include_padding, divisor)
    decision = choose(_FAMILIES[f"avg_pool{dims}d"], input)
    if decision.backend == "torch":
        return _torch(dims, input, window[dims:], ceil_mode, include_padding, divisor)
    return _run(decision, dims, input, window, include_padding, divisor)


def _torch(
    dims: int, input: Tensor, window: list[int], ceil_mode: bool, include_padding: bool, divisor: int | None
) -> Tensor:
    args = (window[:dims], window[dims : 2 * dims], window[2 * dims :], ceil_mode, include_padding)
    if dims == 1:
        return torch.nn.functional.avg_pool1d(input, *args)
    function = torch.nn.functional.avg_pool2d if dims == 2 else torch.nn.functional.avg_pool3d
    return function(input, *args, divisor)


def _check(
    dims: int,
    shape: torch.Size,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    ceil_mode: bool,
    include_padding: bool,
    divisor: int | None,
) -> list[int]:
    """The window as the raw operators take it: output sizes, kernel_size, stride and padding, ``dims`` of each."""
    op = f"avg_pool{dims}d"
    need_bool(op, "ceil_mode", ceil_mode)
    need_bool(op, "count_include_pad", include_padding)
    if divisor is not None and (isinstance(divisor, bool) or not isinstance(divisor, int)):
        raise TypeError(f"{op}: argument 'divisor_override' must be an int, got {divisor!r}")
    if divisor == 0:
        raise RuntimeError(f"{op}: argument 'divisor_override' must not be zero, got 0")
    if dims == 2 and len(shape) < 3:
        raise IndexError(f"{op}: argument 'input' must have shape [N, C, H, W] or [C, H, W], got {list(shape)}")
    out, window = check_window(op, shape, dims, kernel_size, stride, padding, 1, ceil_mode)
    if dims == 3 and any(n < k for n, k in zip(shape[-3:], window[:3], strict=True)):
        raise RuntimeError(
            f"{op}: argument 'kernel_size' must not exceed the input, got {window[:3]} for {list(shape)}"
        )
    return [*out, *window[: 3 * dims]]


# a loop asks the same question each time; an error is never remembered
_check_once = functools.lru_cache(maxsize=1024)(_check)


def _fwd_fake(x: Tensor, window: list[int], include_padding: bool, divisor: int | None) -> Tensor:
    return empty_pool(x, window[: x.dim() - 2], channels_last(x))


def _bwd_fake(dy: Tensor, window: list[int], include_padding: bool, divisor: int | None, last: bool) -> Tensor:
    return empty_pool(dy, window[: dy.dim() - 2], last)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, window, include_padding, divisor = inputs
    ctx.window = [*x.shape[2:], *window[x.dim() - 2 :]]
    ctx.rest = (include_padding, divisor)
    ctx.last = not x.is_contiguous() and channels_last(x)


def _fwd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = None if dy is None else _bwd(ctx.decision, dy, ctx.window, *ctx.rest, ctx.last)
    return dx, None, None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, window, include_padding, divisor, _ = inputs
    ctx.window = [*dy.shape[2:], *window[dy.dim() - 2 :]]
    ctx.rest = (include_padding, divisor)


def _bwd_backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, ...]:
    ddy = None if ddx is None else _fwd(ctx.decision, ddx, ctx.window, *ctx.rest)
    return ddy, None, None, None, None


# The sizes of what is written, then kernel_size, stride and padding, or nothing more for adaptive windows: one list,
# since each costs a microsecond on its way through the dispatcher.
_WINDOW = "SymInt[] window, bool include_padding, int? divisor"

_fwd = Op("avg_pool_fwd", f"(Tensor x, {_WINDOW}) -> Tensor", fake=_fwd_fake, setup=_fwd_setup, backward=_fwd_backward)
_bwd = Op(
    "avg_pool_bwd",
    f"(Tensor dy, {_WINDOW}, bool channels_last) -> Tensor",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
