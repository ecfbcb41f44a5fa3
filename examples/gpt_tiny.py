"""Trains a small GPT on the Python standard library's own source, with pydl and with torch alone.

Functions and classes of the library are the documents. Several of them are packed into each row of a batch, and a mask
says what belongs together: a bool tensor that torch's attention adds to every score, and in which pydl skips what is
hidden. The network is plain torch.nn: pydl.accelerate(model) exchanges its modules, and the one function it calls is
taken from pydl.functional instead of torch.nn.functional.

Both begin with the same weights and see the same batches; their losses are compared step by step. A third training,
torch alone with its weights moved by one float32 rounding before the first step, shows how far rounding takes two
trainings apart. pydl then goes on alone and writes some code.

Network: GPT-2's pre-norm blocks on bytes (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).

    python examples/gpt_tiny.py                 two to three minutes on two cores
    python examples/gpt_tiny.py --quick         a few seconds, for tests
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# a thread that waits for the others sleeps: beside other busy programs a spinning one costs minutes
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for pydl in a checkout that is not installed

import _progress  # noqa: E402

import pydl  # noqa: E402
import pydl.functional  # noqa: E402

START = 0  # the byte before each document, and what follows its end
VOCABULARY = 128
ONE_ROUNDING = 2.0**-23
FULL = {"steps": 300, "compared": 40, "length": 512, "width": 128, "layers": 4, "characters": 500}
QUICK = {"steps": 12, "compared": 8, "length": 256, "width": 32, "layers": 2, "characters": 40}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; --quick changes the defaults of the other options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer steps")
    parser.add_argument("--steps", type=int, help=f"of the training with pydl; default {FULL['steps']}")
    parser.add_argument("--compared", type=int, help=f"steps that torch makes beside it; default {FULL['compared']}")
    parser.add_argument("--length", type=int, help=f"characters in a row; default {FULL['length']}")
    parser.add_argument("--width", type=int, help=f"of the network; default {FULL['width']}")
    parser.add_argument("--layers", type=int, help=f"default {FULL['layers']}")
    parser.add_argument("--characters", type=int, help=f"to write at the end; default {FULL['characters']}")
    parser.add_argument("--batch", type=int, default=4, help="rows in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and samples")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    args = parser.parse_args(arguments)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 1 <= args.compared <= args.steps:
        parser.error(f"--compared must be between 1 and --steps, got {args.compared} and {args.steps}")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


# text


def documents(limit: int) -> list[bytes]:
    """Top-level functions and classes of the standard library, in ASCII, each up to `limit` characters."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for piece in re.split(r"\n(?=(?:def|class|@)[ \w])", text)[1:]:
            data = piece.strip().encode("ascii", "ignore") + b"\n"
            found += [data[i : i + limit] for i in range(0, len(data), limit)]
    return found


@dataclass
class Batch:
    """Packed documents: input and target characters [B, S], positions [B, S], mask [B, 1, S, S], True = see."""

    x: Tensor
    y: Tensor
    positions: Tensor
    mask: Tensor


def batches(texts: list[bytes], rows: int, length: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Endless batches; documents in random order, packed one after the other, the last of a row cut off."""
    generator = torch.Generator().manual_seed(seed)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    while True:
        characters = torch.zeros(rows, length + 1, dtype=torch.int64)
        numbers = torch.zeros(rows, length + 1, dtype=torch.int64)
        positions = torch.zeros(rows, length + 1, dtype=torch.int64)
        for row in range(rows):
            filled = number = 0
            while filled <= length:
                text = texts[int(torch.randint(len(texts), (1,), generator=generator))]
                piece = torch.tensor([START, *text])[: length + 1 - filled]
                here = slice(filled, filled + len(piece))
                characters[row, here], numbers[row, here] = piece, number
                positions[row, here] = torch.arange(len(piece))
                filled, number = filled + len(piece), number + 1
        x, y, numbers, positions = (
            t.to(device) for t in (characters[:, :-1], characters[:, 1:], numbers[:, :-1], positions[:, :-1])
        )
        mask = (numbers[:, :, None] == numbers[:, None, :]) & causal
        yield Batch(x, y, positions, mask.unsqueeze(1))


# network


class Block(nn.Module):
    """Attention and a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.attend = heads, nn.functional.scaled_dot_product_attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, s, width = x.shape
        # [B, S, H, D] seen as [B, H, S, D]
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = self.attend(q, k, v, mask, is_causal=mask is None)
        x = x + self.out(attended.transpose(1, 2).reshape(b, s, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Characters and positions in, scores of the next character out."""

    def __init__(self, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.characters.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.characters(x) + self.places(positions)
        for block in self.blocks:
            h = block(h, mask)
        return self.head(self.norm(h))


def with_pydl(model: GPT) -> tuple[GPT, pydl.accelerate.Report]:
    """A copy of the model on pydl, and what was replaced in it."""
    copied = copy.deepcopy(model)
    for block in copied.blocks:
        block.attend = pydl.functional.scaled_dot_product_attention
    return copied, pydl.accelerate(copied)


# training


@dataclass
class Training:
    """A model on its way: the loss and the seconds of each step."""

    name: str
    model: GPT
    learning_rate: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        # with Adam's usual eps of 1e-8, gradients that are nothing but rounding errors would become whole steps
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate, eps=1e-5)

    def step(self, batch: Batch, share: float) -> None:
        """One step of gradient descent at this share of the learning rate."""
        begin = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * share
        scores = self.model(batch.x, batch.positions, batch.mask)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), batch.y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)


def train(trainings: list[Training], source: Iterator[Batch], steps: int, compared: int) -> None:
    """All of them for `compared` steps in turns, the first alone for the rest."""
    with _progress.bar(steps) as advance:
        for index in range(steps):
            batch = next(source)
            share = min(1.0, (index + 1) / 20) * (1 - 0.9 * index / steps)
            active = trainings if index < compared else trainings[:1]
            first = index % len(active)
            for training in active[first:] + active[:first]:
                training.step(batch, share)
            advance(f"step {index + 1}/{steps}: loss {trainings[0].losses[-1]:.3f}")


@torch.no_grad()
def write(model: GPT, begin: str, characters: int, length: int, generator: torch.Generator) -> str:
    """Continues a text, a character at a time, with the 20 likeliest to choose from."""
    device = model.head.weight.device
    text = [START, *begin.encode("ascii")]
    for _ in range(characters):
        seen = torch.tensor(text[-length:], device=device).unsqueeze(0)
        scores = model(seen, torch.arange(seen.shape[1], device=device).unsqueeze(0))[0, -1]
        likely, which = (scores / 0.8).topk(20)
        chosen = torch.multinomial(likely.softmax(0).cpu(), 1, generator=generator)
        text.append(int(which[chosen]))
        if text[-1] == START:
            break
    return bytes(c for c in text if c != START).decode("ascii")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def compare(ours: Training, theirs: Training, nudged: Training) -> None:
    """Prints how far the curves are apart, beside torch's own distance from itself."""
    pairs = list(zip(ours.losses, theirs.losses, nudged.losses, strict=False))
    print(f"{'step':>6} {'pydl':>10} {'torch':>10} {'difference':>12} {'of torch, one rounding apart':>30}")
    for index in sorted({0, len(pairs) // 4, len(pairs) // 2, len(pairs) - 1}):
        a, b, c = pairs[index]
        print(f"{index + 1:>6} {a:>10.5f} {b:>10.5f} {abs(a - b):>12.1e} {abs(c - b):>30.1e}")
    largest, usual = (max(abs(p[i] - p[1]) for p in pairs) for i in (0, 2))
    print(f"largest difference in {len(pairs)} steps: {largest:.1e}, of torch from itself {usual:.1e}")
    ratios = [t / o for o, t in zip(ours.seconds[1:], theirs.seconds[1:], strict=False)]
    median = statistics.median(ours.seconds[1 : len(pairs)])
    print(f"time of a step: {median * 1e3:.0f} ms, torch / pydl {statistics.median(ratios):.2f}")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.manual_seed(args.seed)
    texts = documents(args.length // 2)
    plain = GPT(args.length, args.width, args.layers).to(args.device)
    model, report = with_pydl(plain)
    nudged = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.mul_(1 + ONE_ROUNDING)
    source = batches(texts, args.batch, args.length, args.seed, args.device)
    seen = next(source)
    parameters = sum(p.numel() for p in plain.parameters())
    print(
        f"{len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} MB; {parameters / 1e6:.2f} M parameters; "
        f"{args.batch} rows of {args.length}; a character sees {seen.mask.float().mean():.0%} of its row"
    )
    trainings = [Training(name, m, args.learning_rate) for name, m in (("pydl", model), ("torch", plain), ("", nudged))]
    heading("What a step runs on")
    with pydl.trace() as trace:
        nn.functional.cross_entropy(model(seen.x, seen.positions, seen.mask).flatten(0, 1), seen.y.flatten()).backward()
    for (op, backend), count in Counter((r.op, r.backend) for r in trace).items():
        print(f"  {op}: {backend} ({count})")
    print(f"  {len(report.replaced)} modules replaced")
    heading("Training")
    train(trainings, source, args.steps, args.compared)
    heading("The same curve")
    compare(*trainings)
    last = statistics.mean(trainings[0].losses[-10:])
    print(f"loss after {args.steps} steps with pydl: {last:.3f}, a choice among {math.exp(last):.1f} characters")
    heading("What it writes")
    generator = torch.Generator().manual_seed(args.seed)
    for begin in ("def ", "class "):
        print(write(model.eval(), begin, args.characters, args.length, generator), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
