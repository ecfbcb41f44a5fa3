"""What a bench_<op>.py supplies, and how those files are found.

A bench file is named after its op and defines

    FUNCTION     name in pydl.ops and torch.nn.functional (a case may name another one)
    CASES        list of Case
    inputs(case, dtype, device, generator) -> Call
    work(case, itemsize) -> {"fwd": (bytes, flops), "bwd": (bytes, flops)}     compulsory traffic and arithmetic
    providers(case) -> {name: callable or None}      optional: specialist libraries; None says "not installed"
    torch_function(case) -> callable     optional: the baseline where torch.nn.functional has no such op, a composition
                                         of torch's or NumPy's functions; it stands as "torch" in the rows

A result may be a tuple; gradients are those of its first member, and integer members are compared exactly. `wrt` is
empty for an op without a derivative, and its cases have modes=("fwd",).

Everything else (timing, correctness, roofline, reports) is the harness's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MODES = ("fwd", "bwd", "full")
TARGET_METRICS = ("ratio_to_torch", "ratio_to_compile", "roof_share", "host_us")


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    targets maps "<device> <mode>" to {metric: bound}; metrics are TARGET_METRICS, where host_us is an upper bound and
    the others are lower bounds. `grad` makes the forward record a graph (the host cost "with gradient"); `host` marks a
    case so small that its time is the host's cost of a call; `panel` puts it into the ten-second panel. `why_missed`
    says, by "<device> <mode>", what a missed target comes from; it becomes the row's note.
    """

    name: str
    params: dict[str, Any]
    devices: tuple[str, ...] = ("cpu",)
    modes: tuple[str, ...] = MODES
    targets: dict[str, dict[str, float]] = field(default_factory=dict)
    function: str | None = None
    grad: bool = False
    host: bool = False
    panel: bool = False
    why_missed: dict[str, str] = field(default_factory=dict)

    def target(self, device: str, mode: str, dtype: str) -> dict[str, float]:
        """Targets of a row; they are stated for fp32 on CPU and bf16 on a GPU, other types carry none."""
        stated = {"cpu": "fp32", "cuda": "bf16"}[device]
        if self.host:
            stated = dtype
        return dict(self.targets.get(f"{device} {mode}", {})) if dtype == stated else {}


@dataclass
class Call:
    """Arguments of one call by the op's public signature; `wrt` are the tensors gradients are taken for.

    `reduced` gives, by the index in wrt, over how many terms that gradient sums (rule 2's floor grows with its root).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wrt: tuple[torch.Tensor, ...]
    reduced: tuple[int, ...] = ()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """The same call with every tensor replaced by change(tensor), each distinct tensor once."""
        seen: dict[int, torch.Tensor] = {}

        def swap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in seen:
                seen[id(value)] = change(value)
            return seen[id(value)]

        args = tuple(swap(a) for a in self.args)
        kwargs = {k: swap(v) for k, v in self.kwargs.items()}
        return Call(args, kwargs, tuple(swap(w) for w in self.wrt), self.reduced)


def discover(folder: Path | None = None) -> list[str]:
    """Names of the ops that have a bench file, by file name."""
    folder = folder or Path(__file__).resolve().parent
    return sorted(p.stem.removeprefix("bench_") for p in folder.glob("bench_*.py"))


def load(op: str) -> ModuleType:
    """Imports bench/bench_<op>.py."""
    if op not in discover():
        raise ValueError(f"no bench file for {op!r}; there are: {', '.join(discover())}")
    return importlib.import_module(f"bench.bench_{op}")


def select(op: str, device: str, names: list[str] | None = None) -> list[Case]:
    """Cases of an op on a device, those with a target first; `names` keeps cases that contain one of them."""
    cases = [c for c in load(op).CASES if device in c.devices]
    if names:
        cases = [c for c in cases if any(n in c.name for n in names)]
    return sorted(cases, key=lambda c: not any(k.startswith(f"{device} ") for k in c.targets))


def make_call(op: str, case: Case, dtype: str, device: str, seed: int = 0) -> Call:
    """Inputs of a case, the same for the same seed in every process."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return load(op).inputs(case, DTYPES[dtype], device, generator)


def work(op: str, case: Case, dtype: str, mode: str) -> tuple[int, int]:
    """(bytes, flops) that a row must at least move and do."""
    table = load(op).work(case, DTYPES[dtype].itemsize)
    modes = ("fwd", "bwd") if mode == "full" else (mode,)
    return sum(int(table[m][0]) for m in modes), sum(int(table[m][1]) for m in modes)
