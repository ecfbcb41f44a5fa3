"""Set-up of every test: the Triton interpreter where there is no GPU, NaN in uninitialised memory, fixed seeds."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# with --import-mode=importlib nothing is put on the path: helpers are found here, and pydl also when not installed
for folder in (str(ROOT), str(TESTS)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import pytest  # noqa: E402
import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # binds when @triton.jit runs: before anything imports triton

MARKERS = (
    "gpu: needs a CUDA device",
    "slow: takes more than a few seconds",
    "compile: runs torch.compile or a compiler",
    "no_poison: uninitialised memory stays as it is",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not HAS_GPU and importlib.util.find_spec("triton") is not None:
        _repair_interpreter()


def pytest_collection_modifyitems(items):
    without = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None and not HAS_GPU:
            item.add_marker(without)


def _repair_interpreter():
    """Makes the interpreter's bfloat16 exact; the repair has a test of its own."""
    from pydl import _interpreter

    _interpreter.repair()


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Memory that a kernel leaves unwritten is NaN, not what happened to be there; marker no_poison turns it off."""
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    from pydl._problems import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)
    if HAS_GPU:
        torch.cuda.manual_seed_all(0)
