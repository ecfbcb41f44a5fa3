"""``python -m pydl kernels``: compile every Triton kernel ahead of time and print what each one costs.

No GPU is needed. Spills are not allowed on sm_80 and sm_90; elsewhere they may not exceed the committed table
``docs/kernel_spills.json``, which has a part for each version of Triton. Shared memory must fit the part everywhere.
CUDA C++ kernels, compiled when the library is built, are printed too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata as metadata
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydl._aot_compile import PARTS, compile_case, enumerate_cases, load_cache

_ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = (_ROOT / "csrc").is_dir()
TABLE = _ROOT / "docs" / "kernel_spills.json"
NO_SPILLS = ("sm_80", "sm_90")
# the architecture of which a quick run compiles every case
FULL_ARCH = "sm_90"
COLUMNS = ("kernel", "case", "arch", "warps", "registers", "spills", "shared", "occupancy")


def cache_folder() -> Path:
    """Where results are kept: PYDL_CACHE_DIR, the checkout's .cache, or the user's cache."""
    chosen = os.environ.get("PYDL_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if CHECKOUT and os.access(_ROOT, os.W_OK):
        return _ROOT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pydl"


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes that compile instead of interpreting; spawned ones take the environment of this moment."""
    with tempfile.TemporaryDirectory(prefix="pydl-kernels-") as folder:
        # only the figures are kept, not the binaries
        changed = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        before = {name: os.environ.get(name) for name in changed}
        _set_environment(changed)
        try:
            with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
                yield pool
        finally:
            _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def run(archs: list[str], quick: bool, jobs: int, match: str = "", progress: bool = False) -> list[dict[str, Any]]:
    """Compile the cases (or take their cached results) and return one row for each.

    Args:
        archs: names in PARTS.
        quick: compile only the quick cases, except on FULL_ARCH.
        jobs: processes.
        match: keep the rows whose kernel or case contains this.
        progress: count compilations on stderr.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / "kernel_resources.json"
    results = load_cache(path)
    with _workers(jobs) as pool:
        rows = [row for part in pool.map(enumerate_cases, archs) for row in part]
        rows = [row for row in rows if not quick or row["quick"] or row["arch"] == FULL_ARCH]
        rows = [row for row in rows if match in f"{row['kernel']} {row['case']}"]
        missing = [row for row in rows if row["key"] not in results]
        futures = {pool.submit(compile_case, r["module"], r["arch"], r["index"]): r["key"] for r in missing}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                results[futures[future]] = future.result()
                if progress:
                    print(
                        f"\rcompiled {done} of {len(futures)}",
                        end="\n" if done == len(futures) else "",
                        file=sys.stderr,
                    )
        finally:
            for future in futures:
                future.cancel()
            _store(path, results)
    return [row | results[row["key"]] for row in rows]


def _store(path: Path, results: dict[str, Any]) -> None:
    # errors are not kept, and another run may have added to the file meanwhile
    kept = load_cache(path) | {key: row for key, row in results.items() if "error" not in row}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(kept))
    temporary.replace(path)


def spill_key(row: dict[str, Any]) -> str:
    """The name of a row in the committed table."""
    return f"{row['kernel']} {row['case']}"


def problems(rows: list[dict[str, Any]], allowed: dict[str, dict[str, int]]) -> list[str]:
    """What is wrong with the rows: cases that do not compile, too much shared memory, spills beyond the table."""
    found = []
    for row in rows:
        name, arch = spill_key(row), row["arch"]
        if "error" in row:
            found.append(f"{arch} {name}: {row['error']}")
            continue
        limit = 0 if arch in NO_SPILLS else allowed.get(arch, {}).get(name, 0)
        if row["spills"] > limit:
            found.append(f"{arch} {name}: {row['spills']} bytes spilled, {limit} allowed")
        if row["shared"] > PARTS[arch].shared_block:
            found.append(f"{arch} {name}: {row['shared']} bytes of shared memory, {PARTS[arch].shared_block} available")
    return found


def triton_series() -> str:
    """Triton's major and minor version, the key of the committed table."""
    return ".".join(metadata.version("triton").split(".")[:2])


def load_table(series: str) -> dict[str, dict[str, int]]:
    """The committed spills under one version of Triton, by architecture and case; empty where there is no table."""
    return json.loads(TABLE.read_text()).get(series, {}) if TABLE.exists() else {}


def spill_table(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The table that these rows would commit: spilling cases only, without the parts that may not spill."""
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.get("spills") and row["arch"] not in NO_SPILLS:
            table.setdefault(row["arch"], {})[spill_key(row)] = row["spills"]
    return {arch: dict(sorted(cases.items())) for arch, cases in sorted(table.items())}


def _write_table(rows: list[dict[str, Any]]) -> None:
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    tables[triton_series()] = spill_table(rows)
    TABLE.write_text(json.dumps(dict(sorted(tables.items())), indent=1) + "\n")


def _format(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    def text(row: dict[str, Any], column: str) -> str:
        value = row.get(column, "-")
        return f"{value:.0%}" if column == "occupancy" and value != "-" else str(value)

    cells = [list(columns)] + [[text(row, column) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = [column in ("kernel", "case", "arch") for column in columns]
    lines = (
        "  ".join(
            cell.ljust(width) if on_left else cell.rjust(width) for cell, width, on_left in zip(line, widths, left)
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _native_rows(archs: list[str], match: str) -> list[dict[str, Any]]:
    """What ptxas reported when the CUDA C++ kernels were built; nothing without the extension."""
    try:
        rows = importlib.import_module("pydl._C").kernel_resources()
    except (ImportError, AttributeError):
        return []
    rows = [row | {"arch": f"sm_{row['arch']}"} for row in rows]
    return [row for row in rows if row["arch"] in archs and match in row["kernel"]]


def native_problems(rows: list[dict[str, Any]]) -> list[str]:
    """Spills of CUDA C++ kernels on the parts where none are allowed."""
    spilling = [row for row in rows if row["spill_stores"] and row["arch"] in NO_SPILLS]
    return [f"{row['arch']} {row['kernel']}: {row['spill_stores']} bytes spilled, 0 allowed" for row in spilling]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pydl kernels", description=__doc__)
    parser.add_argument("--arch", action="append", choices=sorted(PARTS), help="compile for this one (may be repeated)")
    parser.add_argument("--all", action="store_true", help="every case for every architecture (the default is sm_90)")
    parser.add_argument("--quick", action="store_true", help=f"every kernel for each arch, every case for {FULL_ARCH}")
    parser.add_argument("--match", default="", help="only kernels or cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument(
        "--write-table",
        action="store_true",
        help=f"write {TABLE.name} from these rows, for this version of Triton (with --all)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 when a check fails, 2 without Triton."""
    args = _arguments(argv)
    if importlib.util.find_spec("triton") is None:
        print("pydl kernels: Triton is not installed: pip install 'triton>=3.6'", file=sys.stderr)
        return 2
    archs = args.arch or (list(PARTS) if args.all or args.quick else [FULL_ARCH])
    rows = run(archs, args.quick, args.jobs, args.match, progress=sys.stderr.isatty())
    print(_format(rows, COLUMNS))
    native = _native_rows(archs, args.match)
    if native:
        print("\nCUDA C++ (ptxas)\n" + _format(native, tuple(native[0])))
    if args.json:
        kept = ("module", "arch", "kernel", "case", *COLUMNS[3:], "error")
        report = [{name: row[name] for name in kept if name in row} for row in rows]
        args.json.write_text(json.dumps({"triton": report, "cuda": native}, indent=1) + "\n")
    if args.write_table:
        _write_table(rows)
    found = problems(rows, load_table(triton_series())) + native_problems(native)
    print(f"\n{len(rows)} compilations, {len(found)} problems")
    for problem in found:
        print(f"  {problem}")
    return 1 if found else 0
