"""Detection metrics: average precision from boxes, scores and labels.

Definitions (course and Everingham et al., The Pascal Visual Object Classes Challenge, 2010): detections of a class are
taken in order of decreasing score; one is a true positive if its best overlap with a box of its class and image that no
earlier detection has taken passes the threshold, else a false positive, duplicates included. Average precision is the
area under precision over recall, mAP its mean over classes and thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pydl.ops.box_iou import box_iou

__all__ = ["AveragePrecision", "mean_average_precision"]

_INTERPOLATIONS = ("continuous", "101-point", "voc07")
_MATCHES = (">=", ">")


@dataclass(frozen=True)
class AveragePrecision:
    """What :func:`mean_average_precision` found.

    Args:
        map: mean over classes and thresholds; NaN where there is no true box at all.
        per_threshold: mean over classes for each IoU threshold.
        per_class: mean over thresholds for each class that has a true box.
        table: average precision by (threshold, class).
    """

    map: float
    per_threshold: dict[float, float] = field(default_factory=dict)
    per_class: dict[int, float] = field(default_factory=dict)
    table: dict[tuple[float, int], float] = field(default_factory=dict)


def mean_average_precision(
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    iou_thresholds: Sequence[float] = (0.5,),
    interpolation: str = "continuous",
    match: str = ">=",
    max_detections: int | None = None,
) -> AveragePrecision:
    """Mean average precision of detections in a set of images.

    Args:
        predictions: for each image a mapping: "boxes" [n, 4] (x1, y1, x2, y2), "scores" [n], integer "labels" [n].
        targets: for each image a mapping with "boxes" [m, 4] and integer "labels" [m]; "iscrowd" is not supported.
        iou_thresholds: overlaps from which a detection counts, each in (0, 1].
        interpolation: "continuous": the area under the precision made monotonous from the right (VOC from 2010 on);
            "101-point": its mean at recall 0, 0.01, ..., 1 (COCO); "voc07": at 0, 0.1, ..., 1.
        match: whether an overlap equal to the threshold counts (">=", as COCO) or not (">", as the course).
        max_detections: the best so many detections of an image and class are used (COCO: 100); None for all.

    Returns:
        AveragePrecision. A class without a true box does not count, whatever is predicted for it.

    Raises:
        ValueError: lists of different length, crowd boxes, an unknown option, a threshold out of range, NaN scores.

    Equal scores keep the order of images and of detections within them. Of true boxes with equal overlap the last one
    matches, as in pycocotools.
    """
    _check(predictions, targets, iou_thresholds, interpolation, match)
    classes = sorted({int(label) for t in targets for label in t["labels"].tolist()})
    table: dict[tuple[float, int], float] = {}
    for label in classes:
        images = [_of_class(p, t, label, max_detections) for p, t in zip(predictions, targets, strict=True)]
        total = sum(overlaps.shape[1] for _, overlaps in images)
        scores = torch.cat([s for s, _ in images])
        order = scores.argsort(descending=True, stable=True)
        for threshold in iou_thresholds:
            hits = torch.cat([_matched(overlaps, threshold, match) for _, overlaps in images])[order]
            table[(float(threshold), label)] = _average(hits, total, interpolation)
    per_threshold = {float(t): _mean([table[(float(t), c)] for c in classes]) for t in iou_thresholds}
    per_class = {c: _mean([table[(float(t), c)] for t in iou_thresholds]) for c in classes}
    return AveragePrecision(_mean(list(table.values())), per_threshold, per_class, table)


def _check(
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    iou_thresholds: Sequence[float],
    interpolation: str,
    match: str,
) -> None:
    op = "mean_average_precision"
    if len(predictions) != len(targets):
        raise ValueError(
            f"{op}: arguments 'predictions' and 'targets' must have one entry for each image, got {len(predictions)} "
            f"and {len(targets)}"
        )
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f"{op}: argument 'interpolation' must be one of {_INTERPOLATIONS}, got {interpolation!r}")
    if match not in _MATCHES:
        raise ValueError(f"{op}: argument 'match' must be one of {_MATCHES}, got {match!r}")
    if not iou_thresholds or not all(0.0 < t <= 1.0 for t in iou_thresholds):
        raise ValueError(f"{op}: argument 'iou_thresholds' must lie in (0, 1], got {tuple(iou_thresholds)}")
    for name, entries, keys in (
        ("predictions", predictions, ("boxes", "scores", "labels")),
        ("targets", targets, ("boxes", "labels")),
    ):
        for i, entry in enumerate(entries):
            _check_entry(op, f"{name}[{i}]", entry, keys)


def _check_entry(op: str, name: str, entry: Mapping[str, Tensor], keys: Sequence[str]) -> None:
    missing = [key for key in keys if not isinstance(entry.get(key), Tensor)]
    if missing:
        raise ValueError(f"{op}: {name} must hold the tensors {', '.join(keys)}, but {', '.join(missing)} is missing")
    count = entry["boxes"].shape[0]
    shapes: dict[str, Any] = {key: tuple(entry[key].shape) for key in keys}
    if shapes["boxes"] != (count, 4) or any(shapes[key] != (count,) for key in keys[1:]):
        raise ValueError(f"{op}: {name} must hold boxes [n, 4] and n of everything else, got {shapes}")
    if entry["labels"].is_floating_point():
        raise ValueError(f"{op}: {name}['labels'] must be integers, got {entry['labels'].dtype}")
    if "scores" in keys and bool(entry["scores"].isnan().any()):
        raise ValueError(f"{op}: {name}['scores'] holds NaN")
    if "iscrowd" in entry and bool(torch.as_tensor(entry["iscrowd"]).any()):
        raise ValueError(f"{op}: {name} holds crowd boxes, which are not supported")


def _of_class(
    prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], label: int, limit: int | None
) -> tuple[Tensor, Tensor]:
    """Scores of an image's detections of one class, best first, and their overlaps with its true boxes [n, m]."""
    mine, true = prediction["labels"] == label, target["labels"] == label
    scores = prediction["scores"][mine].double().cpu()
    order = scores.argsort(descending=True, stable=True)[:limit]
    boxes = prediction["boxes"][mine].double().cpu()[order]
    return scores[order], box_iou(boxes, target["boxes"][true].double().cpu())


def _matched(overlaps: Tensor, threshold: float, match: str) -> Tensor:
    """Which detections, best first, find a true box of their own [n]."""
    hits = torch.zeros(overlaps.shape[0], dtype=torch.bool)
    if overlaps.shape[1] == 0:
        return hits
    free = torch.ones(overlaps.shape[1], dtype=torch.bool)
    for i, row in enumerate(overlaps):
        row = torch.where(free, row, -1.0)
        best = row.shape[0] - 1 - int(row.flip(0).argmax())
        found = float(row[best])
        if found > threshold or (match == ">=" and found == threshold):
            hits[i], free[best] = True, False
    return hits


def _average(hits: Tensor, total: int, interpolation: str) -> float:
    """Average precision of detections in order of decreasing score."""
    if hits.numel() == 0:
        return 0.0
    found = hits.double().cumsum(0)
    recall = found / total
    precision = found / torch.arange(1, len(hits) + 1, dtype=torch.float64)
    # at each recall the best precision that is still to be had
    envelope = precision.flip(0).cummax(0).values.flip(0)
    if interpolation == "continuous":
        steps = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))
        return float((steps * envelope).sum())
    points = 101 if interpolation == "101-point" else 11
    # multiples of the step, as NumPy's linspace has them: a recall may equal one of them to the last bit
    at = torch.searchsorted(recall, torch.arange(points, dtype=torch.float64) * (1.0 / (points - 1)))
    return float(torch.where(at < len(envelope), envelope[at.clamp(max=len(envelope) - 1)], 0.0).mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
