"""local_response_norm over five channels in both layouts: rows of the CPU table, small, large, host cost."""

from __future__ import annotations

from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "local_response_norm"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_CPU = {"cpu fwd": {"ratio_to_torch": 15.0}}
_GPU = {"cuda fwd": {"ratio_to_torch": 4.0}}


def _shape(*shape: int, channels_last: bool = False, beta: float = 0.75) -> dict[str, Any]:
    return {"shape": shape, "channels_last": channels_last, "beta": beta}


CASES = [
    Case("16x256x28x28", _shape(16, 256, 28, 28), ("cpu", "cuda"), targets=_CPU, panel=True),
    Case("16x256x28x28-cl", _shape(16, 256, 28, 28, channels_last=True), ("cpu", "cuda"), targets=_CPU, panel=True),
    Case("beta 0.6-16x256x28x28", _shape(16, 256, 28, 28, beta=0.6)),
    Case("small-1x96x27x27", _shape(1, 96, 27, 27)),
    Case("small-1x96x27x27-cl", _shape(1, 96, 27, 27, channels_last=True)),
    Case("large-16x96x55x55", _shape(16, 96, 55, 55)),
    Case("128x96x55x55", _shape(128, 96, 55, 55), ("cuda",), targets=_GPU, panel=True),
    Case("128x96x55x55-cl", _shape(128, 96, 55, 55, channels_last=True), ("cuda",), targets=_GPU, panel=True),
    Case("host-8", _shape(1, 2, 2, 2), ("cpu", "cuda"), ("fwd",), _HOST, host=True),
    Case("host-8-grad", _shape(1, 2, 2, 2), ("cpu", "cuda"), ("fwd",), _HOST_GRAD, grad=True, host=True),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal x and AlexNet's numbers but for alpha, which is large enough to be seen in the result."""
    x = torch.randn(*case.params["shape"], generator=generator, device=device).to(dtype)
    if case.params["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    return Call((x, 5, 0.1, case.params["beta"], 2.0), {}, (x,), (5,))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: dy and x in, dx out; five multiply-adds per sum and the power."""
    size = 1
    for n in case.params["shape"]:
        size *= n
    return {"fwd": (2 * size * itemsize, 20 * size), "bwd": (3 * size * itemsize, 40 * size)}
