"""Non-maximum suppression against a vectorised NumPy greedy one: random boxes, 80 classes, batches of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench._case import Call, Case

FUNCTION = "nms"

_BOTH = ("cpu", "cuda")
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_CALL = "sorting, scratch memory and a result of unknown size; a busy processor doubles it"


def _random(n: int, batch: int = 0, classes: int = 0) -> dict[str, Any]:
    return {"n": n, "batch": batch, "classes": classes}


def _case(name: str, params: dict[str, Any], **kwargs: Any) -> Case:
    function = "nms_padded" if params["batch"] else "batched_nms" if params["classes"] else None
    return Case(name, params, _BOTH, ("fwd",), function=function, **kwargs)


CASES = [
    _case("10k", _random(10_000), targets={"cpu fwd": {"ratio_to_torch": 40.0}}, panel=True),
    _case("1k", _random(1_000)),
    _case("20k", _random(20_000)),
    _case("20k-80-classes", _random(20_000, classes=80)),
    _case("padded-8x1k-20-classes", _random(1_000, batch=8, classes=20)),
    _case("host-8", _random(8), targets=_HOST, host=True, why_missed={"cpu fwd": _CALL}),
    _case("host-8-grad", _random(8), targets=_HOST_GRAD, host=True, grad=True, why_missed={"cpu fwd": _CALL}),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Centres uniform in a square of 1,000 pixels, sides of 10 to 100; about two thirds of 10,000 are kept."""
    p = case.params
    shape = (p["batch"], p["n"]) if p["batch"] else (p["n"],)
    center = torch.rand(*shape, 2, generator=generator, device=device) * 1000
    half = torch.rand(*shape, 2, generator=generator, device=device) * 45 + 5
    boxes = torch.cat([center - half, center + half], -1).to(dtype)
    scores = torch.rand(*shape, generator=generator, device=device).to(dtype)
    if not p["classes"]:
        return Call((boxes, scores, 0.5), {}, ())
    idxs = torch.randint(p["classes"], shape, generator=generator, device=device)
    if p["batch"]:
        return Call((boxes, scores, 0.5, 100, 0.05, idxs), {}, ())
    return Call((boxes, scores, idxs, 0.5), {}, ())


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """Boxes and scores in, indices out; 14 operations for each pair, as many pairs as without any suppression."""
    boxes = max(case.params["batch"], 1) * case.params["n"]
    return {"fwd": (boxes * (5 * itemsize + 8), boxes * case.params["n"] // 2 * 14), "bwd": (0, 0)}


def torch_function(case: Case) -> Callable[..., Any]:
    """Greedy suppression in NumPy, vectorised over the boxes that are left; torch itself has none."""
    return {"nms": _numpy_nms, "batched_nms": _numpy_batched, "nms_padded": _numpy_padded}[case.function or FUNCTION]


def _greedy(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.T)
    areas = (x2 - x1) * (y2 - y1)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while order.size:
        i, rest = order[0], order[1:]
        kept.append(i)
        width = np.maximum(0, np.minimum(x2[i], x2[rest]) - np.maximum(x1[i], x1[rest]))
        height = np.maximum(0, np.minimum(y2[i], y2[rest]) - np.maximum(y1[i], y1[rest]))
        inter = width * height
        order = rest[inter / (areas[i] + areas[rest] - inter) <= iou_threshold]
    return np.array(kept, dtype=np.int64)


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
    return [t.detach().cpu().numpy() for t in wide]


def _numpy_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    return torch.from_numpy(_greedy(*_arrays(boxes, scores), iou_threshold)).to(boxes.device)


def _by_class(boxes: np.ndarray, scores: np.ndarray, idxs: np.ndarray, iou_threshold: float) -> np.ndarray:
    members = [np.flatnonzero(idxs == c) for c in np.unique(idxs)]
    kept = np.concatenate([m[_greedy(boxes[m], scores[m], iou_threshold)] for m in members] or [np.zeros(0, np.int64)])
    kept.sort()  # equal scores in their order
    return kept[np.argsort(-scores[kept], kind="stable")]


def _numpy_batched(boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    return torch.from_numpy(_by_class(*_arrays(boxes, scores, idxs), iou_threshold)).to(boxes.device)


def _numpy_padded(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    max_output: int,
    score_threshold: float,
    idxs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.full((len(boxes), max_output), -1)
    counts = torch.zeros(len(boxes), dtype=torch.int64)
    for image, (b, s, c) in enumerate(zip(*_arrays(boxes, scores, idxs), strict=True)):
        above = np.flatnonzero(s > score_threshold)
        kept = above[_by_class(b[above], s[above], c[above], iou_threshold)][:max_output]
        indices[image, : len(kept)] = torch.from_numpy(kept)
        counts[image] = len(kept)
    return indices.to(boxes.device), counts.to(boxes.device)
