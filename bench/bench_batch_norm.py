"""batch_norm and batch_norm_act in both layouts: the reference rows of the CPU table, small, large, and host cost.

The baseline of batch_norm_act is torch's batch_norm with the addition and relu in place, as residual networks write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench._case import Call, Case

FUNCTION = "batch_norm"

_BOTH = ("cpu", "cuda")
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}


def _shape(*shape: int, last: bool = False, training: bool = True, tail: bool = False) -> dict[str, Any]:
    return {"shape": shape, "last": last, "training": training, "tail": tail}


def _tail(name: str, params: dict[str, Any], devices: tuple[str, ...] = ("cpu",), **more: Any) -> Case:
    return Case(name, params | {"tail": True}, devices, function="batch_norm_act", **more)


_STEM = (16, 256, 28, 28)
_GPU_STEM = (128, 64, 112, 112)
_TINY = (2, 2, 2, 1)

CASES = [
    Case(
        "16x256x28x28",
        _shape(*_STEM),
        _BOTH,
        targets={"cpu fwd": {"ratio_to_torch": 2.0}, "cpu bwd": {"ratio_to_torch": 1.0}},
        panel=True,
    ),
    Case(
        "16x256x28x28-cl",
        _shape(*_STEM, last=True),
        _BOTH,
        targets={"cpu fwd": {"ratio_to_torch": 0.97}, "cpu bwd": {"ratio_to_torch": 0.97}},
        panel=True,
    ),
    _tail(
        "eval-add-relu-16x256x28x28",
        _shape(*_STEM, training=False),
        _BOTH,
        modes=("fwd",),
        targets={"cpu fwd": {"ratio_to_torch": 1.5}},
        panel=True,
    ),
    _tail(
        "eval-add-relu-16x256x28x28-cl",
        _shape(*_STEM, last=True, training=False),
        _BOTH,
        modes=("fwd",),
        targets={"cpu fwd": {"ratio_to_torch": 1.4}},
    ),
    _tail("train-add-relu-16x256x28x28", _shape(*_STEM), _BOTH),
    _tail("train-add-relu-16x256x28x28-cl", _shape(*_STEM, last=True), _BOTH),
    Case("eval-16x256x28x28", _shape(*_STEM, training=False)),
    Case("eval-16x256x28x28-cl", _shape(*_STEM, last=True, training=False)),
    Case("small-1x64x28x28", _shape(1, 64, 28, 28)),
    Case("small-1x64x28x28-cl", _shape(1, 64, 28, 28, last=True)),
    Case("7x7-32x512x7x7", _shape(32, 512, 7, 7)),
    Case("7x7-32x512x7x7-cl", _shape(32, 512, 7, 7, last=True)),
    Case("few-channels-16x3x128x128", _shape(16, 3, 128, 128)),
    Case("few-channels-16x3x128x128-cl", _shape(16, 3, 128, 128, last=True)),
    Case("rows-4096x512", _shape(4096, 512)),
    Case("volume-2x32x16x40x40", _shape(2, 32, 16, 40, 40)),
    Case("large-16x64x112x112", _shape(16, 64, 112, 112)),
    Case("large-16x64x112x112-cl", _shape(16, 64, 112, 112, last=True)),
    Case("128x64x112x112", _shape(*_GPU_STEM), ("cuda",), targets={"cuda fwd": {"ratio_to_torch": 1.5}}, panel=True),
    Case(
        "128x64x112x112-cl",
        _shape(*_GPU_STEM, last=True),
        ("cuda",),
        targets={"cuda fwd": {"ratio_to_torch": 1.2}},
        panel=True,
    ),
    _tail("add-relu-128x64x112x112", _shape(*_GPU_STEM), ("cuda",), targets={"cuda fwd": {"ratio_to_torch": 1.6}}),
    Case("host-8", _shape(*_TINY, training=False), _BOTH, ("fwd",), _HOST, host=True),
    Case("host-8-grad", _shape(*_TINY, training=False), _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True),
    Case("host-8-train", _shape(*_TINY), _BOTH, ("fwd",), host=True),
    Case("host-8-train-grad", _shape(*_TINY), _BOTH, ("fwd",), grad=True, host=True),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal x, parameters near their initial values, and running statistics, which a training call updates."""
    shape = case.params["shape"]
    channels, count = shape[1], torch.Size(shape).numel() // shape[1]

    def normal(*size: int) -> torch.Tensor:
        drawn = torch.randn(*size, generator=generator, device=device).to(dtype)
        return drawn.contiguous(memory_format=torch.channels_last) if case.params["last"] and len(size) == 4 else drawn

    x, weight, bias = normal(*shape), 1 + 0.1 * normal(channels), 0.1 * normal(channels)
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    arguments = (x, mean, var, weight, bias, case.params["training"], 0.1, 1e-5)
    if not case.params["tail"]:
        return Call(arguments, {}, (x, weight, bias), (1, count, count))
    residual = normal(*shape)
    return Call(
        arguments, {"residual": residual, "activation": "relu"}, (x, weight, bias, residual), (1, count, count, 1)
    )


def torch_function(case: Case) -> Callable[..., torch.Tensor]:
    """torch's batch_norm; the tail in place."""
    if not case.params["tail"]:
        return F.batch_norm

    def composed(*arguments: Any, residual: torch.Tensor, activation: str) -> torch.Tensor:
        return F.relu(F.batch_norm(*arguments).add_(residual), inplace=True)

    return composed


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x (and residual) in, y out; bwd: dy and x in, dx (and dresidual) out; a bit per element for relu."""
    size = torch.Size(case.params["shape"]).numel()
    tail = case.params["tail"]
    bits = size // 8 if tail else 0
    return {
        "fwd": (size * itemsize * (3 if tail else 2) + bits, size * (6 if case.params["training"] else 2)),
        "bwd": (size * itemsize * (4 if tail else 3) + bits, size * 9),
    }
