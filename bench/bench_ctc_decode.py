"""Greedy decoding against a composition of torch operations, beam search against the same search in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "ctc_greedy_decode"


def _shape(t: int, n: int, c: int, beam_width: int = 0) -> dict[str, Any]:
    return {"t": t, "n": n, "c": c, "beam_width": beam_width}


_BOTH = ("cpu", "cuda")
_FWD = ("fwd",)
_TINY = _shape(4, 1, 2)
_HOST = {"cpu fwd": {"host_us": 10.0}, "cuda fwd": {"host_us": 30.0}}
_BEAM = "ctc_beam_search"

CASES = [
    Case(
        "greedy-T400-N32-C64",
        _shape(400, 32, 64),
        _BOTH,
        _FWD,
        {"cpu fwd": {"ratio_to_torch": 4.0}, "cuda fwd": {"ratio_to_torch": 3.0}},
        panel=True,
    ),
    Case("greedy-T1000-N1-C5000", _shape(1000, 1, 5000), _BOTH, _FWD),
    Case("greedy-T400-N32-C1024", _shape(400, 32, 1024), _BOTH, _FWD),
    Case(
        "beam16-T200-N2-C32",
        _shape(200, 2, 32, 16),
        ("cpu",),
        _FWD,
        {"cpu fwd": {"ratio_to_torch": 50.0}},
        function=_BEAM,
    ),
    Case("beam16-T50-N1-C1000", _shape(50, 1, 1000, 16), ("cpu",), _FWD, function=_BEAM),
    Case("beam100-T100-N2-C32", _shape(100, 2, 32, 100), ("cpu",), _FWD, function=_BEAM),
    Case("host-8", _TINY, _BOTH, _FWD, _HOST, host=True),
    Case("host-8-grad", _TINY, _BOTH, _FWD, _HOST, grad=True, host=True),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Log-probabilities of normal logits with a deviation of 3: some frames are sure, others are not."""
    p = case.params
    x = (3 * torch.randn(p["t"], p["n"], p["c"], generator=generator, device=device)).log_softmax(-1).to(dtype)
    return Call((x,), {"beam_width": p["beam_width"]} if p["beam_width"] else {}, ())


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """log_probs in, labels out; one comparison per class, in a beam one addition per class and prefix."""
    p = case.params
    frames = p["t"] * p["n"]
    return {"fwd": (frames * (p["c"] * itemsize + 8), frames * p["c"] * max(p["beam_width"], 1)), "bwd": (0, 0)}


def torch_function(case: Case) -> Callable[..., Any]:
    """Torch has no such op: pydl's own fallbacks, argmax and a scatter, or a dictionary of prefixes in Python."""
    import pydl

    def decode(*args: Any, **kwargs: Any) -> Any:
        with pydl.backend("torch"):
            return getattr(pydl.ops, case.function or FUNCTION)(*args, **kwargs)

    return decode
