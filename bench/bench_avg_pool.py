"""avg_pool over one to three dimensions: the reference rows of the CPU table, windows of common models, host cost."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "avg_pool2d"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_GPU = {"cuda fwd": {"ratio_to_torch": 1.8, "ratio_to_compile": 1.0}}
_BOTH = ("cpu", "cuda")
_CALL = {"cpu fwd": "the arguments are checked and their list converted on the way through the dispatcher"}


def _shape(*shape: int, window: tuple[int, int, int] = (3, 2, 1), last: bool = False) -> dict[str, Any]:
    return {"shape": shape, "window": window, "last": last}


def _parts(*shape: int, size: int = 1, last: bool = False) -> dict[str, Any]:
    return {"shape": shape, "size": size, "last": last}


_TINY = _shape(1, 2, 2, 2, window=(2, 2, 0))

CASES = [
    Case(
        "16x256x28x28",
        _shape(16, 256, 28, 28),
        _BOTH,
        targets={"cpu fwd": {"ratio_to_torch": 4.0}, "cpu bwd": {"ratio_to_torch": 0.97}},
        panel=True,
    ),
    Case(
        "16x256x28x28-cl",
        _shape(16, 256, 28, 28, last=True),
        _BOTH,
        targets={"cpu fwd": {"ratio_to_torch": 0.97}, "cpu bwd": {"ratio_to_torch": 0.97}},
        panel=True,
    ),
    Case("small-1x64x56x56", _shape(1, 64, 56, 56)),
    Case("small-1x64x56x56-cl", _shape(1, 64, 56, 56, last=True)),
    Case("k2s2-16x128x28x28", _shape(16, 128, 28, 28, window=(2, 2, 0))),
    Case("k2s2-16x128x28x28-cl", _shape(16, 128, 28, 28, window=(2, 2, 0), last=True)),
    Case("k3s1-16x192x35x35", _shape(16, 192, 35, 35, window=(3, 1, 1))),
    Case("k8s8-16x64x56x56", _shape(16, 64, 56, 56, window=(8, 8, 0))),
    Case("k7-64x512x7x7", _shape(64, 512, 7, 7, window=(7, 7, 0))),
    Case("k7-64x512x7x7-cl", _shape(64, 512, 7, 7, window=(7, 7, 0), last=True)),
    Case("large-16x64x112x112", _shape(16, 64, 112, 112)),
    Case("large-16x64x112x112-cl", _shape(16, 64, 112, 112, last=True)),
    Case("1d-k2s2-32x64x4000", _shape(32, 64, 4000, window=(2, 2, 0)), function="avg_pool1d"),
    Case("1d-k25s1-8x8x4000", _shape(8, 8, 4000, window=(25, 1, 12)), function="avg_pool1d"),
    Case("1d-k4s4-8x80x3000", _shape(8, 80, 3000, window=(4, 4, 0)), function="avg_pool1d"),
    Case("3d-k2s2-2x32x16x56x56", _shape(2, 32, 16, 56, 56, window=(2, 2, 0)), function="avg_pool3d"),
    Case("3d-k3s1-2x16x8x28x28", _shape(2, 16, 8, 28, 28, window=(3, 1, 1)), function="avg_pool3d"),
    Case("3d-k3s2-2x32x16x28x28-cl", _shape(2, 32, 16, 28, 28, last=True), function="avg_pool3d"),
    Case("adaptive1-64x512x7x7", _parts(64, 512, 7, 7), _BOTH, function="adaptive_avg_pool2d"),
    Case("adaptive1-64x512x7x7-cl", _parts(64, 512, 7, 7, last=True), _BOTH, function="adaptive_avg_pool2d"),
    Case("adaptive7-16x256x30x30", _parts(16, 256, 30, 30, size=7), function="adaptive_avg_pool2d"),
    Case("adaptive7-16x256x30x30-cl", _parts(16, 256, 30, 30, size=7, last=True), function="adaptive_avg_pool2d"),
    Case("1d-adaptive1-16x256x1000", _parts(16, 256, 1000), function="adaptive_avg_pool1d"),
    Case("3d-adaptive1-4x256x8x7x7", _parts(4, 256, 8, 7, 7), function="adaptive_avg_pool3d"),
    Case("128x64x112x112", _shape(128, 64, 112, 112), ("cuda",), targets=_GPU, panel=True),
    Case("128x64x112x112-cl", _shape(128, 64, 112, 112, last=True), ("cuda",), targets=_GPU, panel=True),
    Case("host-8", _TINY, _BOTH, ("fwd",), _HOST, host=True, why_missed=_CALL),
    Case("host-8-grad", _TINY, _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True, why_missed=_CALL),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal x."""
    x = torch.randn(*case.params["shape"], generator=generator, device=device).to(dtype)
    if case.params["last"]:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    window = (case.params["size"],) if "size" in case.params else case.params["window"]
    return Call((x, *window), {}, (x,), (4,))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: dy in, dx out; one addition per tap."""
    shape = case.params["shape"]
    if "size" in case.params:
        windows, taps = shape[0] * shape[1] * case.params["size"] ** (len(shape) - 2), math.prod(shape)
    else:
        kernel, stride, padding = case.params["window"]
        windows = shape[0] * shape[1] * math.prod((n + 2 * padding - kernel) // stride + 1 for n in shape[2:])
        taps = windows * kernel ** (len(shape) - 2)
    traffic = (math.prod(shape) + windows) * itemsize
    return {"fwd": (traffic, taps), "bwd": (traffic, taps)}
