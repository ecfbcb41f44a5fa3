"""examples/detect_digits.py as a user runs it: what it prints, the picture it draws, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "detect_digits.py"

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def run(*options: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYDL_", "TRITON_"))}
    environment["OMP_NUM_THREADS"] = "1"  # the suite's workers have the other cores
    command = [sys.executable, str(SCRIPT), "--quick", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detect")
    return run(folder=folder), folder


def test_digits_are_found_and_suppression_pays(quick):
    done, _ = quick
    assert done.returncode == 0, done.stdout + done.stderr
    before, boxes, digits = re.search(
        r"without suppression +mAP@0.5 ([\d.]+), (\d+) boxes for (\d+) digits", done.stdout
    ).groups()
    after, kept = re.search(r"with suppression +mAP@0.5 ([\d.]+), (\d+) boxes", done.stdout).groups()
    assert float(after) > float(before) > 0.05
    assert int(digits) <= int(kept) * 3 and int(kept) < int(boxes)
    first, last = re.search(r"loss ([\d.]+) at first, ([\d.]+) in the end", done.stdout).groups()
    assert float(last) < 0.4 * float(first)


def test_the_trace_names_what_ran(quick):
    done, _ = quick
    assert re.search(r"^batched_nms +forward +cpu +100 ", done.stdout, re.M), done.stdout
    assert re.search(r"^max_pool2d +forward +cpu ", done.stdout, re.M)


def test_the_picture_shows_both_rows(quick):
    image = pytest.importorskip("matplotlib.image")
    _, folder = quick
    pixels = image.imread(folder / "demo_output" / "detect_digits.png")
    height, width = pixels.shape[:2]
    assert height > 500 and width > 1000
    for half in (pixels[: height // 2, :, :3], pixels[height // 2 :, :, :3]):
        assert 0.005 < (half.mean(axis=-1) < 0.6).mean() < 0.6


def test_too_low_a_precision_is_an_error(tmp_path):
    options = ("--steps", 1, "--scenes", 20, "--tests", 5, "--min-map", 1.01, "--out", tmp_path / "elsewhere")
    done = run(*options, folder=tmp_path)
    assert done.returncode == 1
    assert re.search(r"mAP [\d.]+ is below 1.010", done.stderr)
    assert (tmp_path / "elsewhere" / "detect_digits.png").is_file()


def test_bad_options_are_refused(tmp_path):
    done = run("--steps", 0, folder=tmp_path)
    assert done.returncode == 2 and "--steps must be at least 1, got 0" in done.stderr
