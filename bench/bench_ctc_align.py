"""Forced alignment against the same search in torch operations, one frame of the whole batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "ctc_forced_align"


def _shape(t: int, n: int, c: int, s: int) -> dict[str, Any]:
    return {"t": t, "n": n, "c": c, "s": s}


_BOTH = ("cpu", "cuda")
_FWD = ("fwd",)
_TINY = _shape(4, 1, 2, 1)
_HOST = {"cpu fwd": {"host_us": 12.0}, "cuda fwd": {"host_us": 30.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 20.0}, "cuda fwd": {"host_us": 40.0}}

CASES = [
    Case(
        "T400-N32-C64-S60",
        _shape(400, 32, 64, 60),
        _BOTH,
        _FWD,
        {"cpu fwd": {"ratio_to_torch": 20.0}, "cuda fwd": {"ratio_to_torch": 20.0}},
        panel=True,
    ),
    Case("small-T50-N1-C30-S10", _shape(50, 1, 30, 10), _BOTH, _FWD),
    Case("T1000-N1-C5000-S120", _shape(1000, 1, 5000, 120), _BOTH, _FWD),
    Case("long-T4000-N2-C32-S600", _shape(4000, 2, 32, 600), _BOTH, _FWD),
    Case("host-8", _TINY, _BOTH, _FWD, _HOST, host=True),
    Case("host-8-grad", _TINY, _BOTH, _FWD, _HOST_GRAD, grad=True, host=True),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Log-probabilities in steps of 1/16, so that sums are exact and every implementation finds the same path."""
    p = case.params
    x = (2 * torch.randn(p["t"], p["n"], p["c"], generator=generator, device=device)).log_softmax(-1)
    x = (x * 16).round().clamp(-255, -1) / 16
    targets = torch.randint(1, p["c"], (p["n"], p["s"]), generator=generator, device=device)
    lengths = (torch.full((p["n"],), p[name], device=device) for name in ("t", "s"))
    return Call((x.to(dtype), targets, *lengths), {}, ())


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """One class per state in, one class and score per frame out; four comparisons and additions per state."""
    p = case.params
    frames = p["t"] * p["n"]
    return {"fwd": (frames * ((p["s"] + 1) * itemsize + 12), frames * (2 * p["s"] + 1) * 4), "bwd": (0, 0)}


def torch_function(case: Case) -> Callable[..., Any]:
    """Torch has no such op: pydl's own fallback, a loop over frames of torch operations on [N, 2 S + 1]."""
    import pydl

    def align(*args: Any) -> Any:
        with pydl.backend("torch"):
            return pydl.ops.ctc_forced_align(*args)

    return align
