"""roi_align of 7 x 7 and 14 x 14 bins in both layouts, as a detector's heads call it: small, large, and host cost.

The baseline is torch's own sampler: F.grid_sample over all points of an image's boxes, then avg_pool2d over those of a
bin. It takes a fixed number of samples only; the adaptive case stands beside pydl's composition of torch's functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._case import Call, Case
from bench._roi import grid_of_samples, proposals, torchvision_op

FUNCTION = "roi_align"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_CALL = {"cpu fwd": "boxes are a second tensor to be checked and converted, and their plans are made first"}
_GPU = {"cuda fwd": {"ratio_to_torch": 1.5}, "cuda bwd": {"ratio_to_torch": 1.5}}
_CPU = {"cpu fwd": {"ratio_to_torch": 4.0}, "cpu bwd": {"ratio_to_torch": 4.0}}


def _shape(*shape: int, boxes: int, sides: tuple[int, int], bins: int = 7, **rest: Any) -> dict[str, Any]:
    return {"shape": shape, "boxes": boxes, "sides": sides, "bins": bins, "sampling": 2, "last": False} | rest


_MEDIUM = _shape(2, 256, 50, 68, boxes=256, sides=(6, 24))
_LARGE = _shape(1, 256, 200, 272, boxes=1000, sides=(6, 30))
_TINY = _shape(1, 2, 2, 2, boxes=1, sides=(1, 2), bins=2)
_BOTH = ("cpu", "cuda")

CASES = [
    Case("256x256x7x7", _MEDIUM, _BOTH, targets=_CPU, panel=True),
    Case("256x256x7x7-cl", {**_MEDIUM, "last": True}, _BOTH, targets=_CPU, panel=True),
    Case("small-16x256x7x7", {**_MEDIUM, "boxes": 16}, _BOTH),
    Case("mask-64x256x14x14", {**_MEDIUM, "boxes": 64, "bins": 14}, _BOTH),
    Case("adaptive-32x64x7x7", _shape(2, 64, 50, 68, boxes=32, sides=(6, 40), sampling=-1), _BOTH),
    Case("large-1000x256x7x7", _LARGE, ("cuda",), targets=_GPU, panel=True),
    Case("large-1000x256x7x7-cl", {**_LARGE, "last": True}, ("cuda",), targets=_GPU, panel=True),
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
    crowd = max(1, int(p["boxes"] * p["sides"][1] ** 2 / (n * h * w)))  # bins over a pixel
    return Call((x, boxes, p["bins"], 1.0, p["sampling"]), {}, (x,), (4 * crowd,))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: dy in, dx out; eight operations for each sample of a bin."""
    p = case.params
    n, c, h, w = p["shape"]
    outputs = p["boxes"] * c * p["bins"] ** 2
    both = (n * c * h * w + outputs) * itemsize, outputs * max(p["sampling"], 2) ** 2 * 8
    return {"fwd": both, "bwd": both}


def providers(case: Case) -> dict[str, Callable[..., Any] | None]:
    """torchvision, where it is installed."""
    return {"torchvision": torchvision_op("roi_align")}


def torch_function(case: Case) -> Callable[..., Any]:
    """The baseline of a case."""
    if case.params["sampling"] > 0:
        return by_grid_sample
    from pydl.ops._roi_torch import roi_align

    return roi_align


def by_grid_sample(input: Tensor, boxes: Tensor, bins: int, spatial_scale: float, sampling: int) -> Tensor:
    """roi_align without `aligned`, a fixed number of samples: each image's boxes in one call of torch's sampler."""
    pooled = []
    for image in range(input.shape[0]):
        rows = boxes[boxes[:, 0] == image, 1:] * spatial_scale
        grid, inside = grid_of_samples(rows, input, bins, sampling, False)
        grid = grid.reshape(1, -1, bins * sampling, 2)
        part = input[image : image + 1]
        values = F.grid_sample(part, grid, padding_mode="border", align_corners=True)
        values = values * inside.reshape(1, 1, -1, bins * sampling)
        pooled.append(F.avg_pool2d(values, sampling)[0].unflatten(1, (-1, bins)).transpose(0, 1))
    return torch.cat(pooled)[boxes[:, 0].argsort(stable=True).argsort()]
