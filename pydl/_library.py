"""Loads the two native libraries, and says why when one cannot be loaded."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "_lib"
BUILD_HINT = "`python setup.py build_ext --inplace` in a checkout, or `pip install --no-build-isolation .` from one"


@dataclass(frozen=True, slots=True)
class Library:
    """State of one native library: its path, whether it is loaded, and the reason when it is not."""

    path: Path
    loaded: bool
    reason: str


def _load(name: str) -> Library:
    path = FOLDER / name
    if not path.exists():
        return Library(path, False, f"{name} is not built ({BUILD_HINT})")
    try:
        torch.ops.load_library(os.fspath(path))
    except OSError as error:
        return Library(path, False, f"{name} does not load: {error}")
    return Library(path, True, "")


@functools.cache
def cpu_library() -> Library:
    """The native CPU library, loaded on the first call."""
    return _load("libpydl_cpu.so")


@functools.cache
def cuda_library() -> Library:
    """The CUDA library, loaded on the first call and only when this torch is built for CUDA."""
    if torch.version.cuda is None:
        return Library(FOLDER / "libpydl_cuda.so", False, "this torch is built without CUDA")
    return _load("libpydl_cuda.so")
