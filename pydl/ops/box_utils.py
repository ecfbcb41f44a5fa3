"""Small functions of boxes: areas, forms, clipping, and which are large enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._boxes import FLOATS, check_boxes, wide_dtype, widened
from pydl.ops._contract import Op

__all__ = ["box_area", "box_convert", "clip_boxes_to_image", "remove_small_boxes"]

FORMATS = ("xyxy", "xywh", "cxcywh")
# numbers of box_form: from, to; the transpose of a form is _TRANSPOSE further
_FORMS = {
    ("xyxy", "xywh"): 0,
    ("xywh", "xyxy"): 1,
    ("xyxy", "cxcywh"): 2,
    ("cxcywh", "xyxy"): 3,
    ("xywh", "cxcywh"): 4,
    ("cxcywh", "xywh"): 5,
}
_TRANSPOSE = len(_FORMS)


def _family(name: str, *ops: str) -> Family:
    return Family(
        name,
        ops=ops,
        order={"cpu": ("cpu",), "cuda": ("cuda",)},
        dtypes={"cpu": FLOATS, "cuda": FLOATS, "simt": FLOATS},
    )


_AREA = _family("box_area", "box_area_fwd", "box_area_bwd")
_CONVERT = _family("box_convert", "box_form")
_CLIP = _family("clip_boxes_to_image", "box_clip", "box_clip_bwd")
_LARGE = Family(
    "remove_small_boxes",
    ops=("box_large",),
    order={"cpu": ("cpu",)},
    dtypes={"cpu": FLOATS},
    policy={"cuda": "the number of boxes kept must reach the host, and torch's own compaction takes it there"},
)


def box_area(boxes: Tensor, fmt: str = "xyxy") -> Tensor:
    """Area of each box.

    Args:
        boxes: [..., 4], floating point or integer.
        fmt: "xyxy" (corners), "xywh" (corner and size) or "cxcywh" (centre and size).

    Returns:
        [...], negative where two corners are swapped. As in torchvision.ops: float32 for half precision, int32 for
        smaller integers, else the dtype of boxes.

    Raises:
        TypeError: boxes is no tensor.
        RuntimeError: a shape or dtype that makes no sense.
        ValueError: fmt is another string.
    """
    check_boxes("box_area", "boxes", boxes, 1)
    _check_format("box_area", "fmt", fmt)
    decision = choose(_AREA, boxes)
    if decision.backend != "torch":
        result: Tensor = _area(decision, boxes, fmt == "xyxy")
        return result
    small = not boxes.is_floating_point() and boxes.dtype not in (torch.int32, torch.int64)
    return _area_composition(boxes.int() if small else boxes, fmt == "xyxy")


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """Boxes in another form.

    Args:
        boxes: [..., 4], floating point or integer.
        in_fmt: "xyxy" (corners), "xywh" (first corner and size) or "cxcywh" (centre and size). Rotated forms are not
            taken.
        out_fmt: one of the same three.

    Returns:
        A new tensor of the same shape; integers become float32 where a centre is halved. Half precision is computed
        in float32 and rounded once.

    Raises:
        TypeError: boxes is no tensor.
        RuntimeError: a shape or dtype that makes no sense.
        ValueError: a form is another string.
    """
    check_boxes("box_convert", "boxes", boxes, 1)
    _check_format("box_convert", "in_fmt", in_fmt)
    _check_format("box_convert", "out_fmt", out_fmt)
    if in_fmt == out_fmt:
        return boxes.clone()
    decision = choose(_CONVERT, boxes)
    if decision.backend == "torch":
        return _convert_composition(boxes, in_fmt, out_fmt)
    result: Tensor = _form(decision, boxes, _FORMS[in_fmt, out_fmt])
    return result


def clip_boxes_to_image(boxes: Tensor, size: Sequence[float]) -> Tensor:
    """Boxes with their corners moved into an image.

    Args:
        boxes: [..., 4] as x1, y1, x2, y2, floating point or integer.
        size: height and width of the image.

    Returns:
        A new tensor of the same shape and dtype; NaN stays NaN.

    Raises:
        TypeError: boxes is no tensor, or a size no number.
        RuntimeError: a shape or dtype that makes no sense.
        ValueError: size has not two members.

    The gradient passes where a coordinate lies inside, the borders included.
    """
    check_boxes("clip_boxes_to_image", "boxes", boxes, 1)
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"clip_boxes_to_image: argument 'size' must be (height, width), got {size!r}")
    height, width = size
    for value in (height, width):
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"clip_boxes_to_image: argument 'size' must hold two numbers, got {size!r}")
    decision = choose(_CLIP, boxes)
    if decision.backend == "torch":
        x, y = boxes[..., 0::2].clamp(min=0, max=width), boxes[..., 1::2].clamp(min=0, max=height)
        return torch.stack((x, y), dim=-1).reshape(boxes.shape)
    result: Tensor = _clip(decision, boxes, float(width), float(height))
    return result


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """Indices of the boxes whose width and height are at least ``min_size``, in ascending order.

    Args:
        boxes: [N, 4] as x1, y1, x2, y2, floating point or integer.
        min_size: least width and height.

    Returns:
        [K], int64.

    Raises:
        TypeError: boxes is no tensor, or min_size no number.
        RuntimeError: a shape or dtype that makes no sense.
    """
    check_boxes("remove_small_boxes", "boxes", boxes, 1)
    if isinstance(min_size, bool) or (not isinstance(min_size, (int, float)) and not hasattr(min_size, "__float__")):
        raise TypeError(f"remove_small_boxes: argument 'min_size' must be a number, got {min_size!r}")
    least = float(min_size)
    decision = choose(_LARGE, boxes, "" if boxes.dim() == 2 else "only [N, 4] has a kernel")
    if decision.backend == "torch":
        wide = widened(boxes) if boxes.is_floating_point() else boxes
        large = (wide[..., 2] - wide[..., 0] >= least) & (wide[..., 3] - wide[..., 1] >= least)
        return torch.where(large)[0]
    with torch.no_grad():
        result: Tensor = _large(decision, boxes.detach(), least)
    return result


def _check_format(op: str, name: str, fmt: str) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"{op}: argument {name!r} must be one of {', '.join(FORMATS)}, got {fmt!r}")


def _area_composition(boxes: Tensor, corners: bool) -> Tensor:
    x1, y1, x2, y2 = widened(boxes).unbind(-1) if boxes.is_floating_point() else boxes.unbind(-1)
    return (x2 - x1) * (y2 - y1) if corners else x2 * y2


def _convert_composition(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    axis = _AXES[in_fmt, out_fmt]
    if not boxes.is_floating_point():
        x1, y1, x2, y2 = boxes.unbind(-1)
        (x, w), (y, h) = axis(x1, x2), axis(y1, y2)
        return torch.stack((x, y, w, h), dim=-1)
    x1, y1, x2, y2 = widened(boxes).unbind(-1)
    (x, w), (y, h) = axis(x1, x2), axis(y1, y2)
    return torch.stack((x, y, w, h), dim=-1).to(boxes.dtype)


# what each form makes of the two numbers of an axis
_AXES: dict[tuple[str, str], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    ("xyxy", "xywh"): lambda p, q: (p, q - p),
    ("xywh", "xyxy"): lambda p, q: (p, p + q),
    ("xyxy", "cxcywh"): lambda p, q: ((p + q) / 2, q - p),
    ("cxcywh", "xyxy"): lambda p, q: (p - q * 0.5, p + q * 0.5),
    ("xywh", "cxcywh"): lambda p, q: (p + q * 0.5, q),
    ("cxcywh", "xywh"): lambda p, q: (p - q * 0.5, q),
}


def _area_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    boxes, ctx.corners = inputs
    ctx.save_for_backward(boxes)


def _area_backward(ctx: Any, dareas: Tensor | None) -> tuple[Tensor | None, ...]:
    (boxes,) = ctx.saved_tensors
    return None if dareas is None else _area_bwd(ctx.decision, dareas, boxes, ctx.corners), None


def _area_bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dareas, boxes, ctx.corners = inputs
    ctx.save_for_backward(dareas, boxes)


def _area_bwd_backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, ...]:
    """<v, dboxes> = dareas (vw h + w vh), with vw and vh the sizes that v has as a box; in torch operations."""
    if v is None:
        return None, None, None
    dareas, boxes = ctx.saved_tensors
    sizes = []
    for b in (widened(boxes), widened(v)):
        x1, y1, x2, y2 = b.unbind(-1)
        sizes.append((x2 - x1, y2 - y1) if ctx.corners else (x2, y2))
    (w, h), (vw, vh) = sizes
    dw, dh = dareas * vh, dareas * vw
    zero = torch.zeros_like(dw)
    ends = (-dw, -dh) if ctx.corners else (zero, zero)
    return vw * h + w * vh, torch.stack((*ends, dw, dh), dim=-1).to(boxes.dtype), None


def _form_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.form = inputs[1]


def _form_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None
    form = ctx.form + (_TRANSPOSE if ctx.form < _TRANSPOSE else -_TRANSPOSE)
    return _form(ctx.decision, dy, form), None


def _clip_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    boxes, *ctx.size = inputs
    ctx.save_for_backward(boxes)


def _clip_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    (boxes,) = ctx.saved_tensors
    return None if dy is None else _clip_bwd(ctx.decision, dy, boxes, *ctx.size), None, None


def _clip_bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, boxes, *ctx.size = inputs
    ctx.save_for_backward(boxes)


def _clip_bwd_backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, ...]:
    (boxes,) = ctx.saved_tensors
    return None if v is None else _clip_bwd(ctx.decision, v, boxes, *ctx.size), None, None, None


def _same_fake(boxes: Tensor, *args: Any) -> Tensor:
    return boxes.new_empty(boxes.shape)


def _area_fake(boxes: Tensor, corners: bool) -> Tensor:
    return boxes.new_empty(boxes.shape[:-1], dtype=wide_dtype(boxes.dtype))


def _area_bwd_fake(dareas: Tensor, boxes: Tensor, corners: bool) -> Tensor:
    return boxes.new_empty(boxes.shape)


def _large_fake(boxes: Tensor, least: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


_area = Op(
    "box_area_fwd",
    "(Tensor boxes, bool corners) -> Tensor",
    fake=_area_fake,
    setup=_area_setup,
    backward=_area_backward,
)
_area_bwd = Op(
    "box_area_bwd",
    "(Tensor dareas, Tensor boxes, bool corners) -> Tensor",
    fake=_area_bwd_fake,
    setup=_area_bwd_setup,
    backward=_area_bwd_backward,
)
_form = Op(
    "box_form",
    "(Tensor boxes, int form) -> Tensor",
    fake=_same_fake,
    setup=_form_setup,
    backward=_form_backward,
)
_clip = Op(
    "box_clip",
    "(Tensor boxes, float width, float height) -> Tensor",
    fake=_same_fake,
    setup=_clip_setup,
    backward=_clip_backward,
)
_clip_bwd = Op(
    "box_clip_bwd",
    "(Tensor dy, Tensor boxes, float width, float height) -> Tensor",
    fake=_same_fake,
    setup=_clip_bwd_setup,
    backward=_clip_bwd_backward,
)
_large = Op("box_large", "(Tensor boxes, float least) -> Tensor", fake=_large_fake)
