"""Tables of rows and progress: rich where it is installed and the output is a terminal, plain text otherwise."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HEADERS = (
    "op", "case", "dtype", "mode", "provider", "backend", "median ms", "p10-p90", "x torch", "roof", "host us",
    "launches", "syncs", "max err", "target",
)  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def target_text(row: dict[str, Any]) -> str:
    """The row's targets and whether they are met."""
    names = {"ratio_to_torch": "x torch", "ratio_to_compile": "x compile", "roof_share": "roof", "host_us": "us"}
    stated = ", ".join(f"{'<=' if m == 'host_us' else '>='} {v:g} {names[m]}" for m, v in row.get("target", {}).items())
    if not stated:
        return ""
    return (
        f"{stated}: {({True: 'met', False: 'MISSED', None: 'not decided'})[row['met']]}{'~' if is_noisy(row) else ''}"
    )


def cells(row: dict[str, Any]) -> list[str]:
    """The row as the table shows it."""
    head = [row["op"], row["case"], row["dtype"], row["mode"], row["provider"]]
    if row["median_ms"] is None:
        state = "not available" if row.get("missing") else "WRONG, not timed"
        return [*head, state, *["-"] * 7, number(row["max_err"], 2), row.get("note", "")]
    share = row["roof_share"]
    return [
        *head,
        row["backend"] or "-",
        f"{row['median_ms']:.4g}{'~' if is_noisy(row) else ''}",
        f"{row['p10_ms']:.3g}-{row['p90_ms']:.3g}",
        "-" if row["ratio_to_torch"] is None else f"{row['ratio_to_torch']:.2f}",
        "-" if share is None else f"{share:.0%}",
        number(row["host_us"]),
        "-" if row["launches"] is None else str(row["launches"]),
        "-" if row["syncs"] is None else str(row["syncs"]),
        number(row["max_err"], 2),
        target_text(row),
    ]


def plain_table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces; columns that are empty everywhere are left out."""
    keep = [i for i in range(len(headers)) if any(line[i] not in ("", "-") for line in lines)]
    rows = [[str(line[i]) for i in keep] for line in (headers, *lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(keep))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def fancy(stream: Any = None) -> bool:
    """Whether rich can be used on this stream."""
    stream = stream or sys.stdout
    return bool(stream.isatty()) and importlib.util.find_spec("rich") is not None


def _style(row: dict[str, Any]) -> str | None:
    if not row["ok"] and not row.get("missing"):
        return "red"
    return {True: "green", False: "yellow", None: None}[row.get("met")]


def show(rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """Prints rows as a table."""
    lines = [cells(row) for row in rows]
    if not fancy():
        print(*([title] if title else []), plain_table(HEADERS, lines), sep="\n", flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    keep = [i for i in range(len(HEADERS)) if any(line[i] not in ("", "-") for line in lines)]
    table = Table(title=title or None)
    for i in keep:
        table.add_column(HEADERS[i], justify="right" if 6 <= i <= 13 else "left", overflow="fold")
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*(line[i] for i in keep), style=_style(row))
    Console().print(table)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line: targets met and missed, wrong providers; misses are named."""
    met = sum(row.get("met") is True for row in rows)
    missed = [row for row in rows if row.get("met") is False]
    wrong = [row for row in rows if not row["ok"] and not row.get("missing")]
    undecided = sum(bool(row.get("target")) and row["median_ms"] is not None and row["met"] is None for row in rows)
    text = f"targets: {met} met, {len(missed)} missed"
    text += f", {undecided} not decided" if undecided else ""
    text += f"; wrong results: {len(wrong)}"
    for row in missed:
        text += f"\n  missed  {_where(row)}: {_measured(row)} ({target_text(row)})"
        text += f"\n          {row['note']}" if row["note"] else ""
    for row in wrong:
        text += f"\n  wrong   {_where(row)} {row['provider']}: {row['note']}"
    noisy = sum(is_noisy(row) for row in rows)
    return text + (
        f"\n~ {noisy} rows were disturbed: p90 above twice p10, or cores held by other work" if noisy else ""
    )


def _where(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['case']} {row['dtype']} {row['mode']}"


def is_noisy(row: dict[str, Any]) -> bool:
    """Whether the spread of a row, or the number of disturbed samples, is so large that its ratio means little."""
    if row["median_ms"] is None:
        return False
    return row["p90_ms"] > 2 * row["p10_ms"] or row.get("disturbed", 0) > row["samples"] / 2


def _measured(row: dict[str, Any]) -> str:
    values = {**row, "ratio_to_compile": row.get("ratios", {}).get("compile")}
    return ", ".join(f"{metric} {number(values[metric])}" for metric in row["target"])


@contextlib.contextmanager
def progress(total: int, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """Gives step(text), called before each unit of work; silent without a terminal."""
    if not enabled or not fancy(sys.stderr) or not total:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        done = -1

        def step(text: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=text)

        yield step
