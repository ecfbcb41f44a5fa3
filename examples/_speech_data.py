"""Spoken digit strings: who says what, log-mel features, the cache, and batches."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from _speech_espeak import Synthesiser
from torch import Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = " " + "".join(sorted(set("".join(WORDS))))
BLANK = len(LETTERS)  # the last class
CLASSES = len(LETTERS) + 1

TRAIN_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-029")
TRAIN_VARIANTS = tuple(
    "m1 m2 m3 m4 m6 m7 f1 f3 f4 Alex Alicia Andy Denis Gene Michael Mike Lee Storm adam benjamin announcer "
    "belinda boris linda max john quincy rob travis grandma".split()
)
# never heard in training: these variants (none is a training variant under another name), and the Scottish accent
HELD_OUT_ACCENTS = (*TRAIN_ACCENTS, "en-gb-scotland")
HELD_OUT_VARIANTS = ("f2", "f5", "m5", "m8", "Annie", "edward", "norbert", "victor")

DIGITS = (1, 6)  # in a string
SPEEDS = (120, 210)  # words per minute
PITCHES = (30, 70)  # 50 is the voice's own
NOISE_DB = (-55.0, -35.0)  # white noise under each utterance, against full scale

MELS = 40
WINDOW = 0.025  # seconds
HOP = 0.010
FFT = 1024
STRIDE = 3  # feature frames to one output of the network
LOWEST, HIGHEST = 80.0, 8000.0  # Hz

STRETCH = 0.15  # of the mel axis, up or down
MASKED = 8  # mel bands, at most
VERSION = 1  # of what is synthesised and of the features: a cache of another version is not used


@dataclass(frozen=True)
class Recipe:
    """What is synthesised; the same recipe gives the same data."""

    train: int
    held_out: int
    seed: int


@dataclass
class Utterance:
    """One digit string, spoken.

    Attributes:
        text: the words.
        voice: accent and variant.
        features: log-mel [T, MELS], mean 0 and variance 1 over the utterance.
    """

    text: str
    voice: str
    features: Tensor

    def labels(self) -> Tensor:
        """Classes [S] of the letters."""
        return torch.tensor([LETTERS.index(letter) for letter in self.text])


@dataclass
class Batch:
    """Utterances padded to the longest: features [N, T, MELS], targets [N, S], and the lengths [N] of both."""

    features: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def hertz_to_mel(hertz: float) -> float:
    """2595 log10(1 + f / 700) (O'Shaughnessy, Speech Communication, 1987)."""
    return 2595 * math.log10(1 + hertz / 700)


def mel_to_hertz(mel: float) -> float:
    """The inverse of `hertz_to_mel`."""
    return 700 * (10 ** (mel / 2595) - 1)


def mel_edges() -> Tensor:
    """Hz [MELS + 2]: band i rises from edge i, has its peak at edge i + 1, and ends at edge i + 2."""
    lowest, highest = hertz_to_mel(LOWEST), hertz_to_mel(HIGHEST)
    return torch.tensor([mel_to_hertz(mel.item()) for mel in torch.linspace(lowest, highest, MELS + 2)])


@functools.cache
def mel_filters(rate: int) -> Tensor:
    """Triangles of peak 1, equally wide in mel (Davis and Mermelstein, IEEE TASSP 28(4), 1980): [FFT / 2 + 1, MELS]."""
    frequencies = torch.linspace(0, rate / 2, FFT // 2 + 1)[:, None]
    edges = mel_edges()
    left, peak, right = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((frequencies - left) / (peak - left), (right - frequencies) / (right - peak)).clamp(min=0)


def log_mel(samples: Tensor, rate: int) -> Tensor:
    """Logarithm of the energy in each mel band [T, MELS], normalised over the utterance; samples [M]."""
    length = round(WINDOW * rate)
    spectrum = torch.stft(
        samples, FFT, round(HOP * rate), length, torch.hann_window(length), center=True, return_complex=True
    )
    energies = torch.log(spectrum.abs().square().T @ mel_filters(rate) + 1e-6)
    return (energies - energies.mean()) / energies.std()


def speak(say: Synthesiser, choose: random.Random, accents: Sequence[str], variants: Sequence[str]) -> Utterance:
    """A random string of digits in a random voice, speed and pitch, with some noise under it."""
    text = " ".join(choose.choices(WORDS, k=choose.randint(*DIGITS)))
    voice = f"{choose.choice(accents)}+{choose.choice(variants)}"
    samples = torch.from_numpy(say(text, voice, choose.randint(*SPEEDS), choose.randint(*PITCHES)))
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(choose.getrandbits(32)))
    samples = samples + 10 ** (choose.uniform(*NOISE_DB) / 20) * noise
    return Utterance(text, voice, log_mel(samples, say.rate))


def synthesise(recipe: Recipe, say: Synthesiser, advance: Callable[[str], object]) -> dict[str, list[Utterance]]:
    """Training and held-out utterances; `advance` is called with the text of each."""
    parts: dict[str, list[Utterance]] = {}
    for part, count, accents, variants in (
        ("held out", recipe.held_out, HELD_OUT_ACCENTS, HELD_OUT_VARIANTS),
        ("train", recipe.train, TRAIN_ACCENTS, TRAIN_VARIANTS),
    ):
        choose = random.Random(f"{part}, seed {recipe.seed}")
        parts[part] = []
        for _ in range(count):
            parts[part].append(speak(say, choose, accents, variants))
            advance(f"{part}: {parts[part][-1].voice}")
    return parts


def cache_path(folder: Path, recipe: Recipe) -> Path:
    """The file of a recipe; its name changes with anything that the data depend on."""
    voices = TRAIN_ACCENTS, TRAIN_VARIANTS, HELD_OUT_ACCENTS, HELD_OUT_VARIANTS
    speech, features = (DIGITS, SPEEDS, PITCHES, NOISE_DB), (MELS, WINDOW, HOP, FFT, LOWEST, HIGHEST)
    depends = (VERSION, recipe, voices, speech, features)
    return folder / f"digits_{hashlib.sha256(repr(depends).encode()).hexdigest()[:16]}.pt"


def write_cache(path: Path, parts: dict[str, list[Utterance]]) -> None:
    """Features go into one float16 tensor for each part; the file appears when it is whole."""
    stored = {
        part: {
            "texts": [u.text for u in utterances],
            "voices": [u.voice for u in utterances],
            "frames": [len(u.features) for u in utterances],
            "features": torch.cat([u.features for u in utterances]).half(),
        }
        for part, utterances in parts.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(stored, partial)
    partial.replace(path)


def read_cache(path: Path) -> dict[str, list[Utterance]]:
    """What `write_cache` wrote, with features as float32."""
    stored = torch.load(path, weights_only=True)
    return {
        part: [
            Utterance(*each)
            for each in zip(one["texts"], one["voices"], one["features"].float().split(one["frames"]), strict=True)
        ]
        for part, one in stored.items()
    }


def collate(utterances: Sequence[Utterance]) -> Batch:
    """Pad to the longest: features with 0, their mean; targets with 0, which nobody reads."""
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        pad([u.features for u in utterances], batch_first=True),
        torch.tensor([len(u.features) for u in utterances]),
        pad([u.labels() for u in utterances], batch_first=True),
        torch.tensor([len(u.text) for u in utterances]),
    )


def training_batch(by_length: Sequence[Utterance], size: int, progress: float, choose: random.Random) -> Batch:
    """A random batch of about equally long utterances, changed at random as other speakers would change them.

    Args:
        by_length: the training utterances, the shortest first.
        size: of the batch.
        progress: 0..1; in the first half short utterances come first (SortaGrad: Amodei et al., ICML 2016).
        choose: source of all that is random here.
    """
    known = max(2 * size, round(min(1.0, 0.1 + 2 * progress) * len(by_length)))
    begin = choose.randint(0, max(0, min(known, len(by_length)) - 2 * size))
    near = by_length[begin : begin + 2 * size]
    batch = collate(choose.sample(near, min(size, len(near))))
    batch.features = augment(batch.features, torch.Generator().manual_seed(choose.getrandbits(32)))
    return batch


def augment(features: Tensor, generator: torch.Generator) -> Tensor:
    """Stretch each utterance's mel axis and hide a few of its bands.

    The first stands for vocal tracts of other lengths (Jaitly and Hinton, ICML workshop, 2013), the second is
    SpecAugment's frequency mask (Park et al., Interspeech 2019).

    Args:
        features: [N, T, MELS].
        generator: of the factors and masks.

    Returns:
        [N, T, MELS].
    """
    n = len(features)
    bands = torch.arange(MELS)
    factor = 1 + STRETCH * (2 * torch.rand(n, 1, generator=generator) - 1)
    position = (bands * factor).clamp(max=MELS - 1)
    left = position.floor().long().clamp(max=MELS - 2)
    weight = (position - left)[:, None]
    left = left[:, None].expand_as(features)
    features = torch.lerp(features.gather(2, left), features.gather(2, left + 1), weight)
    first = torch.randint(0, MELS, (n, 1), generator=generator)
    width = torch.randint(0, MASKED + 1, (n, 1), generator=generator)
    return features.masked_fill(((bands >= first) & (bands < first + width))[:, None], 0.0)
