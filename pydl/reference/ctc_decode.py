"""Decoding of connectionist temporal classification in NumPy float64: the best class per frame, and prefix beam search.

Greedy decoding is "best path" of Graves et al. 2006, section 3.2. Prefix beam search sums over the alignments of a
prefix: Hannun et al. 2014, First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent
DNNs, arXiv:1408.2873, algorithm 1 without a language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pydl.reference._spec import Case, Spec

Lengths = np.ndarray | Sequence[int] | None


def _frames(log_probs: np.ndarray, input_lengths: Lengths) -> list[int]:
    frames, items = log_probs.shape[:2]
    return [frames] * items if input_lengths is None else [int(v) for v in np.reshape(input_lengths, -1)]


def ctc_greedy_decode(
    log_probs: np.ndarray, input_lengths: Lengths = None, blank: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [N, T] with -1 after the last, their number [N], and the sum of the best log-probabilities [N].

    Of equal classes the first is taken; NaN counts as the largest, as in torch's argmax.
    """
    if log_probs.ndim == 2:
        labels, lengths, scores = ctc_greedy_decode(log_probs[:, None], input_lengths, blank)
        return labels[0], lengths[0], scores[0]
    frames, items = log_probs.shape[:2]
    labels = np.full((items, frames), -1, dtype=np.int64)
    lengths, scores = np.zeros(items, dtype=np.int64), np.zeros(items)
    for n, count in enumerate(_frames(log_probs, input_lengths)):
        before = blank
        for t in range(count):
            best = int(np.argmax(log_probs[t, n]))
            scores[n] += log_probs[t, n, best]
            if best not in (blank, before):
                labels[n, lengths[n]] = best
                lengths[n] += 1
            before = best
    return labels, lengths, scores


def beam_item(
    log_probs: np.ndarray, beam_width: int, blank: int, prune_log_prob: float
) -> list[tuple[tuple[int, ...], float]]:
    """The prefixes in the beam after the last frame of log_probs [T, C], best first, with their log-probabilities."""
    # log-probability of the alignments that end in the blank, and of the others
    beam: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -np.inf)}
    for row in np.where(np.isnan(log_probs), -np.inf, log_probs):
        grown: dict[tuple[int, ...], list[float]] = {}
        for prefix, (on_blank, on_label) in beam.items():
            total = np.logaddexp(on_blank, on_label)
            ends = grown.setdefault(prefix, [-np.inf, -np.inf])
            ends[0] = np.logaddexp(ends[0], total + row[blank])
            if prefix:
                ends[1] = np.logaddexp(ends[1], on_label + row[prefix[-1]])
            for c, value in enumerate(row):
                if c == blank or value < prune_log_prob or value == -np.inf:
                    continue
                ends = grown.setdefault((*prefix, c), [-np.inf, -np.inf])
                ends[1] = np.logaddexp(ends[1], (on_blank if prefix and c == prefix[-1] else total) + value)
        ranked = sorted(grown.items(), key=lambda item: (-np.logaddexp(item[1][0], item[1][1]), item[0]))
        beam = {prefix: (a, b) for prefix, (a, b) in ranked[:beam_width] if max(a, b) > -np.inf}
    return [(prefix, float(np.logaddexp(*ends))) for prefix, ends in beam.items()]


def ctc_beam_search(
    log_probs: np.ndarray,
    input_lengths: Lengths = None,
    beam_width: int = 16,
    blank: int = 0,
    top_paths: int = 1,
    prune_log_prob: float = -np.inf,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best prefixes, best first: labels [N, K, T] with -1 after the last, their number [N, K], scores [N, K].

    Where fewer than K prefixes have a probability, the others have no label and the score -inf.
    """
    if log_probs.ndim == 2:
        found = ctc_beam_search(log_probs[:, None], input_lengths, beam_width, blank, top_paths, prune_log_prob)
        return found[0][0], found[1][0], found[2][0]
    frames, items = log_probs.shape[:2]
    labels = np.full((items, top_paths, frames), -1, dtype=np.int64)
    lengths, scores = np.zeros((items, top_paths), dtype=np.int64), np.full((items, top_paths), -np.inf)
    for n, count in enumerate(_frames(log_probs, input_lengths)):
        with np.errstate(invalid="ignore"):
            beam = beam_item(log_probs[:count, n], beam_width, blank, prune_log_prob)
        for k, (prefix, score) in enumerate(beam[:top_paths]):
            labels[n, k, : len(prefix)] = prefix
            lengths[n, k], scores[n, k] = len(prefix), score
    return labels, lengths, scores


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def greedy_cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: ragged lengths, ties, NaN and -inf, class counts around a vector's width."""
    rng = np.random.default_rng(2)

    def log_probs(*shape: int) -> np.ndarray:
        return _log_softmax(3 * rng.standard_normal(shape))

    yield Case("ragged", (log_probs(20, 5, 9), np.array([20, 13, 0, 7, 1])), layouts=True)
    yield Case("all frames", (log_probs(11, 3, 6),))
    yield Case("int32 lengths, last class", (log_probs(12, 2, 7), np.array([12, 9], dtype=np.int32), 6))
    # two vectors, a tail, a warp of classes with a tail; few classes, so that labels repeat
    for classes in (2, 3, 8, 17, 33, 64, 70, 129):
        yield Case(f"{classes} classes", (log_probs(9, 3, classes), [9, 9, 4], classes // 2))
    yield Case("ties", (np.round(log_probs(40, 3, 5) / 4), (40, 40, 33)))
    yield Case("300 frames: more than a block", (np.round(log_probs(300, 2, 3)), [300, 257], 2))
    special = log_probs(16, 3, 70)
    special[rng.random(special.shape) < 0.3] = -np.inf
    special[3, 0] = -np.inf
    special[5, 1, 60] = np.inf
    special[6, 2, [50, 66]] = np.nan
    yield Case("-inf, inf and NaN", (special, [16, 16, 16]))
    yield Case("unbatched", (log_probs(10, 6), np.array(8)))
    yield Case("one class", (log_probs(5, 2, 1),))
    yield Case("no item", (np.zeros((6, 0, 4)), []))
    yield Case("no frame", (np.zeros((0, 2, 4)), [0, 0]))


def beam_cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: narrow and wide beams, several paths, pruning, -inf; scores far from equal."""
    rng = np.random.default_rng(4)

    def log_probs(*shape: int, scale: float = 3.0) -> np.ndarray:
        return _log_softmax(scale * rng.standard_normal(shape))

    confident = log_probs(10, 2, 6, scale=8.0)
    yield Case("ragged", (confident, np.array([10, 7]), 8), layouts=True)
    yield Case("defaults", (log_probs(12, 3, 5),))
    yield Case("beam of one", (log_probs(12, 2, 5), [12, 11], 1))
    yield Case("four paths", (log_probs(9, 2, 4), (9, 8), 12, 3, 4))
    yield Case("every prefix", (log_probs(4, 2, 3), [4, 3], 100, 1, 30))
    yield Case("many classes", (log_probs(8, 2, 60), np.array([8, 8], dtype=np.int32), 6, 0, 3))
    yield Case("pruned", (log_probs(14, 2, 12), [14, 10], 10, 2, 2, -3.0))
    zero = log_probs(7, 3, 4)
    zero[rng.random(zero.shape) < 0.4] = -np.inf
    zero[2, 0, :2] = np.nan
    zero[4, 1] = -np.inf
    yield Case("-inf and NaN", (zero, None, 5, 0, 2))
    yield Case("unbatched", (log_probs(8, 5), [6], 4, 0, 2))
    yield Case("no item", (np.zeros((6, 0, 4)), []))
    yield Case("no frame", (np.zeros((0, 2, 4)), [0, 0], 4, 0, 2))


SPECS = (
    Spec("ctc_greedy_decode", "", ctc_greedy_decode, None, greedy_cases, widened=True),
    Spec("ctc_beam_search", "", ctc_beam_search, None, beam_cases, widened=True),
)
