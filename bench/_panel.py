"""A short panel "where pydl pays on this machine": ratios to torch measured now, losses shown too."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench import _case, _harness, _report, _timing

_HEADERS = ("op", "case", "mode", "runs on", "pydl ms", "torch ms", "torch / pydl", "")


def where_pydl_pays(seconds: float = 10.0, device: str | None = None, show: bool = True) -> list[dict[str, Any]]:
    """Measures a few cases of every op against torch.

    Args:
        seconds: time for the whole panel; past one and a half times this, which a busy machine reaches, no further
            case is started (forwards come first).
        device: "cpu" or "cuda"; the GPU where there is one.
        show: print the table.

    Returns:
        pydl's rows in the benchmark's format; `ratio_to_torch` above 1 means that pydl is faster.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bf16" if device == "cuda" else "fp32"
    plan = [
        _harness.Group(op, case, device, dtype, mode)
        for mode in ("fwd", "bwd")
        for op in _case.discover()
        for case in _case.select(op, device)
        if case.panel and mode in case.modes
    ]
    clock = _timing.GpuClock() if device == "cuda" else None
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    with _report.progress(len(plan), show) as step:
        for group in plan:
            if rows and time.monotonic() - started > 1.5 * seconds:
                break
            step(f"{group.op} {group.case.name} {group.mode}")
            rows += _harness.measure(group, ["pydl", "torch"], {}, 0.5 * seconds / max(len(plan), 1), (), clock)
    if show:
        print(table(rows, device), flush=True)
        if len(rows) < 2 * len(plan):
            print(f"{len(plan) - len(rows) // 2} of {len(plan)} rows were left out: the time was used up")
    return [row for row in rows if row["provider"] == "pydl"]


def table(rows: list[dict[str, Any]], device: str) -> str:
    """The panel as text."""
    theirs = {_key(row): row for row in rows if row["provider"] == "torch"}
    lines = []
    for row in rows:
        if row["provider"] != "pydl":
            continue
        known = [row["op"], row["case"], row["mode"], row["backend"] or "-"]
        if row["median_ms"] is None:
            lines.append([*known, "-", "-", "-", row["note"] or "not measured"])
            continue
        ratio = row["ratio_to_torch"]
        torch_ms = theirs[_key(row)]["median_ms"]
        lines.append([*known, f"{row['median_ms']:.3f}", f"{torch_ms:.3f}", f"{ratio:.2f}", _verdict(row, ratio)])
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    title = f"Where pydl pays on this machine ({device}, {threads}; measured now)"
    return f"{title}\n{_report.plain_table(_HEADERS, lines)}"


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["op"], row["case"], row["mode"]


def _verdict(row: dict[str, Any], ratio: float) -> str:
    if _report.is_noisy(row):
        return "disturbed by other work"
    if row["backend"] == "torch":
        return "torch is called"
    return "pydl wins" if ratio > 1.05 else "even" if ratio >= 0.95 else "torch wins"
