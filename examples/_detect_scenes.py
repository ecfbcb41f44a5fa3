"""Scenes of handwritten digits at random places and sizes, with their boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

SIDE = 96
GRID = 6  # cells along each side: at most one digit has its centre in each
SIZES = (18, 22, 27, 33, 40)
MOST = 5
OVERLAP = 0.25  # of the smaller digit, at most


@dataclass
class Scenes:
    """Images [N, 1, SIDE, SIDE] in 0..1, and for each the boxes [n, 4] (x1, y1, x2, y2 in pixels) and labels [n]."""

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]


class Painter:
    """Draws scenes from a set of scans, each enlarged once to every size."""

    def __init__(self, scans: Tensor, labels: Tensor) -> None:
        self.labels = labels
        self.glyphs, self.tight = {}, {}
        for size in SIZES:
            large = nn.functional.interpolate(scans[:, None], size=(size, size), mode="bilinear", align_corners=False)
            self.glyphs[size] = large[:, 0].numpy()
            self.tight[size] = [_tight(glyph) for glyph in self.glyphs[size]]

    def scenes(self, count: int, rng: np.random.Generator) -> Scenes:
        """`count` new scenes of one to five digits on a noisy ground."""
        images = rng.uniform(0.0, 0.12, (count, SIDE, SIDE)).astype(np.float32)
        boxes: list[Tensor] = []
        labels: list[Tensor] = []
        for image in images:
            found = self._fill(image, rng)
            boxes.append(torch.tensor([box for box, _ in found], dtype=torch.float32))
            labels.append(torch.tensor([label for _, label in found]))
        return Scenes(torch.from_numpy(images)[:, None], boxes, labels)

    def _fill(self, image: np.ndarray, rng: np.random.Generator) -> list[tuple[list[float], int]]:
        found: list[tuple[list[float], int]] = []
        wanted = int(rng.integers(1, MOST + 1))
        taken = np.zeros((GRID, GRID), dtype=bool)
        for _ in range(8 * wanted):
            if len(found) == wanted:
                break
            size = int(rng.choice(SIZES))
            which = int(rng.integers(len(self.labels)))
            top, left = (int(n) for n in rng.integers(0, SIDE - size + 1, 2))
            x1, y1, x2, y2 = self.tight[size][which]
            box = [float(left + x1), float(top + y1), float(left + x2), float(top + y2)]
            cell = tuple(int((box[i] + box[i + 2]) / 2 * GRID / SIDE) for i in (1, 0))
            if taken[cell] or any(_shared(box, other) > OVERLAP for other, _ in found):
                continue
            taken[cell] = True
            patch = image[top : top + size, left : left + size]
            np.maximum(patch, rng.uniform(0.7, 1.0) * self.glyphs[size][which], out=patch)
            found.append((box, int(self.labels[which])))
        return found


def _tight(glyph: np.ndarray) -> tuple[int, int, int, int]:
    """The rows and columns with ink: left, top, right, bottom."""
    rows, columns = (np.flatnonzero((glyph > 0.15).any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _shared(a: list[float], b: list[float]) -> float:
    """Intersection over the smaller area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0.0) * max(height, 0.0) / smaller


def load(seed: int) -> tuple[Painter, Painter]:
    """Painters of training and of held-out scans of scikit-learn's digits: no scan is in both."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    scans, labels = torch.tensor(raw.images, dtype=torch.float32) / 16, torch.tensor(raw.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=seed, stratify=raw.target)
    return Painter(scans[train], labels[train]), Painter(scans[test], labels[test])
