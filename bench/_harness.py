"""Measures providers of an op against each other: check, warm up, interleave, summarise.

A group is one case, dtype and mode; its providers take turns round by round in a rotated order, so that a drift of the
machine meets all of them alike. A provider whose result is wrong is reported and not timed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from bench import _case, _gate, _providers, _stats, _timing
from bench._case import Call, Case
from bench._gate import Gate, Verdict
from bench._providers import Provider, Unavailable

GPU_BATCH = 8


@dataclass(frozen=True)
class Group:
    """What is measured together."""

    op: str
    case: Case
    device: str
    dtype: str
    mode: str


@dataclass(frozen=True)
class Facts:
    """What is known of a provider besides its times."""

    backend: str | None = None
    reason: str = ""
    host_us: float | None = None
    launches: int | None = None
    syncs: int | None = None


class Subject(Protocol):
    """One provider on one group, in this process or another."""

    name: str

    def check(self) -> Verdict: ...
    def prepare(self) -> Facts: ...
    def sample(self) -> list[float]: ...
    def disturbed(self) -> int: ...
    def close(self) -> None: ...


def needs_gradients(group: Group) -> bool:
    return group.mode != "fwd"


def make_inputs(group: Group) -> Call:
    """Inputs of a group; tensors want gradients where the mode or the case needs them."""
    call = _case.make_call(group.op, group.case, group.dtype, group.device)
    for tensor in call.wrt:
        tensor.requires_grad_(needs_gradients(group) or group.case.grad)
    return call


def make_gate(group: Group) -> Gate:
    """The gate of a group, with fresh inputs."""
    function, reference = (
        _providers.function_name(group.op, group.case),
        _providers.torch_function(group.op, group.case),
    )
    return Gate(function, reference, make_inputs(group), needs_gradients(group))


def first(result: Any) -> torch.Tensor:
    """The output that is differentiated."""
    return result[0] if isinstance(result, tuple) else result


def make_runner(group: Group, fn: Callable[..., Any], call: Call) -> Callable[[], object]:
    """The call that is timed: the forward, the backward alone on a graph made once, or both."""
    args, kwargs, wrt = call.args, call.kwargs, call.wrt
    if group.mode == "fwd":
        return lambda: fn(*args, **kwargs)
    y = first(fn(*args, **kwargs))
    dy = _gate.upstream(y)
    if group.mode == "bwd":
        return lambda: torch.autograd.grad(y, wrt, dy, retain_graph=True)
    return lambda: torch.autograd.grad(first(fn(*args, **kwargs)), wrt, dy)


class LocalSubject:
    """A provider in this process."""

    def __init__(
        self,
        group: Group,
        provider: Provider,
        gate: Gate,
        clock: _timing.GpuClock | None = None,
        patience_ms: float = _timing.PATIENCE_MS,
    ) -> None:
        self._patience_ms = patience_ms
        self.name, self.group, self.provider, self.gate, self.clock = provider.name, group, provider, gate, clock
        self._run: Callable[[], object] = lambda: None
        self._inner, self._host_ms, self._disturbed = 1, 0.05, 0

    @contextlib.contextmanager
    def _scope(self) -> Iterator[None]:
        grad = self.group.mode != "fwd" or self.group.case.grad
        with self.provider.scope(), torch.set_grad_enabled(grad):
            yield

    def check(self) -> Verdict:
        try:
            with self.provider.scope():
                return self.gate.check(self.provider.fn, poison=self.name != "compile")
        except Exception as failure:
            return Verdict(False, None, f"{type(failure).__name__}: {failure}")

    def _start(self) -> None:
        self._run = make_runner(self.group, self.provider.fn, self.gate.call)
        self._run()

    def prepare(self) -> Facts:
        phase = {"fwd": "forward", "bwd": "backward", "full": None}[self.group.mode]
        with self._scope():
            backend, reason = _providers.backend_of(self.provider, self._start, phase)
            run = self._run
            if self.clock is None:
                self._inner = _timing.calibrate(run)
                return Facts(backend, reason)
            for _ in range(5):
                run()
            host_us = self.clock.host_us(run)
            self._host_ms = host_us * 1e-3
            return Facts(backend, reason, host_us, _timing.count_launches(run), _timing.count_syncs(run))

    def sample(self) -> list[float]:
        with self._scope():
            if self.clock is not None:
                return self.clock.batch(self._run, GPU_BATCH, self._host_ms)
            ms, disturbed = _timing.undisturbed_sample(self._run, self._inner, self._patience_ms)
            self._disturbed += disturbed
            return [ms]

    def disturbed(self) -> int:
        """Samples taken while other work held a core that this process wanted."""
        return self._disturbed

    def close(self) -> None:
        self._run = lambda: None


@dataclass
class Series:
    """Samples of one provider, and one number per round for the ratios."""

    samples: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)


def interleave(subjects: Sequence[Subject], seconds: float, warm_rounds: int = 2) -> list[Series]:
    """Rounds in which every subject is sampled once, as many as bench._stats.another_round allows in the time."""
    series = [Series() for _ in subjects]
    with _timing.quiet():
        for _ in range(warm_rounds):
            for subject in subjects:
                subject.sample()
        started, number = time.perf_counter(), 0
        while _stats.another_round(number, time.perf_counter() - started, seconds):
            for i in _stats.turn_order(len(subjects), number):
                taken = subjects[i].sample()
                series[i].samples += taken
                series[i].rounds.append(_stats.median(taken))
            number += 1
    return series


def measure(
    group: Group,
    providers: Sequence[str],
    roof: dict[str, float],
    seconds: float = 0.5,
    extra: Sequence[Callable[[Group], Subject]] = (),
    clock: _timing.GpuClock | None = None,
) -> list[dict[str, Any]]:
    """Rows of one group.

    Args:
        group: case, device, dtype, mode.
        providers: names as in bench._providers.
        roof: what bench._timing.roofline measured; {} leaves roof_share empty.
        seconds: time for the rounds of all providers together.
        extra: makers of further subjects, such as another commit's pydl in its own process.
        clock: the GPU clock; None on a CPU.
    """
    try:
        gate = make_gate(group)
    except RuntimeError as failure:  # such as a device whose memory is too small for the case
        note = f"the reference failed: {type(failure).__name__}: {str(failure)[:160]}"
        return [_blank(group, name) | {"note": note, "missing": True} for name in providers]

    def local(name: str) -> Callable[[Group], Subject]:
        patience_ms = max(_timing.PATIENCE_MS, 1e3 * seconds / 14)  # two of seven rounds' share for one sample
        resolve = partial(_providers.resolve, name)
        return lambda group: LocalSubject(group, resolve(group.op, group.case), gate, clock, patience_ms)

    rows, subjects, facts = [], [], []
    for name, make in [*((name, local(name)) for name in providers), *(("base", maker) for maker in extra)]:
        row = _blank(group, name)
        rows.append(row)
        admitted = _admit(group, make, row, gate)
        if admitted:
            subjects.append(admitted[0])
            facts.append((row, admitted[1]))
    if subjects:
        _fill(group, facts, interleave(subjects, seconds), roof)
    for subject, (row, _) in zip(subjects, facts, strict=True):
        row["disturbed"] = subject.disturbed()
        subject.close()
    _leave_open(rows)
    return rows


def _leave_open(rows: Sequence[dict[str, Any]]) -> None:
    """A ratio with a side of which most samples were disturbed decides no target, in neither direction."""
    shaken = {row["provider"] for row in rows if row.get("disturbed", 0) > row.get("samples", 0) / 2}
    for row in rows:
        sides = {row["provider"], *(metric.removeprefix("ratio_to_") for metric in row["target"])}
        if row["target"] and sides & shaken:
            row["met"] = None


def _admit(
    group: Group, make: Callable[[Group], Subject], row: dict[str, Any], gate: Gate
) -> tuple[Subject, Facts] | None:
    """The subject, ready to be sampled, when it is there and right; its row says what it is otherwise."""
    try:
        subject = make(group)
        row["provider"] = subject.name
        verdict = subject.check()
        row.update(ok=verdict.ok, max_err=verdict.max_err, note=verdict.note, oracle=gate.source)
        return (subject, subject.prepare()) if verdict.ok else None
    except Unavailable as reason:
        row.update(ok=False, note=str(reason), missing=True)
    except Exception as failure:  # one provider's failure must not cost the others their rows
        row.update(ok=False, note=f"{type(failure).__name__}: {str(failure)[:160]}")
    return None


def _blank(group: Group, name: str) -> dict[str, Any]:
    bytes_, flops = _case.work(group.op, group.case, group.dtype, group.mode)
    empty = ("backend", "median_ms", "p10_ms", "p90_ms", "ratio_to_torch", "roof_share", "host_us", "launches", "syncs")
    row: dict[str, Any] = {"op": group.op, "case": group.case.name, "device": group.device, "dtype": group.dtype}
    row |= {"mode": group.mode, "provider": name, **dict.fromkeys(empty), "max_err": None, "ok": False}
    return row | {"bytes": bytes_, "flops": flops, "target": {}, "met": None, "note": ""}


def _fill(
    group: Group, facts: Sequence[tuple[dict[str, Any], Facts]], series: Sequence[Series], roof: dict[str, float]
) -> None:
    """Writes times, ratios, roof share and targets into the rows."""
    by_name = {row["provider"]: s for (row, _), s in zip(facts, series, strict=True)}
    for (row, fact), own in zip(facts, series, strict=True):
        middle = _stats.median(own.samples)
        ratios = {n: round(_stats.pair_ratio(s.rounds, own.rounds), 4) for n, s in by_name.items() if s is not own}
        host_us = middle * 1e3 if group.case.host and group.device == "cpu" else fact.host_us
        row.update(
            backend=fact.backend,
            reason=fact.reason,
            median_ms=middle,
            min_ms=min(own.samples),
            p10_ms=_stats.quantile(own.samples, 0.1),
            p90_ms=_stats.quantile(own.samples, 0.9),
            ratio_to_torch=1.0 if row["provider"] == "torch" else ratios.get("torch"),
            ratios=ratios,
            roof_share=None if group.case.host else share_of_roof(row["bytes"], row["flops"], middle, roof),
            gbs=row["bytes"] / middle * 1e-6,
            host_us=host_us,
            launches=fact.launches,
            syncs=fact.syncs,
            samples=len(own.samples),
        )
        if row["provider"] == "pydl":
            row["target"] = group.case.target(group.device, group.mode, group.dtype)
            row["met"] = target_met(row)
            if row["met"] is False:
                row["note"] = group.case.why_missed.get(f"{group.device} {group.mode}", "")


def share_of_roof(bytes_: int, flops: int, ms: float, roof: dict[str, float]) -> float | None:
    """Time at the nearer roof over the time taken."""
    if not roof or ms <= 0:
        return None
    floor_ms = max(bytes_ / roof["copy_gbs"], flops / roof["gemm_gflops"]) * 1e-6
    return floor_ms / ms


def target_met(row: dict[str, Any]) -> bool | None:
    """Whether every measured target of a row is reached; None without a target or without its measurement."""
    answers = []
    for metric, limit in row["target"].items():
        value = row["ratios"].get("compile") if metric == "ratio_to_compile" else row[metric]
        if value is not None:
            answers.append(value <= limit if metric == "host_us" else value >= limit)
    return all(answers) if answers else None
