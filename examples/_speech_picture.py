"""The picture of examples/speech_ctc.py: where each letter is, over the spectrogram, and how sure the network is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _speech_data import BLANK, HOP, LETTERS, MELS, STRIDE, Utterance, hertz_to_mel, mel_edges
from torch import Tensor

INK, PALE, GREY = "#222222", "#dddddd", "#777777"
COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#a21caf", "#0e7490", "#a16207")
TICKS = (250, 500, 1000, 2000, 4000, 6000)  # Hz
FRAME = STRIDE * HOP  # seconds between two outputs of the network


@dataclass(frozen=True)
class Span:
    """A letter or a word, and its begin and end in seconds."""

    text: str
    begin: float
    end: float


@dataclass(frozen=True)
class Alignment:
    """One utterance with the network's output and the path that spells it.

    Attributes:
        utterance: what was said.
        probabilities: of each class in each frame [T, CLASSES].
        path: class of each frame [T]: the blank, or the letter spoken; -1 past the end.
    """

    utterance: Utterance
    probabilities: Tensor
    path: Tensor

    def letters(self) -> list[Span]:
        """The letters in their order, spaces too: a run of one class is one letter."""
        path = [*self.path.tolist(), -1]
        spans, first = [], 0
        for frame in range(1, len(path)):
            if path[frame] != path[first]:
                if path[first] not in (BLANK, -1):
                    spans.append(Span(LETTERS[path[first]], max(0.0, first - 0.5) * FRAME, (frame - 0.5) * FRAME))
                first = frame
        return spans

    def words(self) -> list[Span]:
        """The words, each from its first letter's begin to its last letter's end."""
        words: list[list[Span]] = [[]]
        for span in self.letters():
            if span.text == " ":
                words.append([])
            else:
                words[-1].append(span)
        return [Span("".join(s.text for s in word), word[0].begin, word[-1].end) for word in words]


def draw(path: Path, alignment: Alignment) -> Path:
    """Write the picture and return its path; its folder is made."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(12, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(alignment.words()))]
    _draw_spectrogram(above, alignment, colours)
    _draw_probabilities(below, alignment, colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_spectrogram(axes: Any, alignment: Alignment, colours: list[str]) -> None:
    pixels = alignment.utterance.features.T.numpy()
    seconds = pixels.shape[1] * HOP
    # a column stands for the frame around its time, a row for the band around its peak
    lowest, highest = (hertz_to_mel(mel_edges()[i].item()) for i in (0, MELS + 1))
    half = (highest - lowest) / (MELS + 1) / 2
    extent = (-HOP / 2, seconds - HOP / 2, lowest + half, highest - half)
    axes.imshow(pixels, origin="lower", aspect="auto", extent=extent, cmap="gray_r", interpolation="bilinear")
    axes.set_yticks([hertz_to_mel(hertz) for hertz in TICKS], [f"{hertz:,}" for hertz in TICKS])
    axes.set_ylabel("frequency, Hz (mel scale)")
    axes.set_xlim(0, seconds - HOP)
    title = f"{alignment.utterance.text!r} by {alignment.utterance.voice}, a voice never heard in training"
    axes.set_title(f"{title}: forced alignment", loc="left", color=INK, pad=52)
    word = 0
    for span in alignment.letters():
        if span.text == " ":
            word += 1
            continue
        middle = (span.begin + span.end) / 2
        axes.axvspan(span.begin, span.end, color=colours[word], alpha=0.2, linewidth=0)
        axes.axvline(span.begin, color=colours[word], linewidth=0.8)
        axes.text(middle, 1.01, span.text, transform=axes.get_xaxis_transform(), ha="center", color=colours[word])
    for colour, span in zip(colours, alignment.words(), strict=True):
        style = {"transform": axes.get_xaxis_transform(), "color": colour, "clip_on": False}
        axes.plot([span.begin, span.end], [1.085, 1.085], linewidth=2, **style)
        axes.text((span.begin + span.end) / 2, 1.1, span.text, ha="center", weight="bold", **style)


def _draw_probabilities(axes: Any, alignment: Alignment, colours: list[str]) -> None:
    times = [frame * FRAME for frame in range(len(alignment.probabilities))]
    axes.fill_between(times, alignment.probabilities[:, BLANK].numpy(), color=PALE, linewidth=0)
    axes.plot(times, alignment.probabilities[:, LETTERS.index(" ")].numpy(), color=GREY, linewidth=0.9)
    word = 0
    for span in alignment.letters():
        if span.text == " ":
            word += 1
            continue
        near = [i for i, t in enumerate(times) if span.begin - 2 * FRAME <= t <= span.end + 2 * FRAME]
        values = alignment.probabilities[near, LETTERS.index(span.text)].numpy()
        axes.plot([times[i] for i in near], values, color=colours[word], linewidth=1.2)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("probability")
    axes.set_xlabel("time, s")
    axes.set_title(
        "What the network hears in each frame: the letters, the space (grey line), the blank (grey area)",
        loc="left",
        fontsize=10,
    )
