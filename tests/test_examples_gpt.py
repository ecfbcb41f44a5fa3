"""examples/gpt_tiny.py as a user runs it, and its packing of documents."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "gpt_tiny.py"
sys.path.insert(0, str(SCRIPT.parent))

import gpt_tiny  # noqa: E402


def test_documents_are_packed_side_by_side():
    batch = next(gpt_tiny.batches([b"ab", b"cde"], 2, 16, 0, torch.device("cpu")))
    for x, y, positions, mask in zip(batch.x, batch.y, batch.positions, batch.mask[:, 0], strict=True):
        assert torch.equal(x[1:], y[:-1]) and x[0] == gpt_tiny.START
        begins = (x == gpt_tiny.START).nonzero().flatten().tolist()
        assert len(begins) > 2
        for begin, end in zip(begins, [*begins[1:], 16], strict=True):
            own = mask[begin:end]
            assert torch.equal(own[:, begin:end], torch.ones(end - begin, end - begin, dtype=torch.bool).tril())
            assert not own[:, :begin].any() and not own[:, end:].any()
            assert positions[begin:end].tolist() == list(range(end - begin))


def test_the_curve_is_torchs_and_pydl_runs(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYDL_", "TRITON_"))}
    environment["OMP_NUM_THREADS"] = "1"  # the suite's workers have the other cores
    command = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu", "--steps", "30"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    out = done.stdout
    assert done.returncode == 0, out + done.stderr
    assert re.search(r"^  scaled_dot_product_attention: cpu \(4\)$", out, re.M), out
    assert re.search(r"^  layer_norm: cpu \(10\)$", out, re.M)
    ours, _ = map(float, re.search(r"in 8 steps: (\S+), of torch from itself (\S+)", out).groups())
    # eight steps of a network this small stay within some roundings of a loss near 4.8
    assert ours < 1e-4
    first, last = re.search(r"^ +1 +([\d.]+)", out, re.M), re.search(r"with pydl: ([\d.]+),", out)
    assert float(last.group(1)) < float(first.group(1)) - 0.5
    # prompts were continued
    assert len(out.split("What it writes")[1].strip()) > 60


def test_a_comparison_longer_than_the_training_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpt_tiny.main(["--quick", "--steps", "3"])
    assert "--compared must be between 1 and --steps, got 8 and 3" in capsys.readouterr().err
