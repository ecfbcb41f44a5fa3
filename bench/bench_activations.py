"""Activations: at the memory floor in torch already. On a CPU pydl calls torch and must cost nothing; on a GPU it must
not be slower."""

from __future__ import annotations

from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "relu"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_FLOPS = {"relu": 1, "leaky_relu": 2, "sigmoid": 12, "tanh": 12, "gelu": 20, "silu": 14}


def _case(function: str, size: int, name: str, devices: tuple[str, ...], **options: Any) -> Case:
    label = f"{function}-{options['approximate']}" if "approximate" in options else function
    even = {f"{device} {mode}": {"ratio_to_torch": 0.97} for device in devices for mode in ("fwd", "bwd")}
    params = {"size": size, "options": options}
    called = "torch's own kernel runs on both sides: pydl adds about 1 us to a call, the rest is noise of the machine"
    return Case(
        f"{label}-{name}",
        params,
        devices,
        targets=even,
        function=function,
        panel=label == "gelu" and size > 1 << 20,
        why_missed={"cpu fwd": called, "cpu bwd": called},
    )


CASES = [
    *(_case(f, 4096 * 1024, "4096x1024", ("cpu",)) for f in ("relu", "gelu", "silu")),
    *(_case(f, 16384 * 4096, "16384x4096", ("cuda",)) for f in _FLOPS),
    _case("gelu", 16384 * 4096, "16384x4096", ("cuda",), approximate="tanh"),
    _case("gelu", 256 * 512, "small-256x512", ("cpu", "cuda")),
    Case("host-8", {"size": 8, "options": {}}, ("cpu", "cuda"), ("fwd",), _HOST, host=True),
    Case("host-8-grad", {"size": 8, "options": {}}, ("cpu", "cuda"), ("fwd",), _HOST_GRAD, grad=True, host=True),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal x."""
    x = torch.randn(case.params["size"], generator=generator, device=device).to(dtype)
    return Call((x,), dict(case.params["options"]), (x,))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: dy and one saved tensor in, dx out."""
    n, flops = case.params["size"], _FLOPS[case.function or FUNCTION]
    return {"fwd": (2 * n * itemsize, flops * n), "bwd": (3 * n * itemsize, flops * n)}
