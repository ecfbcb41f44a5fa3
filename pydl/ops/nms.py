"""Non-maximum suppression of axis-aligned boxes: schemas, fakes, checks and the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op
from pydl.ops._nms_arguments import check_boxes, check_number, pair_iou

__all__ = ["batched_nms", "nms", "nms_padded"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _family(name: str, op: str) -> Family:
    dtypes: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(("cpu", "cuda", "simt"), _FLOATS)
    return Family(name, ops=(op,), order={"cpu": ("cpu",), "cuda": ("cuda",)}, dtypes=dtypes)


_PLAIN, _BATCHED = _family("nms", "nms"), _family("batched_nms", "nms")
_PADDED = _family("nms_padded", "nms_padded")


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that greedy non-maximum suppression keeps.

    Boxes are taken by decreasing score; one is dropped when its IoU with a box kept before it exceeds the threshold.

    Args:
        boxes: [N, 4] corners (x1, y1, x2, y2), floating point; float16 and bfloat16 are widened to float32.
        scores: [N], floating point, of any such dtype.
        iou_threshold: boxes with an IoU above it, not at it, are dropped.

    Returns:
        int64 [K], indices by decreasing score. K depends on the data: on a GPU the call waits for it once, at its end.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: shapes that do not belong together, or integer boxes.

    Results are torchvision's to the bit: IoU = inter / (area_a + area_b - inter) in the boxes' precision, compared with
    the threshold in float64; equal scores keep their order and NaN scores come first; a pair of zero area has IoU NaN
    and stays; corners in the wrong order are taken as they are. CPU and CUDA agree. In a compiled graph the result has
    an unbacked size; `nms_padded` has a static one.

    Source: Neubeck, Van Gool, "Efficient Non-Maximum Suppression", 2006. A box is tested against kept boxes only, on
    the CPU against those near it, which a grid finds: memory O(N).
    """
    check_boxes("nms", boxes, scores, None, iou_threshold)
    return _apply(_PLAIN, boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression in which only boxes of one class suppress each other.

    Args:
        boxes: [N, 4] corners (x1, y1, x2, y2), floating point; float16 and bfloat16 are widened to float32.
        scores: [N], floating point.
        idxs: [N], the class of each box, any integers.
        iou_threshold: boxes of one class with an IoU above it are dropped.

    Returns:
        int64 [K], indices by decreasing score over all classes; see `nms` for what K depends on.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: shapes that do not belong together, integer boxes, or classes that are no integers.

    Classes are compared as integers. torchvision moves small problems' classes apart by an offset on the coordinates,
    which costs precision and fails below zero; where that matters, this result is the exact one.

    Source: as `nms`; boxes are sorted by class and score, and each class is a problem of its own.
    """
    check_boxes("batched_nms", boxes, scores, idxs, iou_threshold)
    return _apply(_BATCHED, boxes, scores, idxs, iou_threshold)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None = None,
    idxs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression of a batch of images with results of fixed size.

    Nothing waits for the device, and all shapes are known beforehand: for torch.compile, torch.export and CUDA graphs.

    Args:
        boxes: [B, N, 4] corners (x1, y1, x2, y2), floating point; float16 and bfloat16 are widened to float32.
        scores: [B, N], floating point.
        iou_threshold: boxes of one image (and class) with an IoU above it are dropped.
        max_output: number of boxes to return for each image; the search stops there.
        score_threshold: only boxes with a score above it take part, NaN does not. Images with fewer boxes than N can
            thus be filled up with scores of -inf and a threshold of -inf. None: all boxes take part.
        idxs: [B, N], the class of each box, any integers; None: one class.

    Returns:
        int64 [B, max_output], indices into N by decreasing score, -1 after the last; and int64 [B], how many there are.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: shapes that do not belong together, integer boxes, classes that are no integers, or a negative
            max_output.

    The rule and its precision are those of `nms`, and so is the source.
    """
    check_boxes("nms_padded", boxes, scores, idxs, iou_threshold, 3)
    if not isinstance(max_output, (int, torch.SymInt)) or isinstance(max_output, bool):
        raise TypeError(f"nms_padded: argument 'max_output' must be an int, got {max_output!r}")
    if max_output < 0:
        raise RuntimeError(f"nms_padded: argument 'max_output' must not be negative, got {max_output}")
    if score_threshold is not None:
        check_number("nms_padded", "score_threshold", score_threshold)
    decision = choose(_PADDED, boxes)
    classes = None if idxs is None else idxs.to(torch.int64)
    if decision.backend == "torch":
        return _torch_padded(boxes, scores, classes, iou_threshold, max_output, score_threshold)
    out: tuple[Tensor, Tensor] = _padded(decision, boxes, scores, classes, iou_threshold, max_output, score_threshold)
    return out


def _apply(family: Family, boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    decision = choose(family, boxes)
    if idxs is not None:
        idxs = idxs.to(torch.int64)
    if decision.backend == "torch":
        return _torch_greedy(boxes, scores, idxs, iou_threshold)
    kept: Tensor = _nms(decision, boxes, scores, idxs, iou_threshold)
    return kept


def _torch_greedy(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, order: Tensor | None = None
) -> Tensor:
    """The same result from torch's own operators, one round for each kept box."""
    if order is None:
        order = torch.argsort(scores, descending=True, stable=True)
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    kept = []
    while order.numel():
        first, order = order[0], order[1:]
        kept.append(first)
        stays = ~(pair_iou(boxes[first], boxes[order]).double() > iou_threshold)
        if idxs is not None:
            stays |= idxs[order] != idxs[first]
        order = order[stays]
    return torch.stack(kept) if kept else order


def _torch_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    indices = torch.full((boxes.shape[0], max_output), -1, dtype=torch.int64, device=boxes.device)
    counts = torch.zeros(boxes.shape[0], dtype=torch.int64, device=boxes.device)
    for image in range(boxes.shape[0]):
        order = torch.argsort(scores[image], descending=True, stable=True)
        if score_threshold is not None:
            order = order[scores[image][order].double() > score_threshold]
        classes = None if idxs is None else idxs[image]
        kept = _torch_greedy(boxes[image], scores[image], classes, iou_threshold, order)[:max_output]
        indices[image, : kept.numel()] = kept
        counts[image] = kept.numel()
    return indices, counts


def _nms_fake(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64)


def _padded_fake(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    size = (boxes.shape[0], max_output)
    return boxes.new_empty(size, dtype=torch.int64), boxes.new_empty(size[:1], dtype=torch.int64)


_nms = Op("nms", "(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold) -> Tensor", fake=_nms_fake)
_padded = Op(
    "nms_padded",
    "(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, SymInt max_output, float? score_threshold) "
    "-> (Tensor, Tensor)",
    fake=_padded_fake,
)
