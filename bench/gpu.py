"""Everything that needs a GPU, in one command: builds, runs the tests marked gpu, runs every benchmark.

    python bench/gpu.py --out results            build for the GPU of this machine, test, measure
    python bench/gpu.py --out results --carried  the libraries in pydl/_lib were built elsewhere: load them as they are

Needs torch with CUDA, triton, ninja, pybind11 and pytest; installs nothing and uses no network. Parts run one after
the other in processes of their own, each within its share of --seconds, and each writes its file as it goes, so that a
run that is cut off keeps what it has: summary.json (state of every part), build.json, tests.json, bench.json. A part
that fails is recorded with its output and the next one runs; the exit code is then 1, and 2 when there is no GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEST_WORKERS = 4
# the largest share of the whole time that a part may end at
BUILD_UNTIL, TESTS_UNTIL = 0.35, 0.6


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code, None when its time was used up, and what it printed."""

    code: int | None
    output: str

    @property
    def tail(self) -> str:
        return self.output[-3000:]


@dataclass
class Run:
    """State of the whole run; `left` is the time a part may still use."""

    out: Path
    seconds: float
    carried: bool = False
    started: float = field(default_factory=time.monotonic)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def left(self, until: float = 1.0) -> float:
        return self.started + self.seconds * until - time.monotonic()

    def write(self, name: str, content: Any) -> None:
        """Writes a JSON file in one step."""
        partial = self.out / f".{name}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.out / name)


def execute(command: Sequence[str], seconds: float, **environment: str) -> Outcome:
    """Runs a process group in the checkout; when time is up it is interrupted, then killed."""
    if seconds <= 1:
        return Outcome(None, "no time left for this step")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    for wait, signal_number in ((seconds, signal.SIGINT), (8, signal.SIGKILL)):
        try:
            output, _ = process.communicate(timeout=wait)
            return Outcome(process.returncode if signal_number == signal.SIGINT else None, output)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal_number)
    output, _ = process.communicate()
    return Outcome(None, output)


PROBE = """
import json, torch
from bench._env import environment
from pydl._library import cpu_library, cuda_library
states = {}
for name, load in (("cpu", cpu_library), ("cuda", cuda_library)):
    library = load()
    states[name] = {"loaded": library.loaded, "reason": library.reason}
print("PROBE" + json.dumps({"libraries": states, "environment": environment("cuda")}))
"""


def part_build(run: Run) -> dict[str, Any]:
    """Builds in place for the GPU that is here, or takes the carried libraries; then loads them in a fresh process."""
    found: dict[str, Any] = {"carried": run.carried}
    if not run.carried:
        started = time.monotonic()
        archs = execute([sys.executable, "-c", _ARCH], 60).output.strip().splitlines()
        done = execute(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            run.left(BUILD_UNTIL),
            PYDL_CUDA_ARCHS=archs[-1] if archs else "9.0",
        )
        found |= {"archs": archs[-1:], "seconds": round(time.monotonic() - started, 1), "code": done.code}
        if done.code != 0:
            found["error"] = done.tail
    found["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
        for path in sorted((ROOT / "pydl/_lib").glob("*"))
        if path.is_file()
    }
    probe = execute([sys.executable, "-c", PROBE], min(90, run.left(BUILD_UNTIL)))
    line = next((text for text in probe.output.splitlines() if text.startswith("PROBE")), "")
    found |= json.loads(line.removeprefix("PROBE")) if line else {"error": found.get("error", "") + probe.tail}
    not_loaded = {k: v["reason"] for k, v in found.get("libraries", {}).items() if not v["loaded"]}
    if not_loaded:
        found["error"] = found.get("error", "") + f" not loaded: {not_loaded}"
    found["info"] = execute([sys.executable, "-m", "pydl", "info"], min(60, run.left(BUILD_UNTIL))).tail
    run.write("build.json", found)
    return {"ok": "error" not in found, "summary": ", ".join(found.get("files", {})), "error": found.get("error", "")}


_ARCH = "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))"


def collect_tests(seconds: float) -> tuple[list[str], str]:
    """Test files with tests marked gpu, and the output when collecting failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    done = execute(command, seconds)
    files = {line.split("::")[0] for line in done.output.splitlines() if "::" in line and line.startswith("tests/")}
    return sorted(files), "" if done.code in (0, 5) else done.tail


def parse_junit(text: str) -> list[dict[str, Any]]:
    """Test cases of a junit file: name, outcome, seconds, and the message of a failure."""
    found = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = {"failure": "failed", "error": "error", "skipped": "skipped"}[child.tag]
                message = f"{child.get('message', '')}\n{(child.text or '')[-1500:]}".strip()
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        found.append({"name": name, "outcome": outcome, "seconds": float(case.get("time", 0)), "message": message})
    return found


def run_test_file(path: str, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Cases of one file, and the end of its output when it did not run to its end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            path,
        ]
        done = execute(command, seconds)
        cases = parse_junit(report.read_text()) if report.exists() else []
    return cases, "" if done.code in (0, 1, 5) else f"{path}: code {done.code}\n{done.tail}"


def count_outcomes(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Outcomes per backend that a test's name carries, and for all tests."""
    counts: dict[str, Counter[str]] = {"all": Counter(), "cuda": Counter(), "triton": Counter()}
    for case in cases:
        counts["all"][case["outcome"]] += 1
        parameters = case["name"].partition("[")[2]  # such as triton-cuda-fp32: backend, device, ...
        backend = next((name for name in ("triton", "cuda") if name in parameters), None)
        if backend:
            counts[backend][case["outcome"]] += 1
    return {name: dict(count) for name, count in counts.items()}


def part_tests(run: Run) -> dict[str, Any]:
    """Tests marked gpu, file by file in processes of their own: one that breaks the CUDA context breaks no other."""
    files, problem = collect_tests(min(90, run.left(TESTS_UNTIL)))
    problems = [problem] if problem else []
    cases: list[dict[str, Any]] = []

    def save() -> dict[str, dict[str, int]]:
        counts = count_outcomes(cases)
        kept = [c for c in cases if c["outcome"] != "passed"] + [
            {k: v for k, v in c.items() if k != "message"} for c in cases if c["outcome"] == "passed"
        ]
        run.write("tests.json", {"files": files, "counts": counts, "problems": problems, "cases": kept})
        return counts

    with concurrent.futures.ThreadPoolExecutor(TEST_WORKERS) as pool:
        waiting = [pool.submit(lambda f: run_test_file(f, run.left(TESTS_UNTIL)), f) for f in files]
        for done in concurrent.futures.as_completed(waiting):
            found, problem = done.result()
            cases += found
            problems += [problem] if problem else []
            save()
    counts = save()
    bad = [c["name"] for c in cases if c["outcome"] in ("failed", "error")]
    error = "; ".join([*(f"failed: {name}" for name in bad[:20]), *problems])
    return {
        "ok": not error and bool(cases),
        "summary": json.dumps(counts),
        "error": error or ("" if cases else "no tests"),
    }


def part_bench(run: Run) -> dict[str, Any]:
    """Every bench file in a process of its own; rows are merged into one file as each ends."""
    sys.path.insert(0, str(ROOT))
    from bench._case import discover

    merged: dict[str, Any] = {"schema": 1, "environment": None, "rows": []}
    errors = []
    ops = discover()
    for i, op in enumerate(ops):
        share = (run.left() - 5) / (len(ops) - i)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "rows.json"
            command = [sys.executable, "bench/run.py", op, "--device", "cuda", "--dtype", "bf16,fp32"]
            options = ["--seconds", "0.3", "--budget", f"{max(share - 25, 5):.0f}", "--json", str(target)]
            done = execute([*command, *options], share)
            if target.exists():
                document = json.loads(target.read_text())
                merged["environment"] = _merge_environment(merged["environment"], document["environment"])
                merged["rows"] += document["rows"]
        if done.code != 0:
            errors.append(f"{op}: code {done.code}\n{done.tail}")
        print(f"bench {op}: {len(merged['rows'])} rows so far, {run.left():.0f} s left", flush=True)
        run.write("bench.json", merged)
    missed = sum(row["met"] is False for row in merged["rows"])
    summary = f"{len(merged['rows'])} rows, {missed} targets missed"
    return {"ok": not errors, "summary": summary, "error": "\n".join(errors)}


def _merge_environment(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """The record of the first process, with what later ones skipped added."""
    if first is None:
        return second
    skipped = [*first.get("skipped", []), *second.get("skipped", [])]
    return {**first, "clocks_after": second.get("clocks_after", {}), **({"skipped": skipped} if skipped else {})}


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {"build": part_build, "tests": part_tests, "bench": part_bench}


def run_parts(run: Run, parts: dict[str, Callable[[Run], dict[str, Any]]]) -> int:
    """Runs the parts in order, records each, and goes on after a failure; 1 when any failed."""
    for name, part in parts.items():
        started = time.monotonic()
        try:
            result = part(run)
        except Exception as failure:  # whatever a part runs into, the others still run
            result = {"ok": False, "summary": "", "error": f"{type(failure).__name__}: {failure}"}
        result["seconds"] = round(time.monotonic() - started, 1)
        run.parts[name] = result
        run.write("summary.json", {"parts": run.parts, "seconds": round(run.seconds - run.left(), 1)})
        state = "ok" if result["ok"] else "FAILED"
        print(f"{name}: {state} in {result['seconds']} s: {result['summary']}", flush=True)
        if result["error"]:
            print(result["error"][-1500:], flush=True)
    return int(not all(result["ok"] for result in run.parts.values()))


def missing_gpu() -> str:
    """Why nothing can be run here; empty when a GPU is there."""
    try:
        import torch
    except ImportError as failure:
        return f"torch cannot be imported: {failure}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--carried", action="store_true", help="use the libraries that are in pydl/_lib already")
    parser.add_argument("--seconds", type=float, default=510, help="time for everything")
    parser.add_argument("--part", help=f"comma-separated parts to run, of {', '.join(PARTS)}; default: all")
    args = parser.parse_args(arguments)
    reason = missing_gpu()
    if reason:
        print(f"bench/gpu.py: no GPU to run on: {reason}", file=sys.stderr)
        return 2
    wanted = args.part.split(",") if args.part else list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--part: unknown part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    return run_parts(Run(args.out.resolve(), args.seconds, args.carried), {name: PARTS[name] for name in wanted})


if __name__ == "__main__":
    sys.exit(main())
