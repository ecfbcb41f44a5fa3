"""ps_roi_align of 7 x 7 and 3 x 3 bins in both layouts, as a detector's head calls it: small, large, and host cost.

The baseline is torch's own sampler: one F.grid_sample over the planes of each image with its bins as the batch, then
the mean over a bin. It takes a fixed number of samples only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._case import Call, Case
from bench._roi import grid_of_samples, proposals, torchvision_op

FUNCTION = "ps_roi_align"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_CALL = {"cpu fwd": "boxes are a second tensor to be checked and converted, and their plans are made first"}
_GPU = {"cuda fwd": {"ratio_to_torch": 1.5}, "cuda bwd": {"ratio_to_torch": 1.5}}
_CPU = {"cpu fwd": {"ratio_to_torch": 4.0}, "cpu bwd": {"ratio_to_torch": 4.0}}


def _shape(*shape: int, boxes: int, sides: tuple[int, int], bins: int = 7, last: bool = False) -> dict[str, Any]:
    return {"shape": shape, "boxes": boxes, "sides": sides, "bins": bins, "sampling": 2, "last": last}


_MEDIUM = _shape(2, 490, 50, 68, boxes=256, sides=(6, 24))
_LARGE = _shape(1, 490, 100, 136, boxes=1000, sides=(6, 30))
_TINY = _shape(1, 4, 2, 2, boxes=1, sides=(1, 2), bins=2)
_BOTH = ("cpu", "cuda")

CASES = [
    Case("256x10x7x7", _MEDIUM, _BOTH, targets=_CPU, panel=True),
    Case("256x10x7x7-cl", {**_MEDIUM, "last": True}, _BOTH, targets=_CPU),
    Case("small-16x10x7x7", {**_MEDIUM, "boxes": 16}, _BOTH),
    Case("many-256x21x3x3", {**_MEDIUM, "shape": (2, 189, 50, 68), "bins": 3}, _BOTH),
    Case("large-1000x10x7x7", _LARGE, ("cuda",), targets=_GPU, panel=True),
    Case("host-8", _TINY, _BOTH, ("fwd",), _HOST, host=True, why_missed=_CALL),
    Case("host-8-grad", _TINY, _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True, why_missed=_CALL),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal features; boxes in pixels of the map."""
    p = case.params
    x = torch.randn(*p["shape"], generator=generator, device=device).to(dtype)
    if p["last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    boxes = proposals(p["boxes"], p["shape"], p["sides"], generator, device).to(dtype)
    n, _, h, w = p["shape"]
    crowd = max(1, int(p["boxes"] * p["sides"][1] ** 2 / (n * h * w)))  # boxes over a pixel
    return Call((x, boxes, p["bins"], 1.0, p["sampling"]), {}, (x,), (4 * crowd,))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: dy in, dx out; eight operations for each sample of a bin."""
    p = case.params
    n, c, h, w = p["shape"]
    outputs = p["boxes"] * c
    both = (n * c * h * w + outputs) * itemsize, outputs * p["sampling"] ** 2 * 8
    return {"fwd": both, "bwd": both}


def providers(case: Case) -> dict[str, Callable[..., Any] | None]:
    """torchvision, where it is installed."""
    return {"torchvision": torchvision_op("ps_roi_align")}


def torch_function(case: Case) -> Callable[..., Any]:
    """The baseline."""
    return by_grid_sample


def by_grid_sample(input: Tensor, boxes: Tensor, bins: int, spatial_scale: float, sampling: int) -> Tensor:
    """ps_roi_align with a fixed number of samples: each image's boxes in one call of torch's sampler."""
    pooled = []
    for image in range(input.shape[0]):
        rows = boxes[boxes[:, 0] == image, 1:] * spatial_scale
        grid, inside = grid_of_samples(rows, input, bins, sampling, True)
        # [bins * bins, K, sampling * sampling, 2]: what each bin reads of its own planes
        by_bin = [t.unflatten(2, (bins, -1)).unflatten(1, (bins, -1)).movedim((1, 3), (0, 1)) for t in (grid, inside)]
        at, mask = (t.flatten(0, 1).flatten(2, 3) for t in by_bin)
        planes = input[image].unflatten(0, (-1, bins * bins)).transpose(0, 1)
        values = F.grid_sample(planes, at, padding_mode="border", align_corners=True) * mask.unsqueeze(1)
        pooled.append(values.mean(3).permute(2, 1, 0).unflatten(2, (bins, bins)))
    return torch.cat(pooled)[boxes[:, 0].argsort(stable=True).argsort()]
