"""The picture of examples/detect_digits.py: scenes with every box that was predicted, and with those that were kept."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from _detect_scenes import SIDE, Scenes  # isort: skip

SHOWN = 5
LEAST_SHOWN = 0.15  # weaker boxes would cover the scene


def draw(path: Path, scenes: Scenes, raw: list, kept: list) -> Path:
    """Draws the first scenes with several digits; returns the path."""
    chosen = [i for i, boxes in enumerate(scenes.boxes) if len(boxes) > 2][:SHOWN] or [0]
    figure, rows = plt.subplots(2, len(chosen), figsize=(3.1 * len(chosen), 6.6), squeeze=False, layout="constrained")
    for axes, title, found in zip(rows, ("before suppression", "after"), (raw, kept), strict=True):
        for ax, i in zip(axes, chosen, strict=True):
            _scene(ax, scenes.images[i, 0], found[i])
        axes[0].set_ylabel(title, fontsize=12)
    figure.suptitle("Digits found in held-out scenes; width of a box by its score, label and score at its corner")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _scene(ax: Axes, image, found: dict) -> None:
    ax.imshow(image, cmap="gray_r", vmin=0, vmax=1, extent=(0, SIDE, SIDE, 0))
    ax.set(xlim=(0, SIDE), ylim=(SIDE, 0), xticks=[], yticks=[])
    for box, score, label in zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist()):
        if score < LEAST_SHOWN:
            continue
        x1, y1, x2, y2 = box
        colour = f"C{label}"
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=0.6 + 2 * score))
        ax.text(x1 + 1, y1 - 1, f"{label} {score:.2f}", color=colour, fontsize=8, clip_on=True)
