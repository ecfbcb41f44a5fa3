"""CTC loss in NumPy, from its definition: the probabilities of all alignments are added up, frame by frame.

The sums run over probabilities, not their logarithms, in extended precision and with each frame's sum taken out, so
that neither long inputs nor improbable ones underflow. Source: Graves et al., ICML 2006, equations 6 to 15.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pydl.reference._spec import Case, Spec

Lengths = Sequence[int] | np.ndarray


def states_of(labels: Sequence[int], blank: int) -> list[int]:
    """The labels with a blank before, between and behind them."""
    states = [blank]
    for label in labels:
        states += [int(label), blank]
    return states


def _walk(y: np.ndarray, states: list[int], blank: int) -> tuple[np.ndarray, np.ndarray]:
    """Forward variables [T, states], each frame scaled to the sum 1, and the log of each frame's scale."""
    steps = len(y)
    alpha = np.zeros((steps, len(states)), dtype=np.longdouble)
    scale = np.zeros(steps, dtype=np.longdouble)
    for t in range(steps):
        for s, label in enumerate(states):
            if t == 0:
                arrive = np.longdouble(1.0 if s < 2 else 0.0)
            else:
                arrive = alpha[t - 1, s]
                if s > 0:
                    arrive = arrive + alpha[t - 1, s - 1]
                if s > 1 and label != blank and label != states[s - 2]:
                    arrive = arrive + alpha[t - 1, s - 2]
            alpha[t, s] = arrive * y[t, label]
        total = alpha[t].sum()
        if total > 0:
            alpha[t] /= total
            scale[t] = np.log(total)
        else:
            scale[t] = -np.inf
    return alpha, scale


def ctc_item(log_probs: np.ndarray, labels: Sequence[int], blank: int) -> tuple[float, np.ndarray]:
    """-log p of labels given log_probs [T, C], and the posterior of each class in each frame [T, C]."""
    steps, classes = log_probs.shape
    posterior = np.zeros((steps, classes))
    if steps == 0:
        return (0.0 if len(labels) == 0 else np.inf), posterior
    y = np.exp(log_probs.astype(np.longdouble))
    states = states_of(labels, blank)
    alpha, up = _walk(y, states, blank)
    # backwards the same walk, over the mirrored sequence
    beta, _ = _walk(y[::-1], states[::-1], blank)
    beta = beta[::-1, ::-1]
    ends = alpha[-1, -2:].sum()
    if not ends > 0 or np.isneginf(up).any():
        nan = bool(np.isnan(alpha).any())
        return (np.nan if nan else np.inf), np.full((steps, classes), np.nan)
    for t in range(steps):
        joint = np.zeros(len(states), dtype=np.longdouble)
        for s, label in enumerate(states):
            # both variables hold y of this frame: one is taken out
            joint[s] = alpha[t, s] * beta[t, s] / y[t, label] if y[t, label] > 0 else 0.0
        joint /= joint.sum()
        for s, label in enumerate(states):
            posterior[t, label] += float(joint[s])
    return float(-(up.sum() + np.log(ends))), posterior


def _items(
    x: np.ndarray, targets: np.ndarray, input_lengths: Lengths, target_lengths: Lengths
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(item, frames, labels) of a batch."""
    inputs, lengths = np.asarray(input_lengths).reshape(-1), np.asarray(target_lengths).reshape(-1)
    start = 0
    for n in range(x.shape[1]):
        length = int(lengths[n])
        yield n, int(inputs[n]), targets[n, :length] if targets.ndim == 2 else targets[start : start + length]
        start += length


def _share(reduction: str, batch: int, length: int) -> float:
    return 1.0 / (batch * max(length, 1)) if reduction == "mean" else 1.0


def ctc_loss(x, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False):
    """Loss with torch's signature; x [T, N, C] or [T, C]."""
    batch = x if x.ndim == 3 else x[:, None]
    losses = np.zeros(batch.shape[1])
    shares = np.ones(batch.shape[1])
    for n, steps, labels in _items(batch, targets, input_lengths, target_lengths):
        losses[n], _ = ctc_item(batch[:steps, n], labels, blank)
        shares[n] = _share(reduction, batch.shape[1], len(labels))
    if zero_infinity:
        losses[np.isposinf(losses)] = 0.0
    if reduction == "none":
        return losses if x.ndim == 3 else losses[0].reshape(())
    return np.asarray((losses * shares).sum())


def ctc_loss_grad(dy, x, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False):
    """Torch's gradient: exp(x) minus the posterior, times the share of the item's loss; NaN if the loss is infinite."""
    batch = x if x.ndim == 3 else x[:, None]
    upstream = np.broadcast_to(np.asarray(dy, dtype=np.float64).reshape(-1), (batch.shape[1],))
    dx = np.zeros(batch.shape)
    for n, steps, labels in _items(batch, targets, input_lengths, target_lengths):
        loss, posterior = ctc_item(batch[:steps, n], labels, blank)
        share = _share(reduction, batch.shape[1], len(labels)) * upstream[n]
        if not (np.isinf(loss) and zero_infinity):
            dx[:steps, n] = share * (np.exp(batch[:steps, n]) - posterior)
    return (dx.reshape(x.shape),)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def ctc_loss_from_logits(x, *args, **kwargs):
    """The loss of log_softmax(x)."""
    return ctc_loss(log_softmax(x), *args, **kwargs)


def ctc_loss_from_logits_grad(dy, x, *args, **kwargs):
    """softmax minus posterior: with respect to logits torch's gradient is the derivative itself."""
    return ctc_loss_grad(dy, log_softmax(x), *args, **kwargs)


def _frames(x, *args, **kwargs):
    # the recursion adds up two states per label over every frame
    return (x.shape[0],)


def _make_cases(logits: bool) -> Iterator[Case]:
    rng = np.random.default_rng(7)

    def scores(*shape: int, spread: float = 1.0) -> np.ndarray:
        x = spread * rng.standard_normal(shape)
        return x if logits else log_softmax(x)

    def labels(*shape: int, classes: int) -> np.ndarray:
        return rng.integers(1, classes, shape)  # never 0, the blank

    yield Case("plain", (scores(12, 3, 6), labels(3, 4, classes=6), (12, 12, 12), (4, 4, 4)), layouts=True)
    distinct = np.array([[1, 2, 3], [2, 1, 2]])
    yield Case("second", (scores(6, 2, 4), distinct, (6, 5), (3, 2), 0, "none"), second=True)
    yield Case("ragged", (scores(20, 4, 9), labels(4, 7, classes=9), (20, 17, 1, 9), (7, 0, 1, 3), 0, "sum"))
    yield Case("one after the other", (scores(15, 3, 5), labels(9, classes=5), (15, 10, 14), (2, 4, 3), 0, "none"))
    yield Case("length tensors", (scores(9, 2, 5), labels(2, 3, classes=5), np.array([9, 7]), np.array([3, 2])))
    yield Case("blank last", (scores(10, 2, 5), labels(2, 3, classes=5) - 1, (10, 9), (3, 3), 4))
    yield Case("blank amid", (scores(10, 2, 3), np.array([[0, 2, 0], [2, 2, 0]]), (10, 9), (3, 2), 1))
    yield Case("without N", (scores(11, 4), labels(3, classes=4), (11,), (3,), 0, "none"))
    # all labels equal, T = L + repeats exactly: a single alignment
    yield Case("one alignment", (scores(9, 1, 3), np.full((1, 5), 2), (9,), (5,)))
    yield Case("too short", (scores(8, 2, 3), np.full((2, 5), 2), (8, 8), (5, 3), 0, "none"))
    yield Case("too short, zeroed", (scores(8, 2, 3), np.full((2, 5), 2), (8, 8), (5, 3), 0, "mean", True))
    yield Case("no frames", (scores(3, 3, 4), labels(3, 2, classes=4), (0, 0, 3), (0, 1, 1), 0, "none", True))
    yield Case("no labels", (scores(5, 2, 4), np.zeros((2, 0), dtype=np.int64), (5, 4), (0, 0), 0, "none"))
    # 31, 32: the states of one warp and one more; 40 frames: several offsets taken out
    for length in (31, 32):
        yield Case(
            f"{length} labels", (scores(70, 2, 20), labels(2, length, classes=20), (70, 69), (length, length - 1))
        )
    confident = scores(14, 2, 5, spread=60.0)
    yield Case("confident", (confident, labels(2, 4, classes=5), (14, 12), (4, 3), 0, "none"))
    # probabilities of exactly 0: a path remains for item 0, none for item 1
    impossible = scores(8, 2, 4)
    impossible[2:, 0, 3] = -np.inf
    impossible[:, 1, 2] = -np.inf
    yield Case("impossible class", (impossible, np.array([[3, 1], [2, 1]]), (8, 8), (2, 2), 0, "none", True))
    if logits:
        yield Case("large mean", (100.0 + scores(12, 2, 6), labels(2, 3, classes=6), (12, 12), (3, 3)))


def cases() -> Iterator[Case]:
    """Log-probabilities for `pydl verify`."""
    return _make_cases(False)


def logits_cases() -> Iterator[Case]:
    """The same shapes with logits."""
    return _make_cases(True)


SPECS = (
    Spec(
        "ctc_loss",
        "nn.functional.ctc_loss",
        ctc_loss,
        ctc_loss_grad,
        cases,
        _frames,
        derivative=False,  # exp(log_probs) is added, which log_softmax's own derivative removes
        widened=True,
    ),
    Spec(
        "ctc_loss_from_logits",
        "pydl.ops.ctc_loss:torch_loss_from_logits",
        ctc_loss_from_logits,
        ctc_loss_from_logits_grad,
        logits_cases,
        _frames,
        widened=True,
    ),
)
