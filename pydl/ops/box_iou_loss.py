"""IoU losses of boxes in pairs: schemas, fakes, derivatives and public functions."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._boxes import FLOATS, KINDS, agreement, check_eps, second_derivative, two_sets, wide_dtype, widened
from pydl.ops._contract import Op

__all__ = ["complete_box_iou_loss", "distance_box_iou_loss", "generalized_box_iou_loss"]

_FAMILIES = {
    name: Family(
        name,
        ops=("box_iou_loss_fwd", "box_iou_loss_bwd"),
        order={"cpu": ("cpu",), "cuda": ("cuda",)},
        dtypes={"cpu": FLOATS, "cuda": FLOATS, "simt": FLOATS},
    )
    for name in __all__
}
REDUCTIONS = ("none", "mean", "sum")


def generalized_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """1 - GIoU of boxes in pairs.

    Args:
        boxes1: [..., 4] as x1, y1, x2, y2, floating point or integer (read as float32).
        boxes2: the same shape, or one that broadcasts with it.
        reduction: "none", "mean" (0 for no boxes) or "sum".
        eps: added to the union and to the area of the smallest surrounding box.

    Returns:
        [...] in [0, 2], or one number; float64 for float64 boxes, else float32, in which half precision is computed.

    Raises:
        TypeError: an argument is no tensor, or eps no number.
        RuntimeError: a shape, dtype or device that makes no sense; the message names it.
        ValueError: reduction is another string.

    One pass forward, one backward; no temporaries and the same bits on every run. Value and gradient are finite for
    boxes of no area. It can be differentiated again.
    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
    """
    return _loss("generalized_box_iou_loss", "generalized", boxes1, boxes2, reduction, eps)


def distance_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """1 - DIoU of boxes in pairs: overlap, and distance of the centres in units of the surrounding box's diagonal.

    Args:
        boxes1: [..., 4] as x1, y1, x2, y2, floating point or integer (read as float32).
        boxes2: the same shape, or one that broadcasts with it.
        reduction: "none", "mean" (0 for no boxes) or "sum".
        eps: added to the union and to the squared diagonal.

    Returns:
        [...] in [0, 2], or one number; dtypes and degenerate boxes as in :func:`generalized_box_iou_loss`.

    Raises:
        TypeError: an argument is no tensor, or eps no number.
        RuntimeError: a shape, dtype or device that makes no sense; the message names it.
        ValueError: reduction is another string.

    Source: Zheng et al., "Distance-IoU Loss", AAAI 2020.
    """
    return _loss("distance_box_iou_loss", "distance", boxes1, boxes2, reduction, eps)


def complete_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """1 - CIoU of boxes in pairs: the distance loss and a term for different proportions.

    Args:
        boxes1: [..., 4] as x1, y1, x2, y2, floating point or integer (read as float32).
        boxes2: the same shape, or one that broadcasts with it.
        reduction: "none", "mean" (0 for no boxes) or "sum".
        eps: added to the union, to the squared diagonal and to the denominator of the trade-off a = v / (1 - IoU + v).

    Returns:
        [...], or one number; dtypes as in :func:`generalized_box_iou_loss`.

    Raises:
        TypeError: an argument is no tensor, or eps no number.
        RuntimeError: a shape, dtype or device that makes no sense; the message names it.
        ValueError: reduction is another string.

    The trade-off counts as a constant in the gradient. Two rules differ from torchvision's: atan(0 / 0), the angle of a
    box of no extent, is 0 where there it makes loss and gradient NaN; and eps is used throughout, where there the
    distance term has 1e-7 whatever is given.
    Source: Zheng et al., "Distance-IoU Loss", AAAI 2020.
    """
    return _loss("complete_box_iou_loss", "complete", boxes1, boxes2, reduction, eps)


def _loss(name: str, kind_name: str, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: argument 'reduction' must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    eps, kind = check_eps(name, eps), KINDS[kind_name]
    boxes1, boxes2 = two_sets(name, boxes1, boxes2, 1)
    if boxes1.shape != boxes2.shape:
        boxes1, boxes2 = _broadcast(name, boxes1, boxes2)
    decision = choose(_FAMILIES[name], boxes1)
    if decision.backend == "torch":
        loss = _composition(kind, eps, boxes1, boxes2)
    else:
        loss = _fwd(decision, boxes1, boxes2, kind, eps)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" and loss.numel() > 0 else loss.sum()


def _broadcast(name: str, boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    try:
        shape = torch.broadcast_shapes(boxes1.shape, boxes2.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name}: argument 'boxes2' must have the shape of boxes1, {list(boxes1.shape)}, or broadcast with it, "
            f"got {list(boxes2.shape)}"
        ) from None
    return boxes1.expand(shape), boxes2.expand(shape)


def _composition(kind: int, eps: float, boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return 1 - agreement(kind, widened(boxes1).unbind(-1), widened(boxes2).unbind(-1), eps, True)


def _fwd_fake(boxes1: Tensor, boxes2: Tensor, kind: int, eps: float) -> Tensor:
    return boxes1.new_empty(boxes1.shape[:-1], dtype=wide_dtype(boxes1.dtype))


def _bwd_fake(dloss: Tensor, boxes1: Tensor, boxes2: Tensor, kind: int, eps: float) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape), boxes2.new_empty(boxes2.shape)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    boxes1, boxes2, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(boxes1, boxes2)


def _fwd_backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, None, None
    boxes1, boxes2 = ctx.saved_tensors
    return (*_bwd(ctx.decision, dloss, boxes1, boxes2, ctx.kind, ctx.eps), None, None)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    dloss, boxes1, boxes2, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(dloss, boxes1, boxes2)


def _bwd_backward(ctx: Any, v1: Tensor | None, v2: Tensor | None) -> tuple[Tensor | None, ...]:
    function = functools.partial(_composition, ctx.kind, ctx.eps)
    return (*second_derivative(function, ctx.saved_tensors, v1, v2), None, None)


_fwd = Op(
    "box_iou_loss_fwd",
    "(Tensor boxes1, Tensor boxes2, int kind, float eps) -> Tensor",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
)
_bwd = Op(
    "box_iou_loss_bwd",
    "(Tensor dloss, Tensor boxes1, Tensor boxes2, int kind, float eps) -> (Tensor, Tensor)",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
