"""``python -m pydl info``: what this installation is made of, what is missing, and the command that gets it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata as metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import pydl
from pydl import _library

_PACKAGE = Path(pydl.__file__).parent
_CHECKOUT = (_PACKAGE.parent / "csrc").is_dir()
BUILD = "python setup.py build_ext --inplace" if _CHECKOUT else "pip install --no-build-isolation SOURCE_FOLDER"
ENVIRONMENT = {
    "PYDL_DISABLE": "ops that go to torch",
    "PYDL_STRICT": "any fallback to torch raises",
    "PYDL_LOG": "each choice of a backend is logged",
    "PYDL_CPU_CAPABILITY": "highest CPU level: baseline, avx2 or avx512",
    "TRITON_INTERPRET": "Triton kernels run in the interpreter",
}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of everything a bug report needs."""
    driver = None
    if torch.cuda.is_available():
        number = getattr(torch._C, "_cuda_getDriverVersion")()  # noqa: B009 (absent from CPU builds)
        driver = f"CUDA {number // 1000}.{number % 1000 // 10}"
    return {
        "pydl": f"{pydl.__version__} ({'checkout' if _CHECKOUT else 'installed'} in {_PACKAGE})",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "CUDA runtime": torch.version.cuda,
        "GPU driver": driver,
    }


def extension() -> Any:
    """The module pydl._C, or None."""
    try:
        return importlib.import_module("pydl._C")
    except ImportError:
        return None


def devices() -> list[str]:
    """The CPU with the level its kernels run at, and each GPU."""
    module = extension()
    level = module.cpu_capability() if module else None
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, kernels at level {level or 'unknown'}"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            f"cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, "
            f"{p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB"
        )
    return found


def build_facts() -> dict[str, Any]:
    """What the build wrote beside the libraries; empty when nothing was built."""
    path = _PACKAGE / "_lib" / "build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def built() -> dict[str, str]:
    """State of each native part."""
    facts = build_facts()
    archs = ", ".join(facts.get("cuda_archs", [])) or "unknown"
    cpu, cuda = _library.cpu_library(), _library.cuda_library()
    exists = cuda.path.exists()
    how = f"{facts.get('compiler')}, torch {facts.get('torch_version')}, commit {facts.get('commit')}"
    module = extension()
    return {
        "CPU library": f"loaded, {how}" if cpu.loaded else cpu.reason,
        "CUDA library": (
            f"{'loaded' if cuda.loaded else 'built, not loaded'}, targets {archs}" if exists else "not built"
        )
        + (f" ({cuda.reason})" if cuda.reason else ""),
        "pydl._C": "loaded" if module else "not built for this Python (optional)",
    }


def missing() -> list[tuple[str, str]]:
    """What would help here and is not there, each with the command that gets it."""
    found = []
    if not _library.cpu_library().loaded:
        found.append(("native CPU kernels (torch's own run instead)", BUILD))
    if extension() is None:
        found.append(("pydl._C (facts about the build; optional)", BUILD))
    if torch.version.cuda and not _library.cuda_library().loaded:
        nvcc = f'pip install "nvidia-cuda-nvcc=={torch.version.cuda}.*" "nvidia-cuda-cccl=={torch.version.cuda}.*"'
        found.append(("CUDA kernels", f"{nvcc} (or a CUDA toolkit on PATH), then {BUILD}"))
    if importlib.util.find_spec("triton") is None:
        found.append(("Triton kernels", 'pip install "triton>=3.6"'))
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        found.append(("GPU kernels", "need compute capability 8.0 or newer; torch runs instead"))
    return found


def conflicts() -> list[str]:
    """Other distributions that share a name with ours."""
    found = []
    if (version := _version("pydl")) is not None:
        found.append(
            f"the distribution 'pydl' {version} (an astronomy package) is installed and writes into the same folder: "
            "pip uninstall pydl, then reinstall pydl-kernels"
        )
    if (version := _version("kernels")) is not None:
        found.append(f"Hugging Face's 'kernels' {version} is installed: no conflict, ours is pydl.kernels")
    return found


def op_rows() -> list[tuple[str, str, str, str]]:
    """(op, device type, implementation, remark) for every public op, CPU and GPU."""
    from pydl.backend import families, has_kernels

    rows: list[tuple[str, str, str, str]] = []
    absent = "" if torch.cuda.is_available() else "no GPU here"
    for name, family in sorted(families().items()):
        for device in ("cpu", "cuda"):
            candidates = family.order.get(device, ())
            key = device.upper()
            ready = [b for b in candidates if has_kernels(family, b, key)]
            if device in family.policy:
                rows.append((name, device, "torch", family.policy[device]))
            elif ready:
                rows.append((name, device, ready[0], absent if device == "cuda" else ""))
            else:
                rows.append((name, device, "torch", f"no {' or '.join(candidates) or 'pydl'} kernel is loaded"))
    return rows


def facts() -> dict[str, Any]:
    """Everything the command prints, as one structure."""
    return {
        "versions": versions(),
        "devices": devices(),
        "built": built(),
        "missing": missing(),
        "conflicts": conflicts(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "ops": op_rows(),
    }


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(rows[0]) - 1)] if rows else []
    for row in rows:
        print("  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]).rstrip())


def main(argv: list[str]) -> int:
    """Print the report; ``--json`` prints the same as JSON."""
    parser = argparse.ArgumentParser(prog="python -m pydl info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    report = facts()
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    print("versions")
    _print_table([(name, value or "none") for name, value in report["versions"].items()])
    print("devices")
    _print_table([(text,) for text in report["devices"]])
    print("built")
    _print_table(list(report["built"].items()))
    print("missing")
    _print_table(report["missing"] or [("nothing",)])
    print("name conflicts")
    _print_table([(text,) for text in report["conflicts"]] or [("none",)])
    print("environment variables in force")
    _print_table([(f"{k}={v}", ENVIRONMENT[k]) for k, v in report["environment"].items()] or [("none",)])
    print("ops: what runs on which device")
    _print_table(report["ops"])
    return 0
