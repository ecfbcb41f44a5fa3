"""max_pool over one to three dimensions: the reference rows of the CPU table, small and large cases, host cost."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "max_pool2d"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_GPU = {"cuda fwd": {"ratio_to_torch": 1.8, "ratio_to_compile": 1.0}, "cuda bwd": {"ratio_to_torch": 1.5}}
_CALL = "autograd.Function adds about 8 us to the 6 us of the operator with offsets; a busy processor doubles both"
_NEAR = "the gather reads dy and offsets once for each of up to four windows; 1.47 to 1.69 from run to run"


def _shape(*shape: int, channels_last: bool = False, window: tuple[int, ...] = (3, 2, 1)) -> dict[str, Any]:
    return {"shape": shape, "channels_last": channels_last, "window": window}


_ADAPTIVE: dict[str, Any] = {"function": "adaptive_max_pool2d"}
_TINY = _shape(1, 2, 2, 2, window=(2, 2, 0))

CASES = [
    Case(
        "16x256x28x28",
        _shape(16, 256, 28, 28),
        devices=("cpu", "cuda"),
        targets={"cpu fwd": {"ratio_to_torch": 8.0}, "cpu bwd": {"ratio_to_torch": 1.0}},
        panel=True,
    ),
    Case(
        "16x256x28x28-cl",
        _shape(16, 256, 28, 28, channels_last=True),
        devices=("cpu", "cuda"),
        targets={"cpu fwd": {"ratio_to_torch": 1.3}, "cpu bwd": {"ratio_to_torch": 1.5}},
        panel=True,
        why_missed={"cpu bwd": _NEAR},
    ),
    Case("small-1x64x56x56", _shape(1, 64, 56, 56)),
    Case("small-1x64x56x56-cl", _shape(1, 64, 56, 56, channels_last=True)),
    Case("k2s2-16x128x28x28", _shape(16, 128, 28, 28, window=(2, 2, 0))),
    Case("large-16x64x112x112", _shape(16, 64, 112, 112)),
    Case("large-16x64x112x112-cl", _shape(16, 64, 112, 112, channels_last=True)),
    Case("1d-k2s2-32x64x4000", _shape(32, 64, 4000, window=(2, 2, 0)), function="max_pool1d"),
    Case("1d-k3s2-8x80x3000", _shape(8, 80, 3000), function="max_pool1d"),
    Case("3d-k2s2-2x32x16x56x56", _shape(2, 32, 16, 56, 56, window=(2, 2, 0)), function="max_pool3d"),
    Case("3d-k3s1-2x16x8x28x28", _shape(2, 16, 8, 28, 28, window=(3, 1, 1)), function="max_pool3d"),
    Case("3d-k3s2-2x32x16x28x28-cl", _shape(2, 32, 16, 28, 28, channels_last=True), function="max_pool3d"),
    Case("adaptive1-64x512x7x7", _shape(64, 512, 7, 7, window=(1,)), **_ADAPTIVE),
    Case("adaptive1-64x512x7x7-cl", _shape(64, 512, 7, 7, channels_last=True, window=(1,)), **_ADAPTIVE),
    Case("adaptive7-16x256x30x30", _shape(16, 256, 30, 30, window=(7,)), **_ADAPTIVE),
    Case("1d-adaptive1-16x256x1000", _shape(16, 256, 1000, window=(1,)), function="adaptive_max_pool1d"),
    Case("128x64x112x112", _shape(128, 64, 112, 112), devices=("cuda",), targets=_GPU, panel=True),
    Case("128x64x112x112-cl", _shape(128, 64, 112, 112, channels_last=True), ("cuda",), targets=_GPU, panel=True),
    Case("host-8", _TINY, ("cpu", "cuda"), ("fwd",), _HOST, host=True, why_missed={"cpu fwd": _CALL}),
    Case(
        "host-8-grad", _TINY, ("cpu", "cuda"), ("fwd",), _HOST_GRAD, grad=True, host=True, why_missed={"cpu fwd": _CALL}
    ),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal x; in bf16 many windows hold ties, whose first maximum must win."""
    x = torch.randn(*case.params["shape"], generator=generator, device=device).to(dtype)
    if case.params["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return Call((x, *case.params["window"]), {}, (x,), (4,))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: dy and a one-byte offset in, dx out; one comparison per tap, one addition per window."""
    shape, window = case.params["shape"], case.params["window"]
    size, planes, dims = math.prod(shape), shape[0] * shape[1], len(shape) - 2
    if len(window) == 1:
        windows, taps = planes * window[0] ** dims, size
    else:
        kernel, stride, padding = window
        windows = planes * math.prod((n + 2 * padding - kernel) // stride + 1 for n in shape[2:])
        taps = windows * kernel**dims
    return {
        "fwd": ((size + windows) * itemsize, taps),
        "bwd": ((size + windows) * itemsize + windows, windows),
    }
