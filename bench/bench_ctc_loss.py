"""ctc_loss: the reference rows of both tables, small and long inputs, logits, concatenated targets, host cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench._case import Call, Case

FUNCTION = "ctc_loss"


def _shape(t: int, n: int, c: int, s: int, flat: bool = False) -> dict[str, Any]:
    return {"t": t, "n": n, "c": c, "s": s, "flat": flat}


_BOTH = ("cpu", "cuda")
_MODES = ("fwd", "full")
_TINY = _shape(4, 1, 2, 1)
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_CALL = (
    "four tensors are checked and nine arguments pass the dispatcher; torch's own call takes 12 us on the same machine"
)

CASES = [
    Case(
        "T400-N32-C64-S60",
        _shape(400, 32, 64, 60),
        _BOTH,
        _MODES,
        {"cpu fwd": {"ratio_to_torch": 5.0}, "cpu full": {"ratio_to_torch": 8.0}},
        panel=True,
    ),
    Case(
        "T1000-N1-C5000-S120",
        _shape(1000, 1, 5000, 120),
        _BOTH,
        _MODES,
        {"cpu full": {"ratio_to_torch": 8.0}},
    ),
    Case(
        "T1024-N32-C128-S96",
        _shape(1024, 32, 128, 96),
        _BOTH,
        _MODES,
        {"cuda fwd": {"ratio_to_torch": 10.0}, "cuda full": {"ratio_to_torch": 10.0}},
        panel=True,
    ),
    Case("small-T50-N1-C30-S10", _shape(50, 1, 30, 10), _BOTH, _MODES),
    Case("flat-T400-N32-C64-S60", _shape(400, 32, 64, 60, flat=True), _BOTH, _MODES),
    Case("long-T4000-N2-C32-S600", _shape(4000, 2, 32, 600), _BOTH, _MODES),
    Case("logits-T400-N32-C64-S60", _shape(400, 32, 64, 60), _BOTH, _MODES, function="ctc_loss_from_logits"),
    Case("logits-T1000-N1-C5000-S120", _shape(1000, 1, 5000, 120), _BOTH, _MODES, function="ctc_loss_from_logits"),
    Case("host-8", _TINY, _BOTH, ("fwd",), _HOST, host=True, why_missed={"cpu fwd": _CALL}),
    Case("host-8-grad", _TINY, _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True, why_missed={"cpu fwd": _CALL}),
]


def torch_function(case: Case) -> Callable[..., Any]:
    """Torch's op, which takes no half precision: then in float32, as its users do; logits through log_softmax."""

    def loss(x: torch.Tensor, *args: Any) -> torch.Tensor:
        wide = x if x.dtype.itemsize >= 4 else x.float()
        return F.ctc_loss(wide.log_softmax(-1) if case.function else wide, *args)

    return loss


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Full lengths, as tensors on the device; log-probabilities of normal logits, rounded to the dtype."""
    p = case.params
    x = torch.randn(p["t"], p["n"], p["c"], generator=generator, device=device)
    x = (x if case.function else x.log_softmax(-1)).to(dtype)
    targets = torch.randint(1, p["c"], (p["n"], p["s"]), generator=generator, device=device)
    frames, lengths = (torch.full((p["n"],), p[k], device=device) for k in ("t", "s"))
    return Call((x, targets.flatten() if p["flat"] else targets, frames, lengths), {}, (x,), (p["t"],))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: of x what the labels and the blank select (all of it with logits); bwd: x in, dx out.

    Each of T N (2 S + 1) states costs about 20 operations in each direction.
    """
    t, n, c, s = (case.params[k] for k in "tncs")
    states = t * n * (2 * s + 1)
    read = t * n * (c if case.function else min(c, s + 1))
    return {"fwd": (read * itemsize, 40 * states), "bwd": (2 * t * n * c * itemsize, 5 * t * n * c)}
