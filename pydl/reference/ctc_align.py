"""Forced alignment in NumPy float64: the best path of connectionist temporal classification for a known target.

Paths are those of Graves et al. 2006 (Connectionist Temporal Classification, section 3.1): one class per frame, which
gives the target once repeats are merged and blanks removed. The search is Viterbi's, over the 2 L + 1 states
blank, label, blank, ..., label, blank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pydl.reference._spec import Case, Spec

Lengths = np.ndarray | Sequence[int]


def rows_of(targets: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """The labels of each item, from padded rows or from one row after the other."""
    if targets.ndim == 2:
        return [targets[n, :length] for n, length in enumerate(lengths)]
    ends = np.cumsum(lengths, dtype=np.int64)
    return [targets[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def align_item(log_probs: np.ndarray, labels: np.ndarray, blank: int) -> np.ndarray | None:
    """Class of each frame on the best path through log_probs [T, C]; None where every path has probability zero.

    Of paths that are equally good, the one that is further along at the last frame where they differ. NaN counts as
    probability zero.
    """
    frames = len(log_probs)
    classes = np.full(2 * len(labels) + 1, blank, dtype=np.int64)
    classes[1::2] = labels
    states = len(classes)
    if frames == 0:
        return np.zeros(0, dtype=np.int64) if states == 1 else None
    values = np.where(np.isnan(log_probs), -np.inf, log_probs)
    best = np.full((frames, states), -np.inf)
    step = np.zeros((frames, states), dtype=np.int64)
    best[0, :2] = values[0, classes[:2]]
    for t in range(1, frames):
        for s in range(states):
            may_skip = s % 2 == 1 and s >= 3 and classes[s] != classes[s - 2]
            came_from = -np.inf
            for back in range(min(s, 2 if may_skip else 1) + 1):
                if best[t - 1, s - back] > came_from:
                    came_from, step[t, s] = best[t - 1, s - back], back
            best[t, s] = came_from + values[t, classes[s]]
    state = states - 1
    if states > 1 and best[-1, state - 1] > best[-1, state]:
        state -= 1
    if best[-1, state] == -np.inf:
        return None
    path = np.zeros(frames, dtype=np.int64)
    for t in range(frames - 1, -1, -1):
        path[t] = classes[state]
        state -= step[t, state]
    return path


def ctc_forced_align(
    log_probs: np.ndarray, targets: np.ndarray, input_lengths: Lengths, target_lengths: Lengths, blank: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Alignment [N, T] and the log-probability of its class at each frame; -1 and 0 past an item's length.

    An item without a path has -1 and -inf throughout its length.
    """
    if log_probs.ndim == 2:
        alignment, scores = ctc_forced_align(log_probs[:, None], targets, input_lengths, target_lengths, blank)
        return alignment[0], scores[0]
    lengths = [int(v) for v in np.reshape(input_lengths, -1)]
    rows = rows_of(targets, [int(v) for v in np.reshape(target_lengths, -1)])
    alignment = np.full(log_probs.shape[1::-1], -1, dtype=np.int64)
    scores = np.zeros(alignment.shape)
    for n, (frames, labels) in enumerate(zip(lengths, rows, strict=True)):
        path = align_item(log_probs[:frames, n], labels, blank)
        scores[n, :frames] = -np.inf
        if path is not None:
            alignment[n, :frames] = path
            scores[n, :frames] = log_probs[np.arange(frames), n, path]
    return alignment, scores


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cases() -> Iterator[Case]:
    """Inputs for `pydl verify`: ragged lengths, both forms of targets, repeats, ties, -inf, and the smallest sizes."""
    rng = np.random.default_rng(1)

    def log_probs(*shape: int, ulp: float = 1 / 16) -> np.ndarray:
        """Multiples of `ulp`: exact in every dtype, so that sums are exact too and ties are real."""
        return np.round(_log_softmax(3 * rng.standard_normal(shape)) / ulp) * ulp - ulp

    def labels(*shape: int, classes: int, blank: int = 0) -> np.ndarray:
        drawn = rng.integers(0, classes - 1, shape)
        return drawn + (drawn >= blank)

    ragged, short = np.array([20, 13, 20, 7]), np.array([6, 3, 0, 1])
    targets = labels(4, 6, classes=9)
    yield Case("ragged", (log_probs(20, 4, 9), targets, ragged, short), layouts=True)
    yield Case("int32, lists", (log_probs(20, 4, 9), targets.astype(np.int32), [20, 13, 20, 7], (6, 3, 0, 1)))
    joined = np.concatenate([targets[n, : short[n]] for n in range(4)])
    yield Case("concatenated", (log_probs(20, 4, 9), joined, ragged, short.astype(np.int32)))
    last = labels(2, 5, classes=7, blank=6)
    yield Case("blank is the last class", (log_probs(17, 2, 7), last, np.array([17, 15]), np.array([5, 4]), 6))
    # with repeats a label needs a blank before it: 5 labels and 4 repeats fit 9 frames exactly, in one way
    same = np.full((2, 5), 1)
    yield Case("one label, no frame to spare", (log_probs(9, 2, 3), same, np.array([9, 9]), np.array([5, 4])))
    yield Case("all equal", (np.full((12, 2, 4), -1.5), labels(2, 3, classes=4), np.array([12, 11]), np.array([3, 2])))
    two = np.stack([np.arange(1, 21) % 7 + 1] * 2)
    yield Case("20 labels: past a warp's half", (log_probs(50, 2, 8), two, np.array([50, 41]), np.array([20, 17])))
    many = labels(2, 40, classes=6)
    yield Case("40 labels: more than a warp", (log_probs(75, 2, 6), many, np.array([75, 70]), np.array([40, 33])))
    zero = log_probs(14, 3, 5)
    zero[rng.random(zero.shape) < 0.15] = -np.inf
    zero[:, :, 0] = np.where(np.isinf(zero[:, :, 0]), -2.0, zero[:, :, 0])
    zero[4, 1, :] = [np.nan, -1.0, np.nan, -1.0, np.nan]
    yield Case("-inf and NaN", (zero, np.array([[1, 2], [1, 3], [4, 4]]), np.array([14, 14, 14]), np.array([2, 2, 2])))
    yield Case("unbatched", (log_probs(11, 6), labels(4, classes=6), np.array(11), np.array(4)))
    yield Case("no label", (log_probs(5, 2, 3), np.zeros((2, 0), dtype=np.int64), np.array([5, 0]), np.array([0, 0])))
    yield Case("one frame, one class", (log_probs(1, 2, 2), np.ones((2, 1), dtype=np.int64), [1, 1], [1, 0]))
    yield Case("no item", (np.zeros((6, 0, 4)), np.zeros((0, 2), dtype=np.int64), [], []))
    yield Case("no frame", (np.zeros((0, 2, 4)), np.zeros((2, 2), dtype=np.int64), [0, 0], [0, 0]))
    far = _log_softmax(rng.standard_normal((400, 1, 30)))  # sums of hundreds: where float32 drifts
    yield Case("400 frames", (far, labels(1, 60, classes=30), np.array([400]), np.array([60])))


SPECS = (Spec("ctc_forced_align", "", ctc_forced_align, None, cases, widened=True),)
