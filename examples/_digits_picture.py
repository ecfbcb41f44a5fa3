"""The picture of examples/train_digits.py: both loss curves, their difference, and the digits that were misread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHOWN = 12
INK, PALE, RED, BLUE, GREY = "#222222", "#dddddd", "#c2410c", "#1d4ed8", "#777777"


def draw(path: Path, trainings: Sequence[Any], digits: Any, probabilities: Tensor) -> Path:
    """Write the picture and return its path.

    Args:
        path: of the PNG; its folder is made.
        trainings: torch alone, pydl, and the yardstick; with .name, .losses (one per step) and .gaps(other).
        digits: with .test_x [N, 1, H, W] and .test_y [N].
        probabilities: [N, 10], of the accelerated model on the test set.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11.5, 6.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1), wspace=0.04)
    curves, gaps = left.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    _draw_curves(curves, *trainings[:2])
    _draw_gaps(gaps, *trainings)
    _draw_digits(right, digits, probabilities.cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_curves(axes: Any, theirs: Any, ours: Any) -> None:
    steps = range(1, len(theirs.losses) + 1)
    axes.plot(steps, theirs.losses, color=PALE, linewidth=4, label=theirs.name)
    axes.plot(steps, ours.losses, color=BLUE, linewidth=0.9, label=ours.name)
    axes.set_yscale("log")
    axes.set_ylabel("training loss")
    axes.set_title("Same weights, same batches: pydl beside torch alone", loc="left", color=INK)
    axes.legend(frameon=False, loc="lower left")
    axes.grid(axis="y", color=PALE, linewidth=0.5)


def _draw_gaps(axes: Any, theirs: Any, ours: Any, nudged: Any) -> None:
    steps = range(1, len(theirs.losses) + 1)
    for other, colour, label in (
        (nudged, GREY, "torch with its weights moved by one rounding"),
        (ours, RED, "pydl"),
    ):
        gaps = other.gaps(theirs)
        axes.plot(steps, gaps, color=colour, linewidth=0.9, label=f"{label}: at most {max(gaps):.1e}")
    axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel("distance from torch")
    axes.set_xlabel("training step")
    axes.set_title("How far the loss is from torch's", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False, loc="best", fontsize=8)
    axes.grid(axis="y", color=PALE, linewidth=0.5)


def _draw_digits(figure: Any, digits: Any, probabilities: Tensor) -> None:
    """The misread digits; where there are few, then the ones read right with the least confidence."""
    truth = digits.test_y.cpu()
    predicted = probabilities.argmax(dim=1)
    right = predicted == truth
    sure = probabilities.max(dim=1).values
    # misread first, the surest error at the front; then the right ones, the least sure at the front
    order = torch.argsort(torch.where(right, 2 + sure, 1 - sure))[:SHOWN].tolist()
    wrong = int((~right).sum())
    rest = f"{SHOWN} of them below" if wrong > SHOWN else "in grey: read right, but least surely"
    title = f"{wrong} of {len(truth)} held-out digits misread by pydl's model\n{rest if wrong != SHOWN else ''}"
    figure.suptitle(title, x=0.02, ha="left", color=INK, fontsize=10)
    for axes, index in zip(figure.subplots(4, 3).flat, order, strict=True):
        axes.imshow(digits.test_x[index, 0].cpu(), cmap="gray_r", interpolation="nearest", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        is_wrong = not right[index]
        text = f"read {predicted[index]}, is {truth[index]}" if is_wrong else f"read {predicted[index]}"
        axes.set_title(f"{text} ({sure[index]:.0%} sure)", fontsize=9, color=RED if is_wrong else GREY)
        for spine in axes.spines.values():
            spine.set(visible=True, color=RED if is_wrong else PALE, linewidth=1.5)
