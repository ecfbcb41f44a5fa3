"""Max unpooling over one to three dimensions: schemas, fakes, derivatives and the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op
from pydl.ops._pool import FLOATS, SHAPES, Ints, channels_last, empty_pool, integers, need_tensor

__all__ = ["max_unpool1d", "max_unpool2d", "max_unpool3d"]

_FAMILIES = {
    name: Family(
        name,
        ops=("max_unpool_fwd", "max_unpool_bwd"),
        order={"cpu": ("cpu",), "cuda": ("cuda",)},
        dtypes={"cpu": FLOATS, "cuda": FLOATS, "simt": FLOATS},
    )
    for name in __all__
}


def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Sequences whose elements lie where max_pool1d found them, and are zero elsewhere.

    Args:
        input: [N, C, L] or [C, L], floating point.
        indices: positions from max_pool1d, int64, of input's shape.
        kernel_size: of that pooling.
        stride: of that pooling, default kernel_size.
        padding: of that pooling.
        output_size: shape of the pooling's input, with or without N and C; default (L - 1) * stride - 2 * padding +
            kernel_size.

    Returns:
        [N, C, L_out] (or without N).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an output_size that this pooling cannot have had.
        RuntimeError: shapes that do not fit, or on a CPU an index outside the result.

    Equal indices, duplicates and derivatives are those of :func:`max_unpool2d`.
    """
    return _unpool(1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Planes whose elements lie where max_pool2d found them, and are zero elsewhere.

    Args:
        input: [N, C, H, W] or [C, H, W], floating point; contiguous and channels_last layouts are kept.
        indices: flat positions from max_pool2d, int64, of input's shape.
        kernel_size: of that pooling.
        stride: of that pooling, default kernel_size.
        padding: of that pooling.
        output_size: shape of the pooling's input, with or without N and C; default (n - 1) * stride - 2 * padding +
            kernel_size along each axis.

    Returns:
        [N, C, H_out, W_out] (or without N).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an output_size that this pooling cannot have had.
        RuntimeError: shapes that do not fit, or on a CPU an index outside the result.

    Of elements with one index, as overlapping windows give them, the last in row-major order stays; torch on a GPU
    keeps any. On a GPU an index outside the result is dropped. The gradient is read at the indices.
    """
    return _unpool(2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Volumes whose elements lie where max_pool3d found them, and are zero elsewhere.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], floating point; contiguous and channels_last_3d layouts are kept.
        indices: flat positions from max_pool3d, int64, of input's shape.
        kernel_size: of that pooling.
        stride: of that pooling, default kernel_size.
        padding: of that pooling.
        output_size: shape of the pooling's input, with or without N and C; default (n - 1) * stride - 2 * padding +
            kernel_size along each axis.

    Returns:
        [N, C, D_out, H_out, W_out] (or without N).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an output_size that this pooling cannot have had.
        RuntimeError: shapes that do not fit, or on a CPU an index outside the result.

    Equal indices and derivatives are those of :func:`max_unpool2d`.
    """
    return _unpool(3, input, indices, kernel_size, stride, padding, output_size)


def _unpool(
    dims: int,
    input: Tensor,
    indices: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    output_size: Sequence[int] | None,
) -> Tensor:
    name = f"max_unpool{dims}d"
    need_tensor(name, input)
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: argument 'indices' must be a Tensor, got {type(indices).__name__}")
    k, p = integers(name, "kernel_size", kernel_size, dims), integers(name, "padding", padding, dims)
    s = k if stride is None else integers(name, "stride", stride, dims)
    if input.dim() not in (dims + 1, dims + 2) or 0 in input.shape[-dims - 1 :]:
        raise RuntimeError(
            f"{name}: argument 'input' must have shape {SHAPES[dims]} with only N possibly 0, got {list(input.shape)}"
        )
    if indices.dtype != torch.int64 or indices.shape != input.shape:
        raise RuntimeError(
            f"{name}: argument 'indices' must be int64 and have input's shape {list(input.shape)}, "
            f"got {indices.dtype} {list(indices.shape)}"
        )
    size = _output_size(name, input.shape[-dims:], k, s, p, output_size)
    decision = choose(_FAMILIES[name], input)
    if decision.backend == "torch":
        function = getattr(torch.nn.functional, name)
        y: Tensor = function(input, indices, k, s, p, size)
        return y
    if input.dim() == dims + 1:
        return _fwd(decision, input.unsqueeze(0), indices.unsqueeze(0), size).squeeze(0)
    y = _fwd(decision, input, indices, size)
    return y


def _output_size(
    op: str, shape: torch.Size, k: list[int], s: list[int], p: list[int], output_size: Sequence[int] | None
) -> list[int]:
    """The size of the result: what the pooling's arguments make of the input's, or what is given, if it fits."""
    dims = len(k)
    default = [(n - 1) * s[i] + k[i] - 2 * p[i] for i, n in enumerate(shape)]
    size = default
    if output_size is not None:
        size = list(output_size)
        if len(size) == dims + 2:
            size = size[2:]
        if len(size) != dims:
            raise ValueError(
                f"{op}: argument 'output_size' must have {dims} or {dims + 2} entries, got {output_size!r}"
            )
        for i in range(dims):
            if not default[i] - s[i] < size[i] < default[i] + s[i]:
                raise ValueError(
                    f"{op}: argument 'output_size' must be within stride={s} of {default}, got {output_size!r}"
                )
    if any(n <= 0 for n in size):
        raise RuntimeError(f"{op}: argument 'kernel_size' must make positive sizes of the input's, got {size}")
    return size


def _fwd_fake(x: Tensor, indices: Tensor, size: list[int]) -> Tensor:
    return empty_pool(x, size, channels_last(x))


def _bwd_fake(dy: Tensor, indices: Tensor) -> Tensor:
    return empty_pool(dy, indices.shape[2:], channels_last(dy))


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _fwd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return None if dy is None else _bwd(ctx.decision, dy, indices), None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, indices = inputs
    ctx.save_for_backward(indices)
    ctx.size = dy.shape


def _bwd_backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, ...]:
    if ddx is None:
        return None, None
    (indices,) = ctx.saved_tensors
    flat = ddx.new_zeros((*ctx.size[:2], ctx.size[2:].numel()))
    return flat.scatter_add(2, indices.flatten(2), ddx.flatten(2)).view(ctx.size), None


_fwd = Op(
    "max_unpool_fwd",
    "(Tensor x, Tensor indices, SymInt[] size) -> Tensor",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
)
_bwd = Op(
    "max_unpool_bwd",
    "(Tensor dy, Tensor indices) -> Tensor",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
