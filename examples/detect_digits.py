"""Trains a small YOLO-style detector on scenes of real handwritten digits, and shows what non-maximum suppression does.

The network is plain torch.nn, accelerated by `pydl.accelerate(model)`. It divides the scene into S x S cells; each cell
predicts B boxes with a confidence and one distribution over C classes, S x S x (B * 5 + C) numbers in all. Several
cells and boxes answer to one digit: `pydl.ops.batched_nms` keeps the best of each class; `pydl.metrics` compares the
mean average precision before and after.

Data: scikit-learn's bundled digits, composed into scenes, the held-out ones from scans that training never saw.
Source: Redmon, Divvala, Girshick, Farhadi, You Only Look Once, 2016 (grid, responsible box, loss).

    python examples/detect_digits.py                two to three minutes on two cores
    python examples/detect_digits.py --quick        half a minute, for tests
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# a thread that waits for the others sleeps: beside other busy programs a spinning one costs minutes
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for pydl in a checkout that is not installed

import _detect_scenes  # noqa: E402
import _progress  # noqa: E402
from _detect_scenes import GRID, SIDE, Scenes  # noqa: E402

import pydl  # noqa: E402
from pydl.metrics import mean_average_precision  # noqa: E402

BOXES, CLASSES = 2, 10
CELL = SIDE / GRID
BATCH = 32
IOU = 0.5
LEAST_SCORE = 0.05
LEARNING_RATE = 2e-3  # falls in a straight line to a twentieth
COORDINATES, NOTHING = 5.0, 0.5  # the paper's weights of boxes and of empty cells
FULL = {"steps": 1200, "scenes": 4000, "tests": 300, "min_map": 0.8}
QUICK = {"steps": 300, "scenes": 1000, "tests": 100, "min_map": 0.3}

Detections = dict[str, Tensor]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; --quick changes the defaults of the other options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and scenes, a lower bar for the mAP")
    parser.add_argument("--steps", type=int, help=f"of training, default {FULL['steps']}")
    parser.add_argument("--scenes", type=int, help=f"to train on, default {FULL['scenes']}")
    parser.add_argument("--tests", type=int, help=f"held-out scenes, default {FULL['tests']}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the scenes")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the picture")
    parser.add_argument("--min-map", type=float, help=f"exit 1 below this mAP@0.5; default {FULL['min_map']}")
    args = parser.parse_args(arguments)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "scenes", "tests"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def detector(seed: int) -> nn.Sequential:
    """[N, 1, 96, 96] -> [N, B * 5 + C, 6, 6]. A stride and three poolings halve the side: 96, 48, 24, 12, 6."""
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 5, 2),
        nn.MaxPool2d(3, 2, 1),
        *block(16, 32),
        nn.MaxPool2d(3, 2, 1),
        *block(32, 64),
        *block(64, 64),
        nn.MaxPool2d(3, 2, 1),
        *block(64, 128),
        nn.Conv2d(128, BOXES * 5 + CLASSES, 1),
    )


def decode(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [N, B, S, S, 4] in pixels, confidences [N, B, S, S] as logits, classes [N, S, S, C] as logits."""
    n = output.shape[0]
    raw = output[:, : BOXES * 5].reshape(n, BOXES, 5, GRID, GRID)
    at = torch.arange(GRID, device=output.device)
    x = (raw[:, :, 0].sigmoid() + at) * CELL
    y = (raw[:, :, 1].sigmoid() + at[:, None]) * CELL
    width, height = (SIDE / 2 * raw[:, :, i].sigmoid() for i in (2, 3))
    boxes = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)
    return boxes, raw[:, :, 4], output[:, BOXES * 5 :].permute(0, 2, 3, 1)


def grid_targets(scenes: Scenes, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each cell whether a digit has its centre there, its box [N, S, S, 4] and its label [N, S, S]."""
    n = len(chosen)
    there = torch.zeros(n, GRID, GRID, dtype=torch.bool)
    boxes, labels = torch.zeros(n, GRID, GRID, 4), torch.zeros(n, GRID, GRID, dtype=torch.int64)
    for i, scene in enumerate(chosen.tolist()):
        box = scenes.boxes[scene]
        column, row = ((box[:, :2] + box[:, 2:]) / 2 / CELL).long().unbind(-1)
        there[i, row, column], boxes[i, row, column], labels[i, row, column] = True, box, scenes.labels[scene]
    return there, boxes, labels


def loss_of(output: Tensor, there: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """The paper's loss, with logistic confidences and cross-entropy: boxes by centre and root of the size."""
    boxes, confidence, classes = decode(output)
    wanted = target.unsqueeze(1).expand_as(boxes)
    with torch.no_grad():
        best = _paired_iou(boxes, wanted).argmax(1, keepdim=True)
        mine = torch.zeros_like(confidence, dtype=torch.bool).scatter_(1, best, True) & there.unsqueeze(1)
    got, goal = boxes[mine], wanted[mine]
    centres = ((got[:, :2] + got[:, 2:] - goal[:, :2] - goal[:, 2:]) / (2 * CELL)).square().sum()
    sizes = ((got[:, 2:] - got[:, :2]).clamp(min=1) / CELL).sqrt() - ((goal[:, 2:] - goal[:, :2]) / CELL).sqrt()
    binary = nn.functional.binary_cross_entropy_with_logits(confidence, mine.float(), reduction="none")
    named = nn.functional.cross_entropy(classes[there], labels[there], reduction="sum")
    weighted = COORDINATES * (centres + sizes.square().sum()) + binary[mine].sum() + NOTHING * binary[~mine].sum()
    return (weighted + named) / output.shape[0]


def _paired_iou(a: Tensor, b: Tensor) -> Tensor:
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return shared / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared).clamp(min=1e-6)


def train(model: nn.Module, scenes: Scenes, steps: int, seed: int) -> list[float]:
    """The loss at each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    with _progress.bar(steps) as advance:
        for index in range(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - 0.95 * index / steps)
            chosen = torch.randint(len(scenes.images), (BATCH,), generator=generator)
            loss = loss_of(model(scenes.images[chosen]), *grid_targets(scenes, chosen))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            advance(f"step {index + 1}/{steps}, loss {losses[-1]:.3f}")
    return losses


@torch.no_grad()
def detect(model: nn.Module, images: Tensor) -> list[Detections]:
    """Every box whose confidence times class probability is not negligible, before any suppression."""
    model.eval()
    found: list[Detections] = []
    for part in images.split(100):
        boxes, confidence, classes = decode(model(part))
        probability, label = classes.softmax(-1).max(-1)
        scores = confidence.sigmoid() * probability.unsqueeze(1)
        labels = label.unsqueeze(1).expand_as(scores)
        for i in range(len(part)):
            keep = scores[i] > LEAST_SCORE
            found.append({"boxes": boxes[i][keep], "scores": scores[i][keep], "labels": labels[i][keep]})
    return found


def suppress(detections: list[Detections]) -> list[Detections]:
    """The best box of each class and every other that overlaps it by at most IOU: pydl.ops.batched_nms."""
    kept = []
    for d in detections:
        index = pydl.ops.batched_nms(d["boxes"], d["scores"], d["labels"], IOU)
        kept.append({name: values[index] for name, values in d.items()})
    return kept


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Trains, detects, suppresses, draws; 1 when the mAP is too low, 2 when a package is missing."""
    args = parse(arguments)
    try:
        import _detect_picture
        import sklearn  # noqa: F401
    except ImportError as missing:
        print(f"detect_digits: missing {missing.name}: pip install scikit-learn matplotlib", file=sys.stderr)
        return 2
    painter, held_out = _detect_scenes.load(args.seed)
    scenes = painter.scenes(args.scenes, np.random.default_rng(args.seed))
    tests = held_out.scenes(args.tests, np.random.default_rng(args.seed + 1))
    model = detector(args.seed)
    heading("report = pydl.accelerate(model)")
    print(pydl.accelerate(model))

    heading(f"Training on {args.scenes} scenes, {args.steps} steps of {BATCH}, {torch.get_num_threads()} threads")
    begin = time.perf_counter()
    losses = train(model, scenes, args.steps, args.seed)
    print(f"{time.perf_counter() - begin:.0f} s; loss {losses[0]:.2f} at first, {np.mean(losses[-20:]):.2f} in the end")

    heading(f"Detecting in {args.tests} held-out scenes")
    with pydl.trace() as seen:
        raw = detect(model, tests.images)
        kept = suppress(raw)
    truth = [{"boxes": b, "labels": n} for b, n in zip(tests.boxes, tests.labels, strict=True)]
    before, after = (mean_average_precision(d, truth, iou_thresholds=(IOU,)).map for d in (raw, kept))
    counts = [sum(len(d["scores"]) for d in found) for found in (raw, kept)]
    digits = sum(len(n) for n in tests.labels)
    print(f"without suppression  mAP@{IOU} {before:.3f}, {counts[0]} boxes for {digits} digits")
    print(f"with suppression     mAP@{IOU} {after:.3f}, {counts[1]} boxes")
    heading("What ran where, and why (pydl.trace())")
    print(seen)
    print(f"\npicture: {_detect_picture.draw(args.out / 'detect_digits.png', tests, raw, kept)}")
    if after < args.min_map:
        print(f"detect_digits: mAP {after:.3f} is below {args.min_map:.3f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
