"""Benchmarks pydl's ops against torch, torch.compile, another commit, or anyone's function.

python bench/run.py                                       every op on this machine
python bench/run.py layer_norm max_pool --device cpu --json out.json
python bench/run.py max_pool --mode fwd --case 28x28 --provider pydl,torch,mymodule:my_pool
python bench/run.py layer_norm --base HEAD~1              this tree against that commit, taking turns
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: the folder of the script gives way to the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__, formatter_class=raw)

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser.add_argument("op", nargs="*", help="names of bench_<op>.py files; all of them when none is given")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", type=names, help="fp32,bf16,fp16,fp64; default fp32 on cpu, bf16 on cuda")
    parser.add_argument("--mode", type=names, default=["fwd", "bwd", "full"], help="fwd,bwd,full")
    parser.add_argument("--case", type=names, help="only cases whose name contains one of these")
    parser.add_argument("--provider", type=names, help="pydl,torch,compile,pydl@BACKEND,module:function,...")
    parser.add_argument("--base", metavar="GITREF", help="measure that commit's pydl as well, in its own process")
    parser.add_argument("--json", type=Path, help="write the rows and the environment to this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a roofline plot (SVG, PNG) to this folder")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what torch uses")
    parser.add_argument("--seconds", type=float, default=0.6, help="measuring time per case, dtype and mode")
    parser.add_argument("--budget", type=float, help="start no further case after this many seconds")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be measured, before anything is."""
    from bench import _case

    unknown = [d for d in args.dtype if d not in _case.DTYPES] + [m for m in args.mode if m not in _case.MODES]
    if unknown:
        raise SystemExit(f"bench/run.py: unknown dtype or mode: {', '.join(unknown)}")
    missing = [op for op in args.op if op not in _case.discover()]
    if missing:
        known = ", ".join(_case.discover())
        raise SystemExit(f"bench/run.py: no bench file for {', '.join(missing)}; there are: {known}")


def groups(args: argparse.Namespace) -> list[Any]:
    """What is to be measured, in order."""
    from bench import _case
    from bench._harness import Group

    found = []
    for dtype in args.dtype:
        for op in args.op or _case.discover():
            for case in _case.select(op, args.device, args.case):
                found += [Group(op, case, args.device, dtype, mode) for mode in case.modes if mode in args.mode]
    if not found:
        raise SystemExit("bench/run.py: no case matches")
    return found


def write_json(path: Path, environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes a result file in one step, so that a reader never sees half of it."""
    from bench import _schema

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    document = {"schema": _schema.VERSION, "environment": environment, "rows": [_rounded(row) for row in rows]}
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures everything that was asked for; rows are written to --json as each case ends."""
    import torch

    from bench import _base, _env, _harness, _providers, _report, _timing

    if args.threads:
        torch.set_num_threads(args.threads)
    plan = groups(args)
    environment = _env.environment(args.device)
    print(_env.describe(environment), flush=True)
    environment["roofline"] = {dtype: _timing.roofline(args.device, dtype) for dtype in args.dtype}
    for dtype, roof in environment["roofline"].items():
        copy, product = roof["copy_gbs"], roof["gemm_gflops"]
        print(f"roof {dtype}: copy {copy:.1f} GB/s, matrix product {product:.0f} GFLOP/s", flush=True)
    clock = _timing.GpuClock() if args.device == "cuda" else None
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        extra: list[Callable[..., Any]] = []
        if args.base:
            base = stack.enter_context(_base.Base(args.base, args.device, torch.get_num_threads()))
            extra.append(base.subject)
        step = stack.enter_context(_report.progress(len(plan)))
        for i, group in enumerate(plan):
            if args.budget and time.monotonic() - started > args.budget:
                environment["skipped"] = [f"{g.op} {g.case.name} {g.dtype} {g.mode}" for g in plan[i:]]
                print(f"out of time: {len(plan) - i} of {len(plan)} cases were not measured", flush=True)
                break
            step(f"{group.op} {group.case.name} {group.dtype} {group.mode}")
            roof = environment["roofline"][group.dtype]
            has_target = bool(group.case.target(group.device, group.mode, group.dtype)) and not group.case.host
            providers = args.provider or _providers.default_providers(args.device, has_target)
            rows += _harness.measure(group, providers, roof, args.seconds, extra, clock)
            if clock:
                environment["clocks_after"] = _env.gpu_state()
                environment["starved_batches"] = clock.starved
            if args.json:
                write_json(args.json, environment, rows)
    if args.plot:
        from bench import _plot

        for path in _plot.roofline(rows, environment, args.plot):
            print(f"wrote {path}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 when a provider was wrong, 2 when the device is missing."""
    args = parse(arguments)
    if args.threads:  # before torch starts its threads
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or (["bf16"] if args.device == "cuda" else ["fp32"])
    check(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench/run.py: --device cuda: this machine has no CUDA device that torch can use", file=sys.stderr)
        return 2
    if args.plot:
        from bench import _plot

        _plot.require()
    from bench import _report

    rows = run(args)
    _report.show(rows)
    print(_report.summary(rows))
    return int(any(not row["ok"] and not row.get("missing") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
