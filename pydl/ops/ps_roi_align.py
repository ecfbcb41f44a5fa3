"""Position-sensitive RoIAlign: schemas, fakes, derivatives and the public function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops import _roi_torch
from pydl.ops._contract import Op
from pydl.ops._roi import FLOATS, Boxes, OutputSize, as_rows, channels_last, check_input, check_numbers, empty, pair

__all__ = ["ps_roi_align"]

_FAMILY = Family(
    "ps_roi_align",
    ops=("ps_roi_align_fwd", "ps_roi_align_bwd"),
    order={"cpu": ("cpu",), "cuda": ("cuda",)},
    dtypes={"cpu": FLOATS, "cuda": FLOATS, "simt": FLOATS},
)


def ps_roi_align(
    input: Tensor, boxes: Boxes, output_size: OutputSize, spatial_scale: float = 1.0, sampling_ratio: int = -1
) -> Tensor:
    """Mean of bilinear samples in each bin of each box, where each bin reads channels of its own.

    As torchvision.ops.ps_roi_align: bin (i, j) of channel c reads channel (c * height + i) * width + j of input.

    Args:
        input: [N, C, H, W], C a multiple of height * width, floating point; contiguous and channels_last layouts are
            kept.
        boxes: [K, 5] rows (number of the image, x1, y1, x2, y2) in input's dtype, or float32 beside half precision; or
            a list of [L, 4] tensors, one for each image. Boxes have no gradient.
        output_size: height and width of the output in bins, one int or two.
        spatial_scale: factor from the boxes' coordinates to input's pixels.
        sampling_ratio: samples per bin along each axis; 0 or less means one per pixel, ceil(size / bins).

    Returns:
        [K, C / (height * width), height, width] in input's dtype.

    Raises:
        TypeError: input is no tensor, or a number is none.
        AssertionError: boxes have another form or shape.
        RuntimeError: another rank, size, dtype or device; on the CPU also a number of an image that does not exist. On
            a GPU such a box gives NaN, since looking would mean to wait.

    Boxes are shifted by half a pixel and may be smaller than one; without a sample a bin is 0 / 0, NaN, and has no
    gradient. Borders, boxes that are not finite, and numerics are those of roi_align with `aligned`. The backward uses
    no atomics: the same bits on every run. It can be differentiated again. Dai et al., R-FCN, 2016; Li et al.,
    Light-Head R-CNN, 2017.
    """
    check_input("ps_roi_align", input)
    height, width = pair("ps_roi_align", output_size)
    check_numbers("ps_roi_align", spatial_scale, sampling_ratio)
    if input.shape[1] % (height * width):
        raise RuntimeError(
            f"ps_roi_align: argument 'input' must have a multiple of {height} * {width} channels, got {input.shape[1]}"
        )
    rows = as_rows("ps_roi_align", input, boxes)
    decision = choose(_FAMILY, input)
    if decision.backend == "torch":
        return _roi_torch.ps_roi_align(input, rows, (height, width), spatial_scale, sampling_ratio)
    return _fwd(decision, input, rows, height, width, spatial_scale, sampling_ratio)


def _fwd_fake(x: Tensor, boxes: Tensor, out_h: int, out_w: int, scale: float, sampling: int) -> Tensor:
    return empty(x, (boxes.shape[0], x.shape[1] // (out_h * out_w), out_h, out_w), channels_last(x))


def _bwd_fake(
    dy: Tensor, boxes: Tensor, batch: int, height: int, width: int, scale: float, sampling: int, last: bool
) -> Tensor:
    return empty(dy, (batch, dy.shape[1] * dy.shape[2] * dy.shape[3], height, width), last)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, boxes, _, _, *ctx.rules = inputs
    ctx.save_for_backward(boxes)
    ctx.size, ctx.last = (x.shape[0], *x.shape[2:]), channels_last(x)


def _fwd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    (boxes,) = ctx.saved_tensors
    dx = None if dy is None else _bwd(ctx.decision, dy, boxes, *ctx.size, *ctx.rules, ctx.last)
    return dx, None, None, None, None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, boxes, _, _, _, *ctx.rules, _ = inputs
    ctx.save_for_backward(boxes)
    ctx.out = dy.shape[2:]


def _bwd_backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, ...]:
    """The op is linear: the derivative of its backward is its forward."""
    (boxes,) = ctx.saved_tensors
    ddy = None if ddx is None else _fwd(ctx.decision, ddx, boxes, *ctx.out, *ctx.rules)
    return ddy, None, None, None, None, None, None, None


_fwd = Op(
    "ps_roi_align_fwd",
    "(Tensor x, Tensor boxes, SymInt out_h, SymInt out_w, float scale, int sampling) -> Tensor",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
)
_bwd = Op(
    "ps_roi_align_bwd",
    "(Tensor dy, Tensor boxes, SymInt batch, SymInt height, SymInt width, float scale, int sampling, "
    "bool channels_last) -> Tensor",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
