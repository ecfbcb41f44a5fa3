"""Trains a network on real handwritten digits with pydl and with torch alone, and compares the two.

The networks are plain torch.nn: a LeNet, a small ResNet, and an AlexNet-style one (_digits_models.py names the papers);
`pydl.accelerate(model)` is the only line that knows of pydl. All trainings start from the same weights, see the same
batches and the same random numbers, and take turns epoch by epoch, so that they share the machine fairly. Any
difference in rounding grows while a network with ReLU and max pooling trains, so a third training gives the yardstick:
torch alone, its weights moved by one float32 rounding before each epoch.

The ResNet is also asked for its answers with `pydl.accelerate(model, fuse=True)`, which must be torch's.

Data: scikit-learn's bundled digits, 1,797 scans of 8 x 8 pixels, a quarter of them held out for the test.

    python examples/train_digits.py                 about ten seconds, then ten of measuring; the GPU where there is one
    python examples/train_digits.py --model resnet  about a minute, and so is alexnet
    python examples/train_digits.py --quick         a few seconds, for tests
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# a thread that waits for the others sleeps: beside other busy programs a spinning one costs minutes
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench/, and for pydl in a checkout that is not installed

import _digits_models  # noqa: E402
import _digits_picture  # noqa: E402
import _progress  # noqa: E402

import pydl  # noqa: E402

SIDE = 32  # LeNet-5's input; the scans are enlarged fourfold
BATCH = 32
LEARNING_RATE = 2e-3  # falls in a straight line to a tenth
ONE_ROUNDING = 2.0**-23
LOGIT_TOLERANCE = 1e-5  # of the largest logit: a few float32 roundings in each of a dozen layers
ROUNDS = 9  # of inference, over the whole test set


@dataclass
class Digits:
    """Scans [N, 1, SIDE, SIDE] in 0..1 and their labels [N], on one device."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Training:
    """One model on its way: its loss at each step and the seconds spent in training."""

    name: str
    model: nn.Module
    nudged: bool = False
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        # with Adam's usual eps of 1e-8, gradients that are nothing but rounding errors would become whole steps
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, eps=1e-3)

    def gaps(self, other: Training) -> list[float]:
        """Distance of the two loss curves at each step."""
        return [abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; --model and --quick change the defaults of the other options."""
    recipes = _digits_models.RECIPES
    epochs = ", ".join(f"{recipe.epochs} for {name}" for name, recipe in recipes.items())
    accuracies = ", ".join(f"{recipe.min_accuracy} for {name}" for name, recipe in recipes.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=recipes, default="lenet", help="default lenet")
    parser.add_argument("--quick", action="store_true", help="few epochs, no panel, a lower bar for the accuracy")
    parser.add_argument("--epochs", type=int, help=f"default {epochs}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the split, the batches and dropout")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the picture")
    parser.add_argument("--panel", type=float, metavar="SECONDS", help="time for the last panel; 0 leaves it out")
    parser.add_argument("--min-accuracy", type=float, help=f"exit 1 below it; default {accuracies}")
    args = parser.parse_args(arguments)
    recipe = recipes[args.model]
    full = {"epochs": recipe.epochs, "min_accuracy": recipe.min_accuracy, "panel": 10.0}
    quick = {"epochs": recipe.quick_epochs, "min_accuracy": recipe.quick_min_accuracy, "panel": 0.0}
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return args


def load(device: torch.device, seed: int) -> Digits:
    """The digits, enlarged, with a quarter of each class held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    x = nn.functional.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    y = torch.tensor(raw.target, dtype=torch.int64)
    train, test = train_test_split(range(len(y)), test_size=0.25, random_state=seed, stratify=raw.target)
    return Digits(*(t.to(device) for t in (x[train], y[train], x[test], y[test])))


def step(training: Training, x: Tensor, y: Tensor) -> Tensor:
    """One step of gradient descent; returns the loss, still on the device."""
    loss = nn.functional.cross_entropy(training.model(x), y)
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()
    return loss.detach()


def clock(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def epoch(training: Training, digits: Digits, batches: list[Tensor], learning_rate: float, seed: int) -> None:
    """One pass over the training set in the given batches; dropout draws the same numbers in every training."""
    if training.nudged:
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.mul_(1 + ONE_ROUNDING)
    training.optimizer.param_groups[0]["lr"] = learning_rate
    training.model.train()
    begin = clock(digits.train_x.device)
    losses = []
    for number, batch in enumerate(batches, start=len(training.losses)):
        torch.manual_seed(seed + number)
        losses.append(step(training, digits.train_x[batch], digits.train_y[batch]))
    training.seconds += clock(digits.train_x.device) - begin
    training.losses += torch.stack(losses).tolist()


def train(trainings: list[Training], digits: Digits, epochs: int, seed: int) -> None:
    """Train all, epoch by epoch in turns; who begins changes each time. One step each is a warm-up on a copy."""
    for training in trainings:
        step(Training("warm-up", copy.deepcopy(training.model)), digits.train_x[:BATCH], digits.train_y[:BATCH])
    generator = torch.Generator().manual_seed(seed)
    with _progress.bar(epochs * len(trainings)) as advance:
        for index in range(epochs):
            order = torch.randperm(len(digits.train_y), generator=generator).to(digits.train_y.device)
            learning_rate = LEARNING_RATE * (1 - 0.9 * index / epochs)
            first = index % len(trainings)
            for training in trainings[first:] + trainings[:first]:
                epoch(training, digits, list(order.split(BATCH)), learning_rate, seed)
                advance(f"epoch {index + 1}/{epochs}, {training.name}: loss {training.losses[-1]:.4f}")


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities [N, 10]."""
    model.eval()
    return model(x).softmax(dim=1)


def traced_step(training: Training, digits: Digits) -> pydl.trace:
    """What one training step runs on, taken on a copy of the model."""
    twin = Training("trace", copy.deepcopy(training.model).train())
    with pydl.trace() as seen:
        step(twin, digits.train_x[:BATCH], digits.train_y[:BATCH])
    return seen


def without_kernel(report: object) -> str:
    """The modules accelerate left to torch, by class and reason."""
    kept = Counter((row.kind, row.reason) for row in report.kept)
    return "\n".join(f"  {kind} ({count}): {reason}" for (kind, reason), count in kept.items()) or "  none"


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def accuracy(model: nn.Module, digits: Digits) -> tuple[float, int]:
    """Share of the held-out digits that are read right, and how many are not."""
    right = predict(model, digits.test_x).argmax(dim=1) == digits.test_y
    return right.double().mean().item(), int((~right).sum())


def compare(theirs: Training, ours: Training, nudged: Training, digits: Digits) -> float:
    """Print the figures of the trainings side by side; returns the accuracy of ours."""
    (our_share, misread), (their_share, their_misread) = (accuracy(t.model, digits) for t in (ours, theirs))
    gaps = ours.gaps(theirs)
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    tested = len(digits.test_y)
    print(
        f"test accuracy  {our_share:.2%} with pydl ({misread} of {tested} held-out digits misread), "
        f"{their_share:.2%} with torch alone ({their_misread} misread)\n"
        f"loss curves    largest difference {gaps[worst]:.1e}, at step {worst + 1} of {len(gaps)}, where the loss is "
        f"{theirs.losses[worst]:.2g}; at the first step {gaps[0]:.1e}\n"
        f"    yardstick  largest difference {max(nudged.gaps(theirs)):.1e} between torch and torch with its weights "
        f"moved by one rounding\n"
        f"training time  {ours.seconds:.2f} s with pydl, {theirs.seconds:.2f} s with torch alone: "
        f"torch / pydl = {theirs.seconds / ours.seconds:.2f}"
    )
    return our_share


@torch.no_grad()
def fused_inference(trained: nn.Module, x: Tensor) -> float:
    """Compare accelerate(fuse=True) with torch alone on x; returns the largest difference, relative to the logits."""
    theirs, ours = (copy.deepcopy(trained).eval() for _ in range(2))
    pydl.restore(theirs)
    report = pydl.accelerate(ours, fuse=True)
    print("\n".join(f"{row.name or '(model)'}: {row.reason}" for row in report.replaced))
    with pydl.trace() as seen:
        logits = ours(x)
    print(seen)
    expected = theirs(x)
    gap = ((logits - expected).abs().max() / expected.abs().max()).item()
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for model in (theirs, ours):
            begin = clock(x.device)
            model(x)
            seconds.append(clock(x.device) - begin)
        ratios.append(seconds[0] / seconds[1])
    print(
        f"logits         largest difference {gap:.1e} of the largest logit, {LOGIT_TOLERANCE:.0e} allowed\n"
        f"inference      {len(x)} digits at once: torch / pydl = {statistics.median(ratios):.2f}, "
        f"median of {ROUNDS} rounds"
    )
    return gap


def panel(seconds: float, device: torch.device) -> None:
    """Ratios of pydl to torch on this machine, measured now by the benchmark harness."""
    try:
        from bench._panel import where_pydl_pays
    except ImportError as failure:
        print(f"the panel is left out: bench/ cannot be imported ({failure})")
        return
    where_pydl_pays(seconds, device.type)


def main(arguments: list[str] | None = None) -> int:
    """Trains, compares, draws; 1 when the accuracy is too low, 2 when a package is missing."""
    args = parse(arguments)
    missing = [
        p for p, module in (("scikit-learn", "sklearn"), ("matplotlib", "matplotlib")) if not _importable(module)
    ]
    if missing:
        print(f"train_digits: missing {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    torch.backends.cudnn.deterministic = True  # so that a difference between the curves is pydl's, not cuDNN's
    digits = load(args.device, args.seed)
    torch.manual_seed(args.seed)
    theirs = Training("torch alone", _digits_models.RECIPES[args.model].build().to(args.device))
    ours = Training("pydl", copy.deepcopy(theirs.model))
    nudged = Training("torch, nudged", copy.deepcopy(theirs.model), nudged=True)

    heading("report = pydl.accelerate(model)")
    report = pydl.accelerate(ours.model)
    print(report)

    on_gpu = args.device.type == "cuda"
    where = torch.cuda.get_device_name(args.device) if on_gpu else f"{torch.get_num_threads()} threads"
    heading(f"Training {args.model} on {len(digits.train_y)} digits, {args.epochs} epochs, on {args.device} ({where})")
    train([theirs, ours, nudged], digits, args.epochs, args.seed)
    share = compare(theirs, ours, nudged, digits)

    heading("What one training step ran on, and why (pydl.trace())")
    print(traced_step(ours, digits))
    print("Where torch runs the forward it runs its own backward, which leaves no record. Modules left to torch:")
    print(without_kernel(report))

    gap = 0.0
    if args.model == "resnet":
        heading("Inference with pydl.accelerate(model, fuse=True)")
        gap = fused_inference(ours.model, digits.test_x)
    probabilities = predict(ours.model, digits.test_x)
    name = "train_digits.png" if args.model == "lenet" else f"train_digits_{args.model}.png"
    picture = _digits_picture.draw(args.out / name, [theirs, ours, nudged], digits, probabilities)
    print(f"\npicture: {picture}")
    if args.panel > 0:
        print()
        panel(args.panel, args.device)
    if share < args.min_accuracy:
        print(f"train_digits: test accuracy {share:.2%} is below {args.min_accuracy:.2%}", file=sys.stderr)
        return 1
    if not gap <= LOGIT_TOLERANCE:
        print(f"train_digits: the fused model's logits are {gap:.1e} from torch's", file=sys.stderr)
        return 1
    return 0


def _importable(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
