"""examples/train_digits.py as a user runs it: what it prints, the picture it draws, and how it fails."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_digits.py"

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def run(*options: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYDL_", "TRITON_"))}
    environment["OMP_NUM_THREADS"] = "1"  # the suite's workers have the other cores
    command = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return run(folder=folder), folder


def test_the_digits_are_learnt(quick):
    done, _ = quick
    assert done.returncode == 0, done.stdout + done.stderr
    ours, misread, theirs = re.search(
        r"test accuracy +([\d.]+)% with pydl \((\d+) of 450 .*?, ([\d.]+)% with torch alone", done.stdout
    ).groups()
    assert float(ours) >= 85
    assert int(misread) == round(450 * (1 - float(ours) / 100))
    assert abs(float(ours) - float(theirs)) < 3


def test_the_loss_curves_stay_together(quick):
    done, _ = quick
    largest, steps, first = re.search(
        r"largest difference (\S+), at step \d+ of (\d+), .* at the first step (\S+)", done.stdout
    ).groups()
    assert int(steps) == 4 * 43  # four epochs of 1,347 digits in batches of 32
    assert float(first) < 1e-5  # before rounding has had time to grow
    assert float(largest) < 0.5  # the losses begin at 2.3; a wrong gradient would show here
    assert re.search(r"training time +[\d.]+ s with pydl, [\d.]+ s with torch alone", done.stdout)


def test_the_trace_says_what_ran_where_and_why(quick):
    done, _ = quick
    rows = re.findall(r"^(relu|max_pool2d|layer_norm) +(forward|backward) +(\w+) +(\d+) +(\S.*)$", done.stdout, re.M)
    calls = {(op, phase): int(n) for op, phase, _, n, _ in rows}
    assert calls[("relu", "forward")] == 4 and calls[("max_pool2d", "forward")] == 2
    assert calls[("layer_norm", "forward")] == 1
    assert all(backend in ("cpu", "torch") and len(why) > 5 for _, _, backend, _, why in rows)
    for op in {op for op, _, backend, _, _ in rows if backend == "cpu"}:
        assert (op, "backward") in calls
    for kind, count in (("Conv2d", 2), ("Linear", 3)):
        assert re.search(rf"^  {kind} \({count}\): no pydl kernel", done.stdout, re.M)


def test_the_picture_is_drawn(quick):
    image = pytest.importorskip("matplotlib.image")
    _, folder = quick
    pixels = image.imread(folder / "demo_output" / "train_digits.png")
    height, width = pixels.shape[:2]
    assert height > 600 and width > 1000
    # the curves on the left, the digits on the right: both halves have ink, and neither is full of it
    for half in (pixels[:, : width // 2, :3], pixels[:, width // 2 :, :3]):
        dark = (half.mean(axis=-1) < 0.6).mean()
        assert 0.005 < dark < 0.6


def test_too_low_an_accuracy_is_an_error(tmp_path):
    done = run("--epochs", 1, "--min-accuracy", 1.01, "--out", tmp_path / "elsewhere", folder=tmp_path)
    assert done.returncode == 1
    assert re.search(r"test accuracy [\d.]+% is below 101.00%", done.stderr)
    assert (tmp_path / "elsewhere" / "train_digits.png").is_file()


@pytest.fixture(scope="module", params=["resnet", "alexnet"])
def other(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    done = run("--model", request.param, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "demo_output" / f"train_digits_{request.param}.png").stat().st_size > 10_000
    return request.param, done.stdout


def test_the_other_networks_learn(other):
    name, text = other
    least, apart = {"resnet": (85, 5), "alexnet": (60, 15)}[name]  # two epochs: 99 and 78 % were measured
    ours, theirs = map(float, re.search(r"accuracy +([\d.]+)% .*? ([\d.]+)% with torch alone", text).groups())
    assert ours >= least and abs(ours - theirs) < apart
    largest, steps, first = re.search(r"difference (\S+), at step \d+ of (\d+), .* first step (\S+)", text).groups()
    assert int(steps) == 2 * 43
    assert float(first) < 1e-5  # 0.08 was measured where dropout drew other random numbers
    assert float(largest) < 1.5  # the losses begin at 2.3 and above
    assert re.search(r"training time .* torch / pydl = [\d.]+$", text, re.M)


def calls_in(text):
    """{(op, phase): (backend, calls)} of a printed trace."""
    rows = re.findall(r"^(\w+) +(forward|backward) +(\w+) +(\d+) ", text, re.M)
    return {(op, phase): (backend, int(n)) for op, phase, backend, n in rows}


def test_what_the_other_networks_ran_on(other):
    name, text = other
    training = calls_in(text.partition("Inference")[0])
    expected = {
        "resnet": {"batch_norm": 15, "relu": 13, "max_pool2d": 1, "adaptive_avg_pool2d": 1},
        "alexnet": {"local_response_norm": 2, "relu": 7, "max_pool2d": 3},
    }[name]
    assert {op: n for (op, phase), (_, n) in training.items() if phase == "forward"} == expected
    for op, n in expected.items():
        if training[op, "forward"][0] == "cpu":
            assert training[op, "backward"] == ("cpu", n)


def test_fused_inference_is_torchs(other):
    name, text = other
    fused = calls_in(text.partition("Inference")[2])
    if name == "alexnet":
        assert not fused
        return
    # thirteen times batch norm and relu, six of them with an addition; two batch norms stand in a shortcut
    assert {op: n for (op, _), (_, n) in fused.items()} == {
        **{"batch_norm_act": 13, "batch_norm": 2},
        **{"max_pool2d": 1, "adaptive_avg_pool2d": 1},
    }
    gap = re.search(r"logits +largest difference (\S+) of the largest logit, 1e-05 allowed", text)[1]
    assert 0 <= float(gap) <= 1e-5
    assert float(re.search(r"inference +450 digits at once: torch / pydl = ([\d.]+)", text)[1]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", 0), "--epochs must be at least 1, got 0"),
        (("--model", "vgg"), "argument --model: invalid choice: 'vgg'"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    done = run(*options, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_panel_takes_what_the_example_gives_it():
    from bench._panel import where_pydl_pays

    inspect.signature(where_pydl_pays).bind(10.0, "cpu")
