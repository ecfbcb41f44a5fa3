"""Teaches a small network to write down spoken digit strings, with pydl's CTC loss, decoder and aligner.

eSpeak NG speaks the strings in 30 voice variants and 5 accents; the network is tested on 8 variants and an accent that
it has never heard. It reads log-mel features and writes letters, and nobody tells it when a letter is spoken: that is
what CTC is for (Graves, Fernandez, Gomez, Schmidhuber, ICML 2006). The network is plain torch.nn, its loss
torch.nn.CTCLoss; `pydl.accelerate(model)` makes it pydl's. The first steps are also taken with torch alone, from the
same weights and on the same batches, and the loss curves are compared.

    python examples/speech_ctc.py                   a minute or two on two cores; the GPU where there is one
    python examples/speech_ctc.py --seconds 60      a minute in all, with less data; it ends differently on each run
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# a thread that waits for the others sleeps: beside other busy programs a spinning one costs minutes
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for pydl in a checkout that is not installed

import _progress  # noqa: E402
import _speech_data as data  # noqa: E402
import _speech_picture  # noqa: E402
from _speech_data import BLANK, CLASSES, LETTERS, MELS, STRIDE, Batch, Recipe, Utterance  # noqa: E402
from _speech_espeak import Synthesiser, Unavailable  # noqa: E402

import pydl  # noqa: E402

BATCH = 16
LEARNING_RATE = 8e-3
COMPARED = 20  # steps that torch alone takes too
TIMED = 20  # repetitions, when the loss is timed
SHOWN = 8  # transcripts
WORDS_DRAWN = 4  # in the picture
HELD_OUT = 200  # utterances
FULL = {"utterances": 3000, "max_cer": 0.05}
UTTERANCES_PER_SECOND = 8  # of the budget: their synthesis takes a twentieth of it on a free core
BUDGET_MAX_CER = 0.25
FOR_THE_END = 0.1  # of the budget: decoding, the picture
AT_LEAST = 0.35  # of the budget: the training gets it even if the synthesis was slow


class Recogniser(nn.Module):
    """Two convolutions over time, a bidirectional GRU, and the probability of each letter and of the blank."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.sounds = nn.Sequential(
            nn.Conv1d(MELS, width, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.Conv1d(width, width, kernel_size=5, stride=STRIDE, padding=2),
            nn.ReLU(),
        )
        self.norm = nn.LayerNorm(width)
        self.context = nn.GRU(width, width, bidirectional=True)
        self.letters = nn.Linear(2 * width, CLASSES)
        self.loss = nn.CTCLoss(blank=BLANK, zero_infinity=True)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, T, MELS] and lengths [N] to log-probabilities [ceil(T / STRIDE), N, CLASSES] and lengths."""
        x = self.norm(self.sounds(features.transpose(1, 2)).permute(2, 0, 1))
        lengths = (lengths + STRIDE - 1) // STRIDE
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        x, _ = nn.utils.rnn.pad_packed_sequence(self.context(packed)[0])
        return self.letters(x).log_softmax(dim=2), lengths


@dataclass
class Training:
    """One model on its way: the loss of each step, and the seconds spent in the steps and in their loss."""

    name: str
    model: Recogniser
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    loss_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; --seconds changes the defaults of other options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=1500, help="of gradient descent; default 1500")
    length.add_argument("--seconds", type=float, help="budget for the whole program, instead of steps; at least 10")
    parser.add_argument(
        "--utterances", type=int, help=f"for training; default {FULL['utterances']}, with --seconds fewer"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the utterances and the batches")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the picture")
    cache = Path(tempfile.gettempdir()) / f"pydl_speech_{os.getuid()}"
    parser.add_argument("--cache", type=Path, default=cache, help=f"folder for the utterances; default {cache}")
    parser.add_argument(
        "--max-cer",
        type=float,
        help=f"exit 1 above this error rate; default {FULL['max_cer']}, with --seconds {BUDGET_MAX_CER}",
    )
    args = parser.parse_args(arguments)
    defaults = FULL
    if args.seconds is not None:
        defaults = {"utterances": round(UTTERANCES_PER_SECOND * args.seconds), "max_cer": BUDGET_MAX_CER}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in (("steps", 1), ("seconds", 10), ("utterances", BATCH)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return args


def utterances(recipe: Recipe, folder: Path) -> dict[str, list[Utterance]]:
    """The training and held-out utterances, from the cache where they are there."""
    path = data.cache_path(folder, recipe)
    if path.is_file():
        print(f"from the cache: {path}")
    else:
        say = Synthesiser()
        print(f"{recipe.train + recipe.held_out} utterances by {say.name}, kept in {path}")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # an utterance is too short to be shared: with two threads this takes longer
        with _progress.bar(recipe.train + recipe.held_out) as advance:
            data.write_cache(path, data.synthesise(recipe, say, advance))
        torch.set_num_threads(threads)
    return data.read_cache(path)


def clock(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def loss_and_slope(criterion: nn.Module, log_probs: Tensor, lengths: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss and its gradient with respect to the log-probabilities: the part of a step that is CTC."""
    log_probs = log_probs.detach().requires_grad_()
    loss = criterion(log_probs, batch.targets, lengths, batch.target_lengths)
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def step(training: Training, batch: Batch) -> None:
    """One step of gradient descent, with the clock on all of it and on the loss."""
    device = batch.features.device
    begin = clock(device)
    log_probs, lengths = training.model(batch.features, batch.lengths)
    before = clock(device)
    loss, slope = loss_and_slope(training.model.loss, log_probs, lengths, batch)
    training.loss_seconds += clock(device) - before
    training.optimizer.zero_grad()
    log_probs.backward(slope)
    nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    training.optimizer.step()
    training.losses.append(loss.item())
    training.seconds += clock(device) - begin


def train(theirs: Training, ours: Training, spoken: list[Utterance], progress: Callable[[int], float], args) -> None:
    """Train ours until `progress(steps done)` is 1, and theirs for the first steps on the same batches."""
    by_length = sorted(spoken, key=lambda u: len(u.features))
    choose = random.Random(args.seed)
    shown = 0
    with _progress.bar(100) as advance:
        while (part := progress(len(ours.losses))) < 1:
            batch = data.training_batch(by_length, BATCH, part, choose).to(args.device)
            both = (theirs, ours) if len(ours.losses) % 2 else (ours, theirs)
            for training in both if len(ours.losses) < COMPARED else (ours,):
                # up in a straight line, level, and down in a straight line over the second half
                rate = LEARNING_RATE * min(1.0, 0.1 + part / 0.03, 0.02 + 2 * (1 - part))
                training.optimizer.param_groups[0]["lr"] = rate
                step(training, batch)
            while shown < min(100, int(100 * progress(len(ours.losses)))):
                shown += 1
                advance(f"step {len(ours.losses)}: loss {ours.losses[-1]:.4f}")


@torch.no_grad()
def transcribe(model: Recogniser, spoken: Sequence[Utterance], device: torch.device) -> list[str]:
    """What the model hears in each utterance: the most probable class of each frame, repeats and blanks taken out."""
    texts = []
    for begin in range(0, len(spoken), BATCH):
        batch = data.collate(spoken[begin : begin + BATCH]).to(device)
        labels, lengths, _ = pydl.ops.ctc_greedy_decode(*model(batch.features, batch.lengths), blank=BLANK)
        for row, length in zip(labels.tolist(), lengths.tolist(), strict=True):
            texts.append("".join(LETTERS[label] for label in row[:length]))
    return texts


def edits(heard: str, truth: str) -> int:
    """Fewest insertions, deletions and substitutions between the two (Levenshtein, 1966)."""
    row = list(range(len(truth) + 1))
    for i, a in enumerate(heard, 1):
        above, row = row, [i]
        for j, b in enumerate(truth, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def error_rate(heard: Sequence[str], spoken: Sequence[Utterance]) -> float:
    """Edits over letters spoken (a space counts as a letter)."""
    return sum(edits(h, u.text) for h, u in zip(heard, spoken, strict=True)) / sum(len(u.text) for u in spoken)


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def report_transcripts(heard: list[str], spoken: list[Utterance]) -> float:
    """Print some transcripts, the error rate of each variant and accent, and that of all, which is returned."""
    for text, utterance in list(zip(heard, spoken, strict=True))[:SHOWN]:
        print(f"{utterance.voice:>22}  said   {utterance.text}\n{'':>22}  heard  {text}")
    for kind, index in (("accent", 0), ("variant", 1)):
        rates = {}
        for name in sorted({u.voice.split("+")[index] for u in spoken}):
            chosen = [(h, u) for h, u in zip(heard, spoken, strict=True) if u.voice.split("+")[index] == name]
            rates[name] = error_rate(*zip(*chosen, strict=True))
        print(f"by {kind}: " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))
    cer = error_rate(heard, spoken)
    wrong = sum(h != u.text for h, u in zip(heard, spoken, strict=True))
    print(
        f"character error rate  {cer:.2%} on {len(spoken)} utterances by voices never heard in training; "
        f"{wrong} of them have an error"
    )
    return cer


def compare(theirs: Training, ours: Training) -> None:
    """Print how far the loss curves of the first steps are apart, and what the steps took."""
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses)]
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    print(
        f"loss curves    largest relative difference {gaps[worst]:.1e}, at step {worst + 1} of {len(gaps)}, where the "
        f"loss is {theirs.losses[worst]:.4g}; at the first step {gaps[0]:.1e}\n"
        f"training time  {ours.seconds:.1f} s with pydl for {len(ours.losses)} steps; the loss with its gradient took "
        f"{ours.loss_seconds:.2f} s ({ours.loss_seconds / ours.seconds:.1%})"
    )


def time_losses(theirs: Training, ours: Training, batch: Batch) -> None:
    """Time the loss with its gradient on one batch, in turns, and print the medians."""
    with torch.no_grad():
        log_probs, lengths = ours.model(batch.features, batch.lengths)
    times: dict[str, list[float]] = {theirs.name: [], ours.name: []}
    for _ in range(TIMED + 2):
        for training in (theirs, ours):
            begin = clock(log_probs.device)
            loss_and_slope(training.model.loss, log_probs, lengths, batch)
            times[training.name].append(clock(log_probs.device) - begin)
    torchs, pydls = (1e3 * statistics.median(times[training.name][2:]) for training in (theirs, ours))
    shape = " x ".join(map(str, log_probs.shape))
    print(
        f"loss and its gradient on {shape}: {pydls:.2f} ms with pydl, {torchs:.2f} ms with torch alone: "
        f"torch / pydl = {torchs / pydls:.2f}"
    )


@torch.no_grad()
def align(model: Recogniser, utterance: Utterance, device: torch.device) -> _speech_picture.Alignment:
    """When each letter of what was said is spoken: the most probable path through the model's output that spells it."""
    batch = data.collate([utterance]).to(device)
    log_probs, lengths = model(batch.features, batch.lengths)
    path, _ = pydl.ops.ctc_forced_align(log_probs, batch.targets, lengths, batch.target_lengths, blank=BLANK)
    return _speech_picture.Alignment(utterance, log_probs[:, 0].exp().cpu(), path[0].cpu())


def traced(training: Training, spoken: Sequence[Utterance], device: torch.device) -> pydl.trace:
    """What one training step, one decoding and one alignment run on, taken on a copy of the model."""
    twin = Training("trace", copy.deepcopy(training.model))
    with pydl.trace() as seen:
        step(twin, data.collate(spoken[:BATCH]).to(device))
        transcribe(twin.model, spoken[:BATCH], device)
        align(twin.model, spoken[0], device)
    return seen


def schedule(args: argparse.Namespace, begin: float) -> Callable[[int], float]:
    """The part of the training that is done, 0..1, from the number of steps done."""
    if args.seconds is None:
        return lambda done: done / args.steps
    start = time.perf_counter()
    end = max(start + AT_LEAST * args.seconds, begin + (1 - FOR_THE_END) * args.seconds)
    return lambda done: (time.perf_counter() - start) / (end - start)


def main(arguments: list[str] | None = None) -> int:
    """Trains, compares, transcribes, draws; 1 when the error rate is too high, 2 when something is missing."""
    begin = time.perf_counter()
    args = parse(arguments)
    try:
        import matplotlib  # noqa: F401

        heading("Spoken digit strings")
        spoken = utterances(Recipe(args.utterances, HELD_OUT, args.seed), args.cache)
    except ImportError:
        print("speech_ctc: missing matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    except Unavailable as failure:
        print(f"speech_ctc: {failure}", file=sys.stderr)
        return 2
    torch.backends.cudnn.deterministic = True  # so that a difference between the curves is pydl's, not cuDNN's
    torch.manual_seed(args.seed)
    theirs = Training("torch alone", Recogniser().to(args.device))
    ours = Training("pydl", copy.deepcopy(theirs.model))

    heading("report = pydl.accelerate(model)")
    print(pydl.accelerate(ours.model))

    on_gpu = args.device.type == "cuda"
    where = torch.cuda.get_device_name(args.device) if on_gpu else f"{torch.get_num_threads()} threads"
    heading(f"Training on {len(spoken['train'])} utterances, on {args.device} ({where})")
    train(theirs, ours, spoken["train"], schedule(args, begin), args)
    compare(theirs, ours)
    time_losses(theirs, ours, data.collate(spoken["held out"][:BATCH]).to(args.device))

    heading("What a training step, a decoding and an alignment ran on, and why (pydl.trace())")
    print(traced(ours, spoken["held out"], args.device))

    ours.model.eval()
    heading("Voices never heard in training")
    cer = report_transcripts(transcribe(ours.model, spoken["held out"], args.device), spoken["held out"])
    chosen = next(u for u in spoken["held out"] if u.text.count(" ") == WORDS_DRAWN - 1)
    aligned = align(ours.model, chosen, args.device)
    heading(f"Forced alignment of {chosen.text!r} by {chosen.voice}")
    for word in aligned.words():
        print(f"{word.text:>6}  {word.begin:.2f} s to {word.end:.2f} s")
    print(f"\npicture: {_speech_picture.draw(args.out / 'speech_ctc.png', aligned)}")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if cer > args.max_cer:
        print(f"speech_ctc: character error rate {cer:.2%} is above {args.max_cer:.2%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
