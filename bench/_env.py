"""The environment record of a run: what was measured, on what, in which state."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_SMI_FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def _run(*command: str, timeout: float = 10.0) -> str:
    """Output of a command, empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str | None:
    """Short hash of the checkout, with "-dirty" when a source of pydl differs from it."""
    name = _run("git", "rev-parse", "--short=12", "HEAD")
    if not name:
        return None
    changed = _run("git", "status", "--porcelain", "--", "pydl", "csrc", "kernels", "setup.py")
    return f"{name}-dirty" if changed else name


def cpu_model() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpu_state() -> dict[str, float]:
    """Clocks in MHz, power in W and temperature as nvidia-smi reads them now; empty without it."""
    if not shutil.which("nvidia-smi"):
        return {}
    line = _run("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits").splitlines()[:1]
    state = {}
    for name, value in zip(_SMI_FIELDS, line[0].split(",") if line else [], strict=False):
        try:
            state[name] = float(value)
        except ValueError:
            continue
    return state


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """The record that goes beside the rows."""
    record: dict[str, Any] = {
        "device": cpu_model(),
        "driver": None,
        "clocks": {},
        "torch": torch.__version__,
        "triton": version("triton"),
        "pydl_commit": commit(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        record["device"] = torch.cuda.get_device_name()
        record["arch"] = f"sm_{capability[0]}{capability[1]}"
        driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        record["driver"] = driver.split("\n")[0] or None
        record["clocks"] = gpu_state()
    return record


def describe(record: dict[str, Any]) -> str:
    """One line for the head of a report."""
    parts = [str(record["device"]), f"torch {record['torch']}"]
    if record["triton"]:
        parts.append(f"triton {record['triton']}")
    parts.append(f"pydl {record['pydl_commit'] or 'outside git'}")
    parts.append(f"{record['threads']} threads")
    clocks = record["clocks"]
    if "clocks.sm" in clocks:
        parts.append(f"clocks {clocks['clocks.sm']:.0f}/{clocks.get('clocks.mem', 0):.0f} MHz")
        parts.append(f"{clocks.get('power.draw', 0):.0f} of {clocks.get('power.limit', 0):.0f} W")
    if record["driver"]:
        parts.append(f"driver {record['driver']}")
    if record["load"][0] > 0.5 * (record["cores"] or 1):
        parts.append(
            f"load {record['load'][0]:.1f} on {record['cores']} cores: other work runs here, times are upper bounds"
        )
    return ", ".join(parts)
