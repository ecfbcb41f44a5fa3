"""Soft-NMS and Matrix NMS, which lower the scores of overlapping boxes: schemas, fakes and the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op
from pydl.ops._nms_arguments import check_boxes, check_number, pair_iou

__all__ = ["matrix_nms", "soft_nms"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _family(name: str) -> Family:
    dtypes: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(("cpu", "cuda", "simt"), _FLOATS)
    return Family(name, ops=(name,), order={"cpu": ("cpu",), "cuda": ("cuda",)}, dtypes=dtypes)


_SOFT, _MATRIX = _family("soft_nms"), _family("matrix_nms")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: str = "linear",
    idxs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Takes the best box again and again, and lowers the scores of the boxes that overlap it instead of dropping them.

    Args:
        boxes: [N, 4] corners (x1, y1, x2, y2), floating point.
        scores: [N], floating point.
        iou_threshold: with method "linear", boxes with an IoU above it are lowered; "gaussian" lowers all that overlap.
        sigma: width of the Gaussian, above 0.
        score_threshold: a box leaves as soon as its score is below it; a score of NaN is.
        method: "linear" multiplies a score by 1 - IoU, "gaussian" by exp(-IoU^2 / sigma).
        idxs: [N], the class of each box, any integers; only boxes of one class affect each other. None: one class.

    Returns:
        int64 [K], indices in the order in which boxes are taken, that is by decreasing lowered score; and [K], those
        scores, in the dtype of scores. On a GPU the call waits for K once, at its end.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: shapes or dtypes that do not belong together.
        ValueError: sigma is not positive, or there is no such method.

    Computed in float32, in float64 if boxes or scores are; rounded to the scores' dtype at the end. Of equal scores the
    one with the lowest index is taken first. "linear" gives the same bits on CPU and CUDA; the exponentials of
    "gaussian" may differ in the last place. Scores have no derivative.

    Source: Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", 2017.
    """
    check_boxes("soft_nms", boxes, scores, idxs, iou_threshold)
    check_number("soft_nms", "score_threshold", score_threshold)
    gaussian = _gaussian("soft_nms", method, sigma)
    decision = choose(_SOFT, boxes)
    classes = None if idxs is None else idxs.to(torch.int64)
    if decision.backend == "torch":
        return _torch_soft(boxes, scores, classes, iou_threshold, sigma, score_threshold, gaussian)
    out: tuple[Tensor, Tensor] = _soft(
        decision, boxes, scores, classes, iou_threshold, sigma, score_threshold, gaussian
    )
    return out


def matrix_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None = None, sigma: float = 2.0, method: str = "gaussian"
) -> Tensor:
    """Lowers each score by what better boxes overlap it, less what those are overlapped themselves; all at once.

    With boxes by decreasing score and IoU o(i, j), box j is multiplied by min over i < j of f(o(i, j)) / f(c(i)), where
    c(i) = max over k < i of o(k, i), and by 1 if nothing better overlaps it.

    Args:
        boxes: [N, 4] corners (x1, y1, x2, y2), or [N, H, W] masks, where a pixel counts if it is not 0.
        scores: [N], floating point.
        idxs: [N], the class of each box, any integers; only boxes of one class affect each other. None: one class.
        sigma: sharpness of the Gaussian, above 0.
        method: "gaussian" for f(o) = exp(-sigma o^2), "linear" for f(o) = 1 - o.

    Returns:
        [N], the lowered scores, in the order and dtype of scores. Nothing waits for the device.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: shapes or dtypes that do not belong together.
        ValueError: sigma is not positive, or there is no such method.

    Computed in float32, in float64 if boxes or scores are. A box that a better one covers exactly has no say with
    "linear", where its f(c) is 0. Masks go through torch's matrix product. Scores have no derivative.

    Source: Wang et al., "SOLOv2: Dynamic and Fast Instance Segmentation", 2020.
    """
    if isinstance(boxes, Tensor) and boxes.dim() == 3:
        return _mask_nms(boxes, scores, idxs, sigma, method)
    check_boxes("matrix_nms", boxes, scores, idxs, 0.0)
    gaussian = _gaussian("matrix_nms", method, sigma)
    decision = choose(_MATRIX, boxes)
    classes = None if idxs is None else idxs.to(torch.int64)
    if decision.backend == "torch":
        wide = boxes.to(_compute(boxes, scores))
        return _lower(pair_iou(wide[:, None], wide[None]), scores, classes, sigma, gaussian)
    out: Tensor = _matrix(decision, boxes, scores, classes, sigma, gaussian)
    return out


def _gaussian(op: str, method: str, sigma: float) -> bool:
    check_number(op, "sigma", sigma)
    if method not in ("linear", "gaussian"):
        raise ValueError(f"{op}: argument 'method' must be 'linear' or 'gaussian', got {method!r}")
    if not sigma > 0:
        raise ValueError(f"{op}: argument 'sigma' must be above 0, got {sigma}")
    return method == "gaussian"


def _compute(boxes: Tensor, scores: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32


def _mask_nms(masks: Tensor, scores: Tensor, idxs: Tensor | None, sigma: float, method: str) -> Tensor:
    """Matrix NMS of masks: the matrix product for the intersections is all of the cost, and torch's."""
    flat = (masks != 0).flatten(1)
    # four numbers for each mask, so that scores and classes meet the same checks as with boxes
    check_boxes("matrix_nms", flat.new_empty((len(flat), 4), dtype=torch.float32), scores, idxs, 0.0)
    dots = flat.to(_compute(scores, scores))
    inter = dots @ dots.mT
    area = inter.diagonal()
    iou = inter / (area[:, None] + area[None] - inter)
    return _lower(iou, scores, idxs, sigma, _gaussian("matrix_nms", method, sigma))


def _lower(iou: Tensor, scores: Tensor, idxs: Tensor | None, sigma: float, gaussian: bool) -> Tensor:
    """Matrix NMS of scores from the IoU of all pairs, in torch's operators."""
    n = len(scores)
    if n == 0:
        return scores.clone()
    order = torch.argsort(scores, descending=True, stable=True)
    before = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
    if idxs is not None:
        before &= idxs[order][:, None] == idxs[order][None]
    iou = torch.where(before & (iou[order][:, order] > 0), iou[order][:, order], 0)
    covered = iou.amax(0)[:, None]
    if gaussian:
        factor = (-sigma * (iou**2 - covered**2).clamp(min=0).amax(0)).exp()
    else:
        factor = torch.where((iou > 0) & (covered < 1), (1 - iou) / (1 - covered), 1).amin(0).clamp(max=1)
    lowered = torch.empty_like(scores, memory_format=torch.contiguous_format)
    lowered[order] = (scores[order].to(iou.dtype) * factor).to(scores.dtype)
    return lowered


def _torch_soft(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    gaussian: bool,
) -> tuple[Tensor, Tensor]:
    """The same from torch's own operators, one round for each box taken."""
    wide, left = (t.to(_compute(boxes, scores)) for t in (boxes, scores))
    index = torch.nonzero(left.double() >= score_threshold)[:, 0]
    taken, lowered = [], []
    while index.numel():
        # of equal scores the first
        best = index[torch.nonzero(left[index] == left[index].amax())[0, 0]]
        taken.append(best)
        lowered.append(left[best])
        index = index[index != best]
        iou = pair_iou(wide[best], wide[index])
        hit = iou > 0 if gaussian else iou.double() > iou_threshold
        if idxs is not None:
            hit &= idxs[index] == idxs[best]
        weight = (-(iou * iou) / sigma).exp() if gaussian else 1 - iou
        left = left.index_put((index,), torch.where(hit, left[index] * weight, left[index]))
        index = index[left[index].double() >= score_threshold]
    if not taken:
        return index, scores.new_empty(0)
    return torch.stack(taken), torch.stack(lowered).to(scores.dtype)


def _soft_fake(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    gaussian: bool,
) -> tuple[Tensor, Tensor]:
    taken = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((taken,), dtype=torch.int64), scores.new_empty((taken,))


def _matrix_fake(boxes: Tensor, scores: Tensor, idxs: Tensor | None, sigma: float, gaussian: bool) -> Tensor:
    return scores.new_empty(scores.shape)


_soft = Op(
    "soft_nms",
    "(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, float sigma, float score_threshold, "
    "bool gaussian) -> (Tensor, Tensor)",
    fake=_soft_fake,
)
_matrix = Op(
    "matrix_nms",
    "(Tensor boxes, Tensor scores, Tensor? idxs, float sigma, bool gaussian) -> Tensor",
    fake=_matrix_fake,
)
