"""Agreement of every box of one set with every box of another: schemas, fakes, derivatives and public functions."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._boxes import FLOATS, KINDS, check_eps, pairwise, second_derivative, two_sets, wide_dtype, widened
from pydl.ops._contract import Op
from pydl.ops.box_utils import box_convert

__all__ = ["box_iou", "complete_box_iou", "distance_box_iou", "generalized_box_iou"]

_FAMILIES = {
    name: Family(
        name,
        ops=("box_iou_fwd", "box_iou_bwd"),
        order={"cpu": ("cpu",), "cuda": ("cuda",)},
        dtypes={"cpu": FLOATS, "cuda": FLOATS, "simt": FLOATS},
    )
    for name in __all__
}
FORMATS = ("xyxy", "xywh", "cxcywh")


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """Intersection over union of every box of one set with every box of another.

    Args:
        boxes1: [..., N, 4], floating point or integer (read as float32). Leading dimensions are broadcast.
        boxes2: [..., M, 4].
        fmt: form of both: "xyxy" (corners, x1 <= x2 and y1 <= y2), "xywh" (corner and size) or "cxcywh" (centre and
            size). Rotated forms are not taken.

    Returns:
        [..., N, M], float64 for float64 boxes, float32 for all others: half precision is computed in float32.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: a shape, dtype or device that makes no sense; the message names it.
        ValueError: fmt is another string.

    As in torchvision.ops: two boxes without area give NaN, boxes with swapped corners have the area their product
    says, and the gradient of a side that just touches counts as overlapping. Sums in the gradient have a fixed order:
    the same bits on every run. It can be differentiated again.
    """
    if fmt not in FORMATS:
        raise ValueError(f"box_iou: argument 'fmt' must be one of {', '.join(FORMATS)}, got {fmt!r}")
    if fmt != "xyxy":
        boxes1, boxes2 = two_sets("box_iou", boxes1, boxes2, 2)
        boxes1, boxes2 = (box_convert(widened(b), fmt, "xyxy") for b in (boxes1, boxes2))
    return _agreement("box_iou", "iou", boxes1, boxes2, 0.0)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU less the share of the smallest surrounding box that the union leaves empty, for every two boxes.

    Args:
        boxes1: [..., N, 4] as x1, y1, x2, y2, floating point or integer. Leading dimensions are broadcast.
        boxes2: [..., M, 4].

    Returns:
        [..., N, M] in [-1, 1]; dtypes and degenerate boxes as in :func:`box_iou`.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: a shape, dtype or device that makes no sense; the message names it.

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
    """
    return _agreement("generalized_box_iou", "generalized", boxes1, boxes2, 0.0)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU less the squared distance of the centres over the squared diagonal of the smallest surrounding box.

    Args:
        boxes1: [..., N, 4] as x1, y1, x2, y2, floating point or integer. Leading dimensions are broadcast.
        boxes2: [..., M, 4].
        eps: added to the squared diagonal.

    Returns:
        [..., N, M] in [-1, 1]; dtypes and degenerate boxes as in :func:`box_iou`.

    Raises:
        TypeError: an argument is no tensor, or eps no number.
        RuntimeError: a shape, dtype or device that makes no sense; the message names it.

    Source: Zheng et al., "Distance-IoU Loss", AAAI 2020.
    """
    return _agreement("distance_box_iou", "distance", boxes1, boxes2, check_eps("distance_box_iou", eps))


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """Distance IoU less a term for different proportions, for every two boxes.

    Args:
        boxes1: [..., N, 4] as x1, y1, x2, y2, floating point or integer. Leading dimensions are broadcast.
        boxes2: [..., M, 4].
        eps: added to the squared diagonal and to the denominator of the trade-off a = v / (1 - IoU + v).

    Returns:
        [..., N, M]; dtypes as in :func:`box_iou`. NaN for a box whose width and height are both 0.

    Raises:
        TypeError: an argument is no tensor, or eps no number.
        RuntimeError: a shape, dtype or device that makes no sense; the message names it.

    The trade-off counts as a constant in the gradient, as in the paper and in torchvision.
    Source: Zheng et al., "Distance-IoU Loss", AAAI 2020.
    """
    return _agreement("complete_box_iou", "complete", boxes1, boxes2, check_eps("complete_box_iou", eps))


def _agreement(name: str, kind_name: str, boxes1: Tensor, boxes2: Tensor, eps: float) -> Tensor:
    kind = KINDS[kind_name]
    boxes1, boxes2 = two_sets(name, boxes1, boxes2, 2)
    decision = choose(_FAMILIES[name], boxes1)
    if decision.backend == "torch":
        return pairwise(kind, boxes1, boxes2, eps)
    if boxes1.dim() == 2 and boxes2.dim() == 2:
        matrix: Tensor = _fwd(decision, boxes1, boxes2, kind, eps)
        return matrix
    lead = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    sets = [b.expand(*lead, -1, -1).reshape(math.prod(lead), b.shape[-2], 4) for b in (boxes1, boxes2)]
    result: Tensor = _fwd(decision, *sets, kind, eps)
    return result.reshape(*lead, boxes1.shape[-2], boxes2.shape[-2])


def _fwd_fake(boxes1: Tensor, boxes2: Tensor, kind: int, eps: float) -> Tensor:
    return boxes1.new_empty((*boxes1.shape[:-1], boxes2.shape[-2]), dtype=wide_dtype(boxes1.dtype))


def _bwd_fake(dy: Tensor, boxes1: Tensor, boxes2: Tensor, kind: int, eps: float) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape), boxes2.new_empty(boxes2.shape)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    boxes1, boxes2, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(boxes1, boxes2)


def _fwd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    boxes1, boxes2 = ctx.saved_tensors
    return (*_bwd(ctx.decision, dy, boxes1, boxes2, ctx.kind, ctx.eps), None, None)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    dy, boxes1, boxes2, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(dy, boxes1, boxes2)


def _bwd_backward(ctx: Any, v1: Tensor | None, v2: Tensor | None) -> tuple[Tensor | None, ...]:
    function = functools.partial(_composition, ctx.kind, ctx.eps)
    return (*second_derivative(function, ctx.saved_tensors, v1, v2), None, None)


def _composition(kind: int, eps: float, boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return pairwise(kind, boxes1, boxes2, eps)


_fwd = Op(
    "box_iou_fwd",
    "(Tensor boxes1, Tensor boxes2, int kind, float eps) -> Tensor",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
)
_bwd = Op(
    "box_iou_bwd",
    "(Tensor dy, Tensor boxes1, Tensor boxes2, int kind, float eps) -> (Tensor, Tensor)",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
