"""group_norm and instance_norm in both layouts: the reference rows of the CPU table, small, large, and host cost.

The baseline of the fused activation is torch's group_norm with the activation behind it, in place where it may be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench._case import Call, Case

FUNCTION = "group_norm"

_BOTH = ("cpu", "cuda")
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}


def _targets(ratio: float) -> dict[str, dict[str, float]]:
    return {"cpu fwd": {"ratio_to_torch": ratio}, "cpu bwd": {"ratio_to_torch": ratio}}


def _group(*shape: int, groups: int = 32, last: bool = False, activation: str | None = None) -> dict[str, Any]:
    return {"shape": shape, "groups": groups, "last": last, "activation": activation}


def _instance(name: str, *shape: int, last: bool = False, **more: Any) -> Case:
    params = _group(*shape, groups=shape[1], last=last)
    return Case(name, params, function="instance_norm", **more)


_GPU = (16, 512, 64, 64)
_TINY = (2, 2, 2, 1)

CASES = [
    Case("16x256x28x28", _group(16, 256, 28, 28), _BOTH, targets=_targets(0.97), panel=True),
    Case("16x256x28x28-cl", _group(16, 256, 28, 28, last=True), _BOTH, targets=_targets(1.1), panel=True),
    Case("silu-4x320x32x32", _group(4, 320, 32, 32, activation="silu"), _BOTH, targets=_targets(0.97)),
    Case("silu-4x320x32x32-cl", _group(4, 320, 32, 32, last=True, activation="silu"), _BOTH, targets=_targets(1.1)),
    Case("relu-16x256x28x28", _group(16, 256, 28, 28, activation="relu"), targets=_targets(0.97)),
    Case("small-1x64x28x28", _group(1, 64, 28, 28), targets=_targets(0.97)),
    Case("small-1x64x28x28-cl", _group(1, 64, 28, 28, last=True), targets=_targets(1.1)),
    Case("7x7-32x512x7x7", _group(32, 512, 7, 7), targets=_targets(0.97)),
    Case("7x7-32x512x7x7-cl", _group(32, 512, 7, 7, last=True), targets=_targets(1.1)),
    Case("rows-256x1024", _group(256, 1024), targets=_targets(0.97)),
    Case("one-group-4x64x56x56", _group(4, 64, 56, 56, groups=1), targets=_targets(0.97)),
    Case("one-group-4x64x56x56-cl", _group(4, 64, 56, 56, groups=1, last=True), targets=_targets(1.1)),
    Case("one-sample-1x128x128x128", _group(1, 128, 128, 128), targets=_targets(0.97)),
    Case("one-sample-1x128x128x128-cl", _group(1, 128, 128, 128, last=True), targets=_targets(1.1)),
    Case("large-8x128x112x112", _group(8, 128, 112, 112), targets=_targets(0.97)),
    Case("large-8x128x112x112-cl", _group(8, 128, 112, 112, last=True), targets=_targets(1.1)),
    Case("volume-2x32x16x40x40", _group(2, 32, 16, 40, 40, groups=8), targets=_targets(0.97)),
    _instance("instance-8x64x56x56", 8, 64, 56, 56, targets=_targets(0.97)),
    _instance("instance-8x64x56x56-cl", 8, 64, 56, 56, last=True, targets=_targets(1.1)),
    _instance("instance-1x3x256x256", 1, 3, 256, 256, targets=_targets(0.97)),
    _instance("instance-1x3x256x256-cl", 1, 3, 256, 256, last=True, targets=_targets(1.1)),
    Case("16x512x64x64", _group(*_GPU), ("cuda",)),
    Case("16x512x64x64-cl", _group(*_GPU, last=True), ("cuda",), targets={"cuda fwd": {"ratio_to_torch": 1.3}}),
    Case("host-8", _group(*_TINY, groups=2), _BOTH, ("fwd",), _HOST, host=True),
    Case("host-8-grad", _group(*_TINY, groups=2), _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal x and parameters near their initial values."""
    shape = case.params["shape"]
    channels = shape[1]

    def normal(*size: int) -> torch.Tensor:
        drawn = torch.randn(*size, generator=generator, device=device).to(dtype)
        return drawn.contiguous(memory_format=torch.channels_last) if case.params["last"] and len(size) == 4 else drawn

    x, weight, bias = normal(*shape), 1 + 0.1 * normal(channels), 0.1 * normal(channels)
    count = x.numel() // channels
    if case.function == "instance_norm":
        return Call((x, None, None, weight, bias), {}, (x, weight, bias), (1, count, count))
    named = {} if case.params["activation"] is None else {"activation": case.params["activation"]}
    return Call((x, case.params["groups"], weight, bias), named, (x, weight, bias), (1, count, count))


def torch_function(case: Case) -> Callable[..., torch.Tensor]:
    """torch's own; the activation behind it, in place."""
    if case.function == "instance_norm":
        return F.instance_norm
    if case.params["activation"] is None:
        return F.group_norm
    behind = {"relu": F.relu, "silu": F.silu}[case.params["activation"]]

    def composed(*arguments: Any, activation: str) -> torch.Tensor:
        y = F.group_norm(*arguments)
        # silu's backward needs its input
        in_place = activation == "relu" or not y.requires_grad
        return behind(y, inplace=in_place)

    return composed


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: dy and x in, dx out; an exponential counts as 10 operations."""
    size = torch.Size(case.params["shape"]).numel()
    more = 12 if case.params["activation"] == "silu" else 0
    return {"fwd": (size * itemsize * 2, size * (7 + more)), "bwd": (size * itemsize * 3, size * (12 + more))}
