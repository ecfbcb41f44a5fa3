"""Builds and loads the SIMT host library, plain or under the sanitizers."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++")
# Set in the processes that tests start with the sanitizers' libraries loaded.
UNDER_ASAN = os.environ.get("PYDL_TEST_SIMT_ASAN") == "1"


def sanitizer_environment(halt: bool) -> dict[str, str]:
    """LD_PRELOAD of libasan and libstdc++: without the second, exceptions thrown by torch crash the process."""
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [COMPILER, f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("this compiler has no libasan")
    options = f"detect_leaks=0:halt_on_error={int(halt)}:print_stacktrace=1:suppress_equal_pcs=0"
    return dict(os.environ, LD_PRELOAD=" ".join(found), ASAN_OPTIONS=options, UBSAN_OPTIONS=options)


@functools.cache
def build_simt_library(sanitize: bool) -> Path:
    """csrc/cuda and the runner through setup.py."""
    target = "simt_asan" if sanitize else "simt"
    path = ROOT / f"build/libpydl_{target}.so"
    if UNDER_ASAN:
        return path  # built by the process that started this one: compilers do not run under LD_PRELOAD of libasan
    command = [sys.executable, "setup.py", "ninja", "--target", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return path


def load_simt_library() -> None:
    """Registers the pydl_simt ops, sanitized ones in a sanitized process."""
    torch.ops.load_library(str(build_simt_library(UNDER_ASAN)))


def check_sanitized(file: str) -> None:
    """The tests of a file that have "values" in their name pass again with the sanitized library, in a process."""
    build_simt_library(sanitize=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "values", file]
    environment = dict(sanitizer_environment(halt=True), PYDL_TEST_SIMT_ASAN="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


def drawn(
    shape: tuple[int, ...], memory_format: torch.memory_format, skipped: int, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """Normal numbers around 2 in memory of exactly their size, so that a sanitizer sees the first byte past it."""
    x = 2 + torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x.to(dtype).contiguous(memory_format=memory_format)
    memory = torch.empty(x.numel() + skipped, dtype=dtype)
    return memory.as_strided(x.shape, x.stride(), skipped).copy_(x)
