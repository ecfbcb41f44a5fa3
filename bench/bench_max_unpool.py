"""max_unpool of what max_pool found, over one to three dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "max_unpool2d"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_BOTH = ("cpu", "cuda")
_CALL = {"cpu fwd": "three arguments of the pooling are checked, and two tensors go through the dispatcher"}


def _shape(*shape: int, last: bool = False) -> dict[str, Any]:
    return {"shape": shape, "last": last}


_TINY = _shape(1, 2, 2, 2)

CASES = [
    Case("16x128x28x28", _shape(16, 128, 28, 28), _BOTH, targets={"cpu fwd": {"ratio_to_torch": 0.97}}, panel=True),
    Case("16x128x28x28-cl", _shape(16, 128, 28, 28, last=True), _BOTH),
    Case("1d-8x64x4000", _shape(8, 64, 4000), function="max_unpool1d"),
    Case("3d-2x32x8x28x28", _shape(2, 32, 8, 28, 28), function="max_unpool3d"),
    Case("host-8", _TINY, _BOTH, ("fwd",), _HOST, host=True, why_missed=_CALL),
    Case("host-8-grad", _TINY, _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True, why_missed=_CALL),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Maxima of normal values and their indices; the shape is that before pooling by two."""
    x = torch.randn(*case.params["shape"], generator=generator, device=device).to(dtype)
    if case.params["last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    pool = getattr(torch.nn.functional, f"max_pool{x.dim() - 2}d")
    y, indices = pool(x, 2, return_indices=True)
    return Call((y, indices, 2), {}, (y,))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x and indices in, y out; bwd: indices and as many gradients in, dx out; one comparison per index."""
    outputs = math.prod(case.params["shape"])
    inputs = outputs // 2 ** (len(case.params["shape"]) - 2)
    return {"fwd": (inputs * (itemsize + 8) + outputs * itemsize, inputs), "bwd": (inputs * (2 * itemsize + 8), inputs)}
