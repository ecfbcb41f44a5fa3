"""The programs in README.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_there_are_programs():
    assert len(PROGRAMS) >= 4


@pytest.mark.parametrize("program", PROGRAMS, ids=[f"program {i}" for i in range(1, len(PROGRAMS) + 1)])
def test_a_program_runs_and_prints(program):
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip()


def test_what_is_printed_of_exactness_is_so():
    (program,) = (p for p in PROGRAMS if "1e4" in p)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    ours, torch_s = (float(re.search(r"tensor\((\S+?)[,)]", line)[1]) for line in result.stdout.splitlines())
    assert ours < 2e-6 and ours < torch_s
