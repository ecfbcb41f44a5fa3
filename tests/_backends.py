"""Which implementations of an op can run on this machine: every test of values goes through all of them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import pydl
from pydl import ops
from pydl.backend import families

ROOT = Path(__file__).resolve().parents[1]
HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Backend:
    """A backend of one op and the device of its tensors; `use()` forces it."""

    op: str
    name: str
    device: str

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What this backend promises to take."""
        everything = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        return everything if self.name == "torch" else families()[self.op].dtypes[self.name]

    @property
    def slow(self) -> bool:
        """Whether each call costs milliseconds per row: the Triton interpreter and the SIMT host runner."""
        return self.device == "cpu" and self.name in ("triton", "simt")

    @contextlib.contextmanager
    def use(self):
        """Forces the backend, building and loading the SIMT library first if that is meant."""
        if self.name == "simt":
            simt_library()
        with pydl.backend(self.name):
            yield

    def __call__(self, *args, **kwargs):
        """The public op on this backend."""
        with self.use():
            return getattr(ops, self.op)(*args, **kwargs)


@functools.cache
def simt_library() -> Path:
    """Builds csrc/cuda for the host through setup.py (ninja: nothing is done twice) and loads it."""
    command = [sys.executable, "setup.py", "ninja", "--target", "simt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the SIMT library does not build:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    path = ROOT / "build" / "libpydl_simt.so"
    torch.ops.load_library(str(path))
    return path


def available(op: str) -> list[Backend]:
    """The backends of a public op on this machine, torch's composition among them."""
    declared = families()[op].dtypes
    found = [Backend(op, name, "cpu") for name in ("cpu", "simt") if name in declared]
    if "triton" in declared and HAS_TRITON and not HAS_GPU:
        found.append(Backend(op, "triton", "cpu"))
    if HAS_GPU:
        found += [Backend(op, name, "cuda") for name in ("cuda", "triton") if name in declared]
    return [*found, Backend(op, "torch", "cpu")]


def backends_for(op: str, *dtypes: torch.dtype, without: tuple[str, ...] = ()):
    """pytest parameters: each backend that takes one of the dtypes (any, if none is given)."""
    return [
        pytest.param(b, id=str(b), marks=[pytest.mark.gpu] if b.device == "cuda" else [])
        for b in available(op)
        if b.name not in without and (not dtypes or set(dtypes) & set(b.dtypes))
    ]


def backends_and_dtypes(op: str, without: tuple[str, ...] = ()):
    """pytest parameters (backend, dtype): every pair the op promises here."""
    return [
        pytest.param(
            b,
            dtype,
            id=f"{b}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.gpu] if b.device == "cuda" else [],
        )
        for b in available(op)
        if b.name not in without
        for dtype in b.dtypes
    ]
