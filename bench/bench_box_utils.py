"""Areas, forms, clipping and size of boxes: many boxes, an image's worth, host cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench._case import Call, Case
from bench.bench_box_iou import boxes

FUNCTION = "box_area"

_BOTH = ("cpu", "cuda")
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
# arguments after the boxes
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "box_area": (),
    "box_convert": ("xyxy", "cxcywh"),
    "clip_boxes_to_image": ((160, 200),),
    "remove_small_boxes": (32.0,),
}


def _cases(count: int, target: dict[str, float] | None = None) -> list[Case]:
    found = []
    for name in _ARGUMENTS:
        small = name == "remove_small_boxes"  # a GPU's result is torch's own, and has no derivative
        devices, modes = (("cpu",), ("fwd",)) if small else (_BOTH, ("fwd", "bwd", "full"))
        targets = {f"{device} fwd": target for device in devices} if target else {}
        found.append(Case(f"{name}-{count}", {"count": count}, devices, modes, targets, function=name))
    return found


CASES = [
    *_cases(100000, {"ratio_to_torch": 1.5}),
    *_cases(1000),
    Case("panel-100000", {"count": 100000}, _BOTH, ("fwd",), function="box_convert", panel=True),
    Case("host-8", {"count": 1}, _BOTH, ("fwd",), _HOST, host=True),
    Case("host-8-grad", {"count": 1}, _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True),
]


def torch_function(case: Case) -> Callable[..., Any]:
    """The usual composition."""
    return composition(case.function or FUNCTION)


def composition(name: str) -> Callable[..., Tensor]:
    """The function of that name in torch's operations."""

    def area(b: Tensor) -> Tensor:
        b = b.float() if b.dtype.itemsize < 4 else b
        return (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])

    def convert(b: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
        x1, y1, x2, y2 = b.unbind(-1)
        return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), -1)

    def clip(b: Tensor, size: tuple[float, float]) -> Tensor:
        x, y = b[:, 0::2].clamp(min=0, max=size[1]), b[:, 1::2].clamp(min=0, max=size[0])
        return torch.stack((x, y), -1).reshape(b.shape)

    def large(b: Tensor, least: float) -> Tensor:
        return torch.where((b[:, 2] - b[:, 0] >= least) & (b[:, 3] - b[:, 1] >= least))[0]

    return {"box_area": area, "box_convert": convert, "clip_boxes_to_image": clip, "remove_small_boxes": large}[name]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    name = case.function or FUNCTION
    b = boxes(case.params["count"], dtype, device, generator)
    return Call((b, *_ARGUMENTS[name]), {}, () if name == "remove_small_boxes" else (b,))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: boxes in, areas, boxes or indices out; bwd: the gradient of that, and the boxes where it depends on them."""
    count, name = case.params["count"], case.function or FUNCTION
    out = {"box_area": max(itemsize, 4), "remove_small_boxes": 8}.get(name, 4 * itemsize)
    saved = 0 if name == "box_convert" else 4 * itemsize
    return {"fwd": (count * (4 * itemsize + out), 4 * count), "bwd": (count * (out + saved + 4 * itemsize), 4 * count)}
