"""roi_pool of 7 x 7 bins in both layouts, as a detector's head calls it: small, large, and host cost.

The baseline is what torch has for a box: F.adaptive_max_pool2d over its pixels, one call for each. That is the same
function for boxes of whole pixels on the map, so those are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._case import Call, Case
from bench._roi import proposals, torchvision_op

FUNCTION = "roi_pool"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_CALL = {"cpu fwd": "boxes are a second tensor to be checked and converted, and their windows are found first"}
_GPU = {"cuda fwd": {"ratio_to_torch": 1.5}, "cuda bwd": {"ratio_to_torch": 1.5}}
_CPU = {"cpu fwd": {"ratio_to_torch": 1.5}, "cpu bwd": {"ratio_to_torch": 1.5}}


def _shape(*shape: int, boxes: int, sides: tuple[int, int], bins: int = 7, last: bool = False) -> dict[str, Any]:
    return {"shape": shape, "boxes": boxes, "sides": sides, "bins": bins, "last": last}


_MEDIUM = _shape(2, 256, 50, 68, boxes=64, sides=(6, 24))
_LARGE = _shape(1, 256, 200, 272, boxes=1000, sides=(6, 30))
_TINY = _shape(1, 2, 2, 2, boxes=1, sides=(1, 2), bins=2)
_BOTH = ("cpu", "cuda")

CASES = [
    Case("64x256x7x7", _MEDIUM, _BOTH, targets=_CPU, panel=True),
    Case("64x256x7x7-cl", {**_MEDIUM, "last": True}, _BOTH, targets=_CPU),
    Case("small-16x256x7x7", {**_MEDIUM, "boxes": 16}, _BOTH),
    Case("large-1000x256x7x7", _LARGE, ("cuda",), targets=_GPU, panel=True),
    Case("large-1000x256x7x7-cl", {**_LARGE, "last": True}, ("cuda",), targets=_GPU),
    Case("host-8", _TINY, _BOTH, ("fwd",), _HOST, host=True, why_missed=_CALL),
    Case("host-8-grad", _TINY, _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True, why_missed=_CALL),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal features; boxes of whole pixels on the map, even ones beyond 256 as bfloat16 has no others."""
    p = case.params
    x = torch.randn(*p["shape"], generator=generator, device=device).to(dtype)
    if p["last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    n, _, h, w = p["shape"]
    most = torch.tensor([n, w, h, w, h], device=device) - 1
    boxes = proposals(p["boxes"], p["shape"], p["sides"], generator, device).round().clamp(min=0).minimum(most)
    boxes = torch.where(boxes > 256, boxes // 2 * 2, boxes).to(dtype)
    crowd = max(1, int(p["boxes"] * p["sides"][1] ** 2 / (n * h * w)))  # boxes over a pixel
    return Call((x, boxes, p["bins"], 1.0), {}, (x,), (4 * crowd,))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: dy and positions in, dx out; a comparison for each pixel of a box."""
    p = case.params
    n, c, h, w = p["shape"]
    outputs = p["boxes"] * c * p["bins"] ** 2
    compared = p["boxes"] * c * (sum(p["sides"]) // 2) ** 2
    return {
        "fwd": ((n * c * h * w + outputs) * itemsize, compared),
        "bwd": ((n * c * h * w + outputs) * itemsize + outputs * 4, outputs),
    }


def providers(case: Case) -> dict[str, Callable[..., Any] | None]:
    """torchvision, where it is installed."""
    return {"torchvision": torchvision_op("roi_pool")}


def torch_function(case: Case) -> Callable[..., Any]:
    """The baseline."""
    return by_adaptive_max_pool


def by_adaptive_max_pool(input: Tensor, boxes: Tensor, bins: int, spatial_scale: float) -> Tensor:
    """roi_pool of boxes of whole pixels on the map, at a scale of 1."""
    pooled = [
        F.adaptive_max_pool2d(input[n, :, top : bottom + 1, left : right + 1], bins)
        for n, left, top, right, bottom in boxes.long().tolist()
    ]
    return torch.stack(pooled)
