"""`pydl.verify(fn, op=...)` and `python -m pydl verify`: any implementation of an op, graded against the oracle."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydl._grading import Grade, grade
from pydl._problems import DIFFERENCE_ERR, Problem, poisoned_memory, problems, same_bits
from pydl.reference import Spec, spec, specs

CHECKS = ("values", "gradients", "second", "re-run", "inputs")
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
BACKENDS = ("cpu", "cuda", "triton", "torch", "simt")
RERUNS = 3


@dataclass(frozen=True)
class Row:
    """One comparison: what was checked, on which case, and its grade."""

    dtype: str
    check: str
    case: str
    grade: Grade


@dataclass
class Report:
    """All comparisons of one function; iterable, true when everything passed, printed as a table."""

    op: str
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every comparison passed."""
        return bool(self.rows) and all(row.grade.ok for row in self.rows)

    @property
    def failures(self) -> list[Row]:
        """The comparisons that did not pass."""
        return [row for row in self.rows if not row.grade.ok]

    def __bool__(self) -> bool:
        return self.ok

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def worst(self, dtype: str, check: str) -> Row | None:
        """The comparison that came closest to its bound, or broke it most."""
        rows = [row for row in self.rows if (row.dtype, row.check) == (dtype, check)]
        return max(rows, key=_severity, default=None)

    def __str__(self) -> str:
        head = ("dtype", "check", "passed", "worst error", "torch's", "bound", "worst case")
        table: list[tuple[str, ...]] = [head]
        for dtype in dict.fromkeys(row.dtype for row in self.rows):
            for check in CHECKS:
                rows = [row for row in self.rows if (row.dtype, row.check) == (dtype, check)]
                worst = self.worst(dtype, check)
                if worst is not None:
                    passed = f"{sum(row.grade.ok for row in rows)}/{len(rows)}"
                    g = worst.grade
                    table.append((dtype, check, passed, *map(_number, (g.err, g.torch_err, g.bound)), worst.case))
        lines = [f"{self.op}: {'ok' if self.ok else 'WRONG'}", *_columns(table)]
        lines += [f"  {row.dtype} {row.check}, {row.case}: {row.grade}" for row in self.failures[:20]]
        if len(self.failures) > 20:
            lines.append(f"  and {len(self.failures) - 20} more")
        return "\n".join(lines)


def _severity(row: Row) -> tuple[bool, float]:
    g = row.grade
    return (not g.ok, g.err / g.bound if g.bound else g.err)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]


def verify(
    fn: Callable[..., Any],
    *,
    op: str,
    dtype: str | Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> Report:
    """Grades any function that claims to compute an op: ours, yours, or a rival's.

    Values, gradients and second gradients are compared with a NumPy float64 oracle over the op's cases, edge sizes and
    memory layouts, by the rule in :func:`pydl._grading.grade`. Uninitialised memory is NaN meanwhile, inputs lie
    between NaN canaries that must survive, and every call is repeated and must give the same bits.

    Args:
        fn: called with the arguments of the torch op of that name.
        op: name in `pydl.functional`, such as "layer_norm".
        dtype: one name or several ("float32" or "fp32", ...); all that the op promises by default.
        device: where the tensors are.

    Returns:
        Report: true if everything passed; print it for a table with torch's error beside each of ours.

    Raises:
        ValueError: if the op or a dtype is unknown.
    """
    try:
        found = spec(op)
    except ValueError as error:
        raise ValueError(f"verify: {error}") from None
    device = torch.device(device)
    report = Report(found.name)
    for name in _dtype_names(found, dtype):
        for problem in problems(found, getattr(torch, name)):
            for level in levels(problem):
                report.rows += [Row(name, *row) for row in verify_problem(fn, problem, device, level)]
    return report


def _dtype_names(spec: Spec, dtype: str | Sequence[str] | None) -> list[str]:
    given = spec.dtypes if dtype is None else [dtype] if isinstance(dtype, str) else dtype
    names = [SHORT.get(str(name), str(name)).removeprefix("torch.") for name in given]
    for name in names:
        if name not in SHORT.values():
            raise ValueError(f"verify: dtype must be one of {', '.join((*SHORT, *SHORT.values()))}, but got {name!r}")
    return names


def torch_function(spec: Spec) -> Callable[..., Any] | None:
    """Torch's own op or a composition of its ops, or None where there is neither."""
    if not spec.torch_name:
        return None
    module, _, function = spec.torch_name.rpartition(":")
    target: Any = importlib.import_module(module or "torch")
    for part in function.split("."):
        target = getattr(target, part)
    composition: Callable[..., Any] = target
    return composition


class _Run:
    """Outputs of one call, and on demand its gradients; `error` holds what was raised instead."""

    def __init__(
        self,
        fn: Callable[..., Any],
        problem: Problem,
        device: torch.device,
        level: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.values: tuple[Tensor, ...] = ()
        self.gradients: tuple[Tensor, ...] = ()
        self.error = ""
        self.guards, args, kwargs = problem.place(device, dtype)
        tensors = [guard.tensor for guard, varies in zip(self.guards, problem.varies, strict=True) if varies]
        try:
            with torch.set_grad_enabled(level != "values"):
                for tensor in tensors:
                    tensor.requires_grad_(level != "values")
                out = fn(*args, **kwargs)
                self.values = out if isinstance(out, tuple) else (out,)
                if level == "gradients":
                    dy = self._dy(problem)
                    self.gradients = torch.autograd.grad(self.values[0], tensors, dy)
                elif level == "second":
                    self.gradients = self._second(problem, tensors, self._dy(problem).requires_grad_())
        except Exception as error:  # whatever a graded function raises is its result
            self.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def _dy(self, problem: Problem) -> Tensor:
        return torch.from_numpy(problem.dy).to(self.values[0])

    def _second(self, problem: Problem, tensors: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(self.values[0], tensors, dy, create_graph=True)
        directions = [torch.from_numpy(v).to(t) for v, t in zip(problem.directions, tensors, strict=True)]
        total = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
        assert isinstance(total, Tensor)
        wanted = [*tensors, dy]
        given = torch.autograd.grad(total, wanted, allow_unused=True)
        return tuple(torch.zeros_like(w) if g is None else g for g, w in zip(given, wanted, strict=True))


def levels(problem: Problem) -> list[str]:
    """What can be graded of a problem: values always, first and second gradients where the case says so."""
    found = ["values"]
    if problem.spec.gradient is None:
        return found
    if problem.case.gradients:
        found.append("gradients")
    if problem.case.second and problem.layout == "contiguous":
        found.append("second")
    return found


def verify_problem(
    fn: Callable[..., Any], problem: Problem, device: torch.device, level: str, reruns: int = RERUNS
) -> Iterator[tuple[str, str, Grade]]:
    """Rows (check, case, grade) of one call and its derivatives up to `level`, repeated `reruns` times in all."""
    reference = torch_function(problem.spec)
    with poisoned_memory():
        ours = _Run(fn, problem, device, level)
    if ours.error:
        yield level, problem.name, _broken(f"raised {ours.error}")
        return
    torchs = _Run(reference, problem, device, level, problem.result_dtype) if reference is not None else None
    for label, graded in _compare(ours, torchs, problem, level):
        yield level, label, graded
    if not all(guard.intact() for guard in ours.guards):
        yield "inputs", problem.name, _broken("an input or the memory beside it was written")
    if level != "second" and reruns > 1:
        yield "re-run", f"{problem.name} {level}", _repeat(fn, ours, problem, device, level, reruns)


def _broken(why: str) -> Grade:
    return Grade(False, math.inf, 0.0, 0.0, why)


def _compare(ours: _Run, torchs: _Run | None, problem: Problem, level: str) -> Iterator[tuple[str, Grade]]:
    exact = problem.values
    if len(ours.values) != len(exact):
        yield problem.name, _broken(f"returned {len(ours.values)} tensors, not {len(exact)}")
        return
    usable = torchs is not None and not torchs.error
    for i, (out, oracle) in enumerate(zip(ours.values, exact, strict=True)):
        theirs = torchs.values[i] if usable and torchs is not None else None
        wanted = theirs.dtype if theirs is not None else _result_dtype(oracle, problem)
        if not isinstance(out, Tensor) or out.dtype != wanted or out.device.type != ours.guards[0].tensor.device.type:
            kind = f"{out.dtype} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
            yield problem.name, _broken(f"result {i} is {kind}, not {wanted} on the input's device")
        elif level != "second":
            yield problem.name, grade(out, oracle, theirs, dtype=out.dtype if out.is_floating_point() else None)
    if level == "values":
        return
    oracles = problem.gradients if level == "gradients" else problem.second
    lengths = problem.reductions if level == "gradients" else [_longest(problem), *([_longest(problem)] * len(oracles))]
    for i, (got, oracle) in enumerate(zip(ours.gradients, oracles, strict=True)):
        yield (
            f"{problem.name} [{i}]",
            grade(
                got,
                oracle,
                torchs.gradients[i] if usable and torchs is not None else None,
                dtype=problem.dtype,
                gradient=True,
                reduction=lengths[i],
                oracle_err=DIFFERENCE_ERR if level == "second" else 0.0,
            ),
        )


def _result_dtype(oracle: np.ndarray, problem: Problem) -> torch.dtype:
    if np.issubdtype(oracle.dtype, np.floating):
        return problem.result_dtype
    return torch.from_numpy(np.zeros(0, oracle.dtype)).dtype


def _longest(problem: Problem) -> int:
    return max(*problem.reductions, problem.arrays[0].shape[-1] if problem.arrays[0].ndim else 1)


def _repeat(
    fn: Callable[..., Any], first: _Run, problem: Problem, device: torch.device, level: str, reruns: int
) -> Grade:
    """Passes when further calls, with ordinary memory, give the same bits as the first."""
    for _ in range(reruns - 1):
        again = _Run(fn, problem, device, level)
        pairs = zip((*first.values, *first.gradients), (*again.values, *again.gradients), strict=False)
        if again.error or not all(same_bits(a, b) for a, b in pairs):
            return _broken(again.error or "the same call gave other bits")
    return Grade(True, 0.0, 0.0, 0.0)


def _candidates(spec: Spec, wanted: Sequence[str] | None) -> list[tuple[str, str]]:
    """(backend, device) pairs to try for one op; those that cannot run are reported with their reason."""
    pairs = [("cpu", "cpu"), ("triton", "cpu")]
    if torch.cuda.is_available():
        pairs = [("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda")]
    if wanted is not None:
        cuda = "cuda" if torch.cuda.is_available() else "cpu"
        pairs = [(name, cuda if name in ("cuda", "triton") else "cpu") for name in wanted]
    return pairs


def _refusal(spec: Spec, backend: str, device: str, dtype: str) -> str:
    """Why a forced backend does not take this op and dtype here; empty if it does."""
    from pydl.backend import backend as forced

    sample = next(c for c in spec.cases() if c.arrays[0].size)
    _, args, kwargs = Problem(spec, sample, getattr(torch, dtype)).place(torch.device(device))
    try:
        with forced(backend), torch.no_grad():
            _public(spec)(*args, **kwargs)
    except RuntimeError as error:
        return str(error).split("cannot run this call: ")[-1].splitlines()[0]
    return ""


def _public(spec: Spec) -> Callable[..., Any]:
    from pydl import ops

    return getattr(ops, spec.name)


def _forced(spec: Spec, backend: str) -> Callable[..., Any]:
    from pydl.backend import backend as forced

    public = _public(spec)

    def call(*args: Any, **kwargs: Any) -> Any:
        with forced(backend):
            return public(*args, **kwargs)

    return call


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pydl verify", description=__doc__)
    parser.add_argument("op", nargs="*", help="ops or modules of ops; all by default")
    parser.add_argument("--dtype", help="comma-separated: fp32, fp16, bf16, fp64")
    parser.add_argument("--backend", help="comma-separated: cpu, cuda, triton, torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparisons")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command: grades every op on every backend that runs here; returns the exit status."""
    options = _parser().parse_args(argv)
    found: dict[str, Spec] = {}
    try:
        for op in options.op or [None]:
            found.update(specs(op))
        chosen = [name for part in (options.dtype or "").split(",") if (name := part.strip())] or None
        for spec in found.values():
            _dtype_names(spec, chosen)
    except ValueError as error:
        raise SystemExit(f"verify: {error}") from None
    wanted = options.backend.split(",") if options.backend else None
    unknown = set(wanted or ()) - set(BACKENDS)
    if unknown:
        raise SystemExit(f"verify: backend must be one of {', '.join(BACKENDS)}, but got {', '.join(sorted(unknown))}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") and find_spec("triton") is not None:
        from pydl._interpreter import repair

        repair()  # Triton's own interpreter truncates bfloat16, and would be failed for it
    started, records, failed = time.perf_counter(), [], []
    skipped: dict[str, dict[str, list[str]]] = {}
    print(
        f"{'op':16} {'backend':8} {'dtype':9} {'passed':>9}  worst error (torch's): values, gradients, second gradients"
    )
    for spec in found.values():
        ran = False
        for backend, device in [*_candidates(spec, wanted), *([] if wanted else [("torch", "cpu")])]:
            if backend == "torch" and ran and not wanted:
                continue
            for dtype in _dtype_names(spec, chosen):
                why = _refusal(spec, backend, device, dtype)
                if why:
                    if wanted or not why.startswith("no "):  # an op without a kernel of that kind is no news
                        skipped.setdefault(f"{backend}: {why}", {}).setdefault(spec.name, []).append(dtype)
                    continue
                ran = True
                report = verify(_forced(spec, backend), op=spec.name, dtype=dtype, device=device)
                print(_summary(report, backend, dtype), flush=True)
                failed += [
                    f"{spec.name} {backend} {row.dtype} {row.check}, {row.case}: {row.grade}" for row in report.failures
                ]
                records += [{"op": spec.name, "backend": backend, "device": device, **_record(row)} for row in report]
    _print_skipped(skipped)
    for line in failed[:40]:
        print(line)
    print(f"{len(records) - len(failed)} of {len(records)} comparisons passed in {time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))
    return 1 if failed or not records else 0


def _print_skipped(skipped: dict[str, dict[str, list[str]]]) -> None:
    """One line for each reason why something was not run: {reason: {op: dtypes}}."""
    for reason, ops in skipped.items():
        dtypes = list(dict.fromkeys(name for names in ops.values() for name in names))
        print(f"not run on {reason} ({', '.join(ops)}; {', '.join(dtypes)})")


def _record(row: Row) -> dict[str, Any]:
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row.grade).items()}
    return {"dtype": row.dtype, "check": row.check, "case": row.case, **values}


def _summary(report: Report, backend: str, dtype: str) -> str:
    passed = f"{len(report) - len(report.failures)}/{len(report)}"
    errors = []
    for check in CHECKS[:3]:
        worst = report.worst(dtype, check)
        errors.append("-" if worst is None else f"{_number(worst.grade.err)} ({_number(worst.grade.torch_err)})")
    mark = "ok" if report.ok else "WRONG"
    return (
        f"{report.op:16} {backend:8} {dtype:9} {passed:>9}  {mark:5}  " + "  ".join(f"{e:18}" for e in errors).rstrip()
    )
