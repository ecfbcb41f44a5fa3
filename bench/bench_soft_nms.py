"""Soft-NMS and Matrix NMS against vectorised NumPy: 1,000 boxes, of which each overlaps a few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench._case import Call, Case

FUNCTION = "soft_nms"

_BOTH = ("cpu", "cuda")
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_CALL = "two results of unknown size; a busy processor doubles it"

CASES = [
    Case("linear-1k", {"n": 1000, "method": "linear"}, _BOTH, ("fwd",), panel=True),
    Case("gaussian-1k", {"n": 1000, "method": "gaussian"}, _BOTH, ("fwd",)),
    Case("matrix-1k", {"n": 1000, "method": "gaussian"}, _BOTH, ("fwd",), function="matrix_nms"),
    Case("host-8", {"n": 8, "method": "linear"}, _BOTH, ("fwd",), _HOST, host=True, why_missed={"cpu fwd": _CALL}),
    Case(
        "host-8-grad",
        {"n": 8, "method": "linear"},
        _BOTH,
        ("fwd",),
        _HOST_GRAD,
        host=True,
        grad=True,
        why_missed={"cpu fwd": _CALL},
    ),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Centres uniform in a square of 300 pixels, sides of 10 to 60."""
    n, method = case.params["n"], case.params["method"]
    center = torch.rand(n, 2, generator=generator, device=device) * 300
    half = torch.rand(n, 2, generator=generator, device=device) * 25 + 5
    boxes = torch.cat([center - half, center + half], -1).to(dtype)
    scores = torch.rand(n, generator=generator, device=device).to(dtype)
    return Call((boxes, scores), {"method": method}, ())


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """Boxes and scores in, indices and scores out; 14 operations for each pair."""
    n = case.params["n"]
    return {"fwd": (n * (6 * itemsize + 8), n * n // 2 * 14), "bwd": (0, 0)}


def torch_function(case: Case) -> Callable[..., Any]:
    """NumPy, vectorised over the boxes that are left, or over all pairs; torch has neither."""
    return _numpy_matrix if case.function == "matrix_nms" else _numpy_soft


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    width = np.maximum(0, np.minimum(a[2], b[2]) - np.maximum(a[0], b[0]))
    height = np.maximum(0, np.minimum(a[3], b[3]) - np.maximum(a[1], b[1]))
    inter = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inter / (areas[0] + areas[1] - inter)


def _arrays(boxes: torch.Tensor, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (boxes, scores)]
    return np.ascontiguousarray(wide[0].detach().cpu().numpy().T), wide[1].detach().cpu().numpy().copy()


def _numpy_soft(boxes: torch.Tensor, scores: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    corners, values = _arrays(boxes, scores)
    left, taken, lowered = np.flatnonzero(values >= 0.001), [], []
    while left.size:
        best = left[np.argmax(values[left])]
        taken.append(best)
        lowered.append(values[best])
        left = left[left != best]
        iou = _iou(corners[:, best], corners[:, left])
        values[left] *= (
            np.where(iou > 0.3, 1 - iou, 1) if method == "linear" else np.exp(-(iou * iou) / np.float32(0.5))
        )
        left = left[values[left] >= 0.001]
    indices = torch.tensor(np.array(taken, dtype=np.int64), device=boxes.device)
    return indices, torch.tensor(np.array(lowered), device=boxes.device).to(scores.dtype)


def _numpy_matrix(boxes: torch.Tensor, scores: torch.Tensor, method: str) -> torch.Tensor:
    corners, values = _arrays(boxes, scores)
    order = np.argsort(-values, kind="stable")
    corners = corners[:, order]
    iou = np.triu(_iou(corners[:, :, None], corners[:, None]), 1)
    covered = iou.max(0)[:, None]
    values[order] *= (np.exp(-2 * iou**2) / np.exp(-2 * covered**2)).min(0)
    return torch.from_numpy(values).to(boxes.device, scores.dtype)
