"""bench/gpu.py, the run on a machine with a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import gpu  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_run_says_in_one_line_that_there_is_no_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "bench/gpu.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stderr.startswith("bench/gpu.py: no GPU to run on: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_gpu_run_goes_on_after_a_failed_part(tmp_path, capsys):
    def breaks(state):
        raise OSError("the disk is full")

    def works(state):
        state.write("works.json", [1])
        return {"ok": True, "summary": "did it", "error": ""}

    state = gpu.Run(tmp_path, seconds=60)
    assert gpu.run_parts(state, {"first": breaks, "second": works}) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert summary["first"]["error"] == "OSError: the disk is full" and summary["second"]["ok"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["summary.json", "works.json"]
    assert "first: FAILED" in capsys.readouterr().out


def test_gpu_run_stops_a_step_that_takes_too_long():
    script = "import time; print('begun', flush=True); time.sleep(60)"
    done = gpu.execute([sys.executable, "-c", script], 1.5)
    assert done.code is None or done.code != 0
    assert "begun" in done.output
    assert gpu.execute(["true"], 0.0).code is None


def test_gpu_run_reads_test_reports():
    report = """<testsuites><testsuite>
      <testcase classname="tests.test_a" name="test_v[triton-cuda-fp32]" time="0.5"/>
      <testcase classname="tests.test_a" name="test_v[cuda-cuda-fp32]" time="0.1">
        <failure message="E">text</failure></testcase>
      <testcase classname="tests.test_a" name="test_plain" time="0.1"><skipped message="why"/></testcase>
    </testsuite></testsuites>"""
    cases = gpu.parse_junit(report)
    assert [c["outcome"] for c in cases] == ["passed", "failed", "skipped"]
    assert cases[1]["message"] == "E\ntext"
    counts = gpu.count_outcomes(cases)
    assert counts["triton"] == {"passed": 1} and counts["cuda"] == {"failed": 1}
    assert counts["all"] == {"passed": 1, "failed": 1, "skipped": 1}
