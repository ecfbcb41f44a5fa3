"""Max pooling over regions of interest: schemas, fakes, derivatives and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops import _roi_torch
from pydl.ops._contract import Op, wants
from pydl.ops._roi import FLOATS, Boxes, OutputSize, as_rows, channels_last, check_input, check_numbers, empty, pair

__all__ = ["roi_pool"]

_FAMILY = Family(
    "roi_pool",
    ops=("roi_pool_values", "roi_pool_with_argmax", "roi_pool_bwd", "roi_pool_gather"),
    order={"cpu": ("cpu",), "cuda": ("cuda",)},
    dtypes={"cpu": FLOATS, "cuda": FLOATS, "simt": FLOATS},
)


def roi_pool(input: Tensor, boxes: Boxes, output_size: OutputSize, spatial_scale: float = 1.0) -> Tensor:
    """Largest pixel in each bin of each box (RoI max pooling), as torchvision.ops.roi_pool.

    Args:
        input: [N, C, H, W] with fewer than 2^31 pixels in a plane, floating point; contiguous and channels_last layouts
            are kept.
        boxes: [K, 5] rows (number of the image, x1, y1, x2, y2) in input's dtype, or float32 beside half precision; or
            a list of [L, 4] tensors, one for each image. Boxes have no gradient.
        output_size: height and width of the output in bins, one int or two.
        spatial_scale: factor from the boxes' coordinates to input's pixels.

    Returns:
        [K, C, height, width] in input's dtype.

    Raises:
        TypeError: input is no tensor, or a number is none.
        AssertionError: boxes have another form or shape.
        RuntimeError: another rank, size, dtype or device; on the CPU also a number of an image that does not exist. On
            a GPU such a box gives NaN, since looking would mean to wait.

    Corners are rounded to whole pixels, halves away from zero, and both belong to the box, which has at least one
    pixel; bins overlap where their bounds are no whole pixels. That arithmetic is float32, for a float64 input float64.
    A bin beside the map is 0. NaN never wins, of equal pixels the first in row order does, and a bin without a pixel
    above the lowest float32 has that value and no gradient. A box that is not finite gives NaN. The backward uses no
    atomics: the same bits on every run. It can be differentiated again. Girshick, Fast R-CNN, 2015.
    """
    check_input("roi_pool", input)
    height, width = pair("roi_pool", output_size)
    check_numbers("roi_pool", spatial_scale)
    rows = as_rows("roi_pool", input, boxes)
    decision = choose(_FAMILY, input)
    if decision.backend == "torch":
        return _roi_torch.roi_pool(input, rows, (height, width), spatial_scale)
    if wants((input,)):
        y: Tensor = _with_argmax(decision, input, rows, height, width, spatial_scale)
        return y
    return _values(decision, input, rows, height, width, spatial_scale)


def _values_fake(x: Tensor, boxes: Tensor, out_h: int, out_w: int, scale: float) -> Tensor:
    return empty(x, (boxes.shape[0], x.shape[1], out_h, out_w), channels_last(x))


def _with_argmax_fake(x: Tensor, boxes: Tensor, out_h: int, out_w: int, scale: float) -> tuple[Tensor, Tensor]:
    y = _values_fake(x, boxes, out_h, out_w, scale)
    return y, torch.empty_like(y, dtype=torch.int32)


def _bwd_fake(dy: Tensor, argmax: Tensor, boxes: Tensor, batch: int, height: int, width: int, scale: float) -> Tensor:
    return empty(dy, (batch, dy.shape[1], height, width), channels_last(argmax))


def _gather_fake(x: Tensor, argmax: Tensor, boxes: Tensor, scale: float) -> Tensor:
    return empty(x, argmax.shape, channels_last(argmax))


def _with_argmax_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    x, boxes, _, _, ctx.scale = inputs
    ctx.save_for_backward(outputs[1], boxes)
    ctx.size = (x.shape[0], *x.shape[2:])


def _with_argmax_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = None if dy is None else _bwd(ctx.decision, dy, *ctx.saved_tensors, *ctx.size, ctx.scale)
    return dx, None, None, None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, argmax, boxes, _, _, _, ctx.scale = inputs
    ctx.save_for_backward(argmax, boxes)


def _bwd_backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, ...]:
    ddy = None if ddx is None else _gather(ctx.decision, ddx, *ctx.saved_tensors, ctx.scale)
    return ddy, None, None, None, None, None, None


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, argmax, boxes, ctx.scale = inputs
    ctx.save_for_backward(argmax, boxes)
    ctx.size = (x.shape[0], *x.shape[2:])


def _gather_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = None if dy is None else _bwd(ctx.decision, dy, *ctx.saved_tensors, *ctx.size, ctx.scale)
    return dx, None, None, None


def _values_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.rest = inputs[2:]


def _values_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Only for a direct call of the operator with a gradient: the positions are found again, then used as above."""
    if dy is None:
        return None, None, None, None, None
    x, boxes = ctx.saved_tensors
    _, argmax = _with_argmax.overload(ctx.decision)(x.detach(), boxes, *ctx.rest)
    dx = _bwd(ctx.decision, dy, argmax, boxes, x.shape[0], *x.shape[2:], ctx.rest[2])
    return dx, None, None, None, None


_BINS = "SymInt out_h, SymInt out_w, float scale"

_with_argmax = Op(
    "roi_pool_with_argmax",
    f"(Tensor x, Tensor boxes, {_BINS}) -> (Tensor, Tensor)",
    fake=_with_argmax_fake,
    setup=_with_argmax_setup,
    backward=_with_argmax_backward,
    hidden=1,  # the positions are for the backward alone
)
_bwd = Op(
    "roi_pool_bwd",
    "(Tensor dy, Tensor argmax, Tensor boxes, SymInt batch, SymInt height, SymInt width, float scale) -> Tensor",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
_gather = Op(
    "roi_pool_gather",
    "(Tensor x, Tensor argmax, Tensor boxes, float scale) -> Tensor",
    fake=_gather_fake,
    setup=_gather_setup,
    backward=_gather_backward,
)
_values = Op(
    "roi_pool_values",
    f"(Tensor x, Tensor boxes, {_BINS}) -> Tensor",
    fake=_values_fake,
    setup=_values_setup,
    backward=_values_backward,
)
