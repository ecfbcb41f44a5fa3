"""Suppression of rotated boxes against a vectorised NumPy greedy one with the same intersection formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench._case import Call, Case

FUNCTION = "nms_rotated"

_BOTH = ("cpu", "cuda")
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_CALL = "sorting, scratch memory and a result of unknown size; a busy processor doubles it"

CASES = [
    Case("1k", {"n": 1000}, _BOTH, ("fwd",), panel=True),
    Case("10k", {"n": 10_000}, _BOTH, ("fwd",)),
    Case("host-8", {"n": 8}, _BOTH, ("fwd",), _HOST, host=True, why_missed={"cpu fwd": _CALL}),
    Case("host-8-grad", {"n": 8}, _BOTH, ("fwd",), _HOST_GRAD, host=True, grad=True, why_missed={"cpu fwd": _CALL}),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Centres uniform in a square of 1,000 pixels, sides of 10 to 100, any angle."""
    n = case.params["n"]
    center = torch.rand(n, 2, generator=generator, device=device) * 1000
    side = torch.rand(n, 2, generator=generator, device=device) * 90 + 10
    angle = torch.rand(n, 1, generator=generator, device=device) * 360 - 180
    scores = torch.rand(n, generator=generator, device=device).to(dtype)
    return Call((torch.cat([center, side, angle], 1).to(dtype), scores, 0.3), {}, ())


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """Boxes and scores in, indices out; 8 operations for each pair, since few boxes are near each other."""
    n = case.params["n"]
    return {"fwd": (n * (6 * itemsize + 8), n * n // 2 * 8), "bwd": (0, 0)}


def torch_function(case: Case) -> Callable[..., Any]:
    """NumPy, vectorised over the boxes that are left and near; torch itself has none."""
    return _numpy_nms


def _fraction(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.clip(np.divide(part, whole, out=np.zeros_like(part), where=np.abs(whole) > 1e-290), 0, 1)


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area that box a and boxes b have in common; rows are x, y, w, h, cos, sin."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    x, y = dx * a[4] - dy * a[5], dx * a[5] + dy * a[4]
    c, s = b[4] * a[4] + b[5] * a[5], b[4] * a[5] - b[5] * a[4]
    px, py, qx, qy = b[2] * c / 2, b[2] * s / 2, -b[3] * s / 2, b[3] * c / 2
    xs = np.stack([x + px + qx, x - px + qx, x - px - qx, x + px - qx])
    ys = np.stack([y + py + qy, y - py + qy, y - py - qy, y + py - qy])
    dx, dy = np.roll(xs, -1, 0) - xs, np.roll(ys, -1, 0) - ys
    start, end = np.clip(xs, -a[2] / 2, a[2] / 2), np.clip(xs + dx, -a[2] / 2, a[2] / 2)
    y0, y1 = ys + _fraction(start - xs, dx) * dy, ys + _fraction(end - xs, dx) * dy
    low, high = np.clip(y0, -a[3] / 2, a[3] / 2), np.clip(y1, -a[3] / 2, a[3] / 2)
    enters, leaves = _fraction(low - y0, y1 - y0), _fraction(high - y0, y1 - y0)
    strips = (end - start) * (enters * low + (leaves - enters) * (low + high) / 2 + (1 - leaves) * high)
    return np.abs(strips.sum(0))


def _numpy_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    rows = boxes.detach().double().cpu().numpy().T
    angle = np.deg2rad(rows[4])
    rows = np.stack([*rows[:4], np.cos(angle), np.sin(angle)])
    areas, radius = rows[2] * rows[3], np.hypot(rows[2], rows[3]) / 2
    order = np.argsort(-scores.detach().double().cpu().numpy(), kind="stable")
    kept = []
    while order.size:
        i, rest = order[0], order[1:]
        kept.append(i)
        stays = np.ones(rest.size, dtype=bool)
        apart = np.hypot(rows[0, rest] - rows[0, i], rows[1, rest] - rows[1, i])
        near = np.flatnonzero(apart < radius[rest] + radius[i])
        common = _common(rows[:, i], rows[:, rest[near]])
        stays[near] = common <= iou_threshold * (areas[i] + areas[rest[near]] - common)
        order = rest[stays]
    return torch.from_numpy(np.array(kept, dtype=np.int64)).to(boxes.device)
