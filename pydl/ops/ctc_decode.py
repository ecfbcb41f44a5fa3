"""Greedy and beam decoding of CTC outputs: schemas, fakes, compositions and the public functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op
from pydl.ops._ctc_arguments import Lengths, as_lengths, batched, check_blank, explain_bad_lengths, may_look

__all__ = ["ctc_beam_search", "ctc_greedy_decode"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_GREEDY = Family(
    "ctc_greedy_decode",
    ops=("ctc_greedy",),
    order={"cpu": ("cpu",), "cuda": ("cuda",)},
    dtypes={"cpu": _FLOATS, "cuda": _FLOATS, "simt": _FLOATS},
)
_BEAM = Family("ctc_beam_search", ops=("ctc_beam",), order={"cpu": ("cpu",)}, dtypes={"cpu": _FLOATS})

_Found = tuple[Tensor, Tensor, Tensor]
_Beam = dict[tuple[int, ...], tuple[float, float]]


def ctc_greedy_decode(log_probs: Tensor, input_lengths: Lengths | None = None, blank: int = 0) -> _Found:
    """Labels of the most probable class of each frame, repeats merged and blanks removed.

    Args:
        log_probs: [T, N, C] or [T, C], floating point, log-probabilities; logits give the same labels.
        input_lengths: [N] frames of each item, at most T; integer tensor on any device, or a tuple of ints. All by
            default.
        blank: class of the blank, any in [0, C).

    Returns:
        labels: [N, T] (or [T]) int64, -1 after the last label.
        lengths: [N] (or []) int64, how many labels there are.
        scores: [N] (or []) sum over the frames of the best log-probability; float64 for float64, else float32.

    Raises:
        TypeError: log_probs is no tensor, or lengths are not ints.
        RuntimeError: a shape or blank that makes no sense.
        ValueError: on the CPU: an input length out of range, by item and value.

    Of equal classes the first is taken and NaN counts as the largest, as in torch's argmax. Scores are summed in
    float64. On a GPU nothing waits for the device; there an item with a length out of range has no labels, length 0 and
    score NaN. No result has a gradient. Best path decoding of Graves et al. 2006, section 3.2.
    """
    x, frames, unbatched = _arguments("ctc_greedy_decode", log_probs, input_lengths, blank)
    decision = choose(_GREEDY, x)
    try:
        scores, labels, lengths = (
            _torch_greedy(x, frames, blank) if decision.backend == "torch" else _greedy(decision, x, frames, blank)
        )
    except RuntimeError:
        if frames is not None:
            explain_bad_lengths("ctc_greedy_decode", frames, x.shape[0])
        raise
    found = (labels, lengths, scores)
    return tuple(t.squeeze(0) for t in found) if unbatched else found  # type: ignore[return-value]


def ctc_beam_search(
    log_probs: Tensor,
    input_lengths: Lengths | None = None,
    beam_width: int = 16,
    blank: int = 0,
    top_paths: int = 1,
    prune_log_prob: float = -math.inf,
) -> _Found:
    """Most probable label sequences by prefix beam search, without a language model.

    Args:
        log_probs: [T, N, C] or [T, C], floating point, log-probabilities (not necessarily normalised). The search runs
            on the CPU: a tensor on another device is copied there, which waits for that device, and results are copied
            back.
        input_lengths: [N] frames of each item, at most T; integer tensor on any device, or a tuple of ints. All by
            default.
        beam_width: prefixes that are kept from frame to frame, at least 1.
        blank: class of the blank, any in [0, C).
        top_paths: K, how many prefixes are returned, at most beam_width.
        prune_log_prob: classes whose log-probability at a frame is below this do not extend a prefix there.

    Returns:
        labels: [N, K, T] (or [K, T]) int64, best prefix first, -1 after the last label.
        lengths: [N, K] (or [K]) int64, how many labels each has.
        scores: [N, K] (or [K]) log-probability of each prefix: the sum over its alignments that the beam followed;
            float64 for float64, else float32. Where fewer than K prefixes are possible, the others have no label and
            the score -inf.

    Raises:
        TypeError: log_probs is no tensor, or an argument is no int or float.
        RuntimeError: a shape or blank that makes no sense.
        ValueError: beam_width or top_paths or prune_log_prob out of range, or an input length, by item and value.

    With a beam of at least as many prefixes as there are the scores are exact. Sums are in float64, independent of the
    number of threads. Of equally probable prefixes the one found first is kept. NaN counts as probability zero. No
    result has a gradient. Algorithm 1 of Hannun et al. 2014, arXiv:1408.2873.
    """
    x, frames, unbatched = _arguments("ctc_beam_search", log_probs, input_lengths, blank)
    for name, value in (("beam_width", beam_width), ("top_paths", top_paths)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"ctc_beam_search: argument {name!r} must be an int, got {value!r}")
    if not 1 <= beam_width < 2**31:
        raise ValueError(f"ctc_beam_search: argument 'beam_width' must be in [1, 2^31), got {beam_width}")
    if not 1 <= top_paths <= beam_width:
        raise ValueError(
            f"ctc_beam_search: argument 'top_paths' must be in [1, beam_width={beam_width}], got {top_paths}"
        )
    if isinstance(prune_log_prob, bool) or not isinstance(prune_log_prob, (int, float)):
        raise TypeError(f"ctc_beam_search: argument 'prune_log_prob' must be a float, got {prune_log_prob!r}")
    if prune_log_prob != prune_log_prob:
        raise ValueError("ctc_beam_search: argument 'prune_log_prob' must be a number, got nan")
    host = x.detach().cpu()
    frames = None if frames is None else frames.cpu()
    decision = choose(_BEAM, host)
    args = (host, frames, beam_width, blank, top_paths, float(prune_log_prob))
    try:
        scores, labels, lengths = _torch_beam(*args) if decision.backend == "torch" else _beam(decision, *args)
    except RuntimeError:
        if frames is not None:
            explain_bad_lengths("ctc_beam_search", frames, x.shape[0])
        raise
    found = tuple(t.to(x.device) for t in (labels, lengths, scores))
    return tuple(t.squeeze(0) for t in found) if unbatched else found  # type: ignore[return-value]


def _arguments(
    op: str, log_probs: Tensor, input_lengths: Lengths | None, blank: int
) -> tuple[Tensor, Tensor | None, bool]:
    """log_probs [T, N, C], lengths [N] on its device or None for all frames, and whether N was missing."""
    x, unbatched = batched(op, log_probs)
    if not x.is_floating_point():
        raise RuntimeError(f"{op}: argument 'log_probs' must be floating point, got {x.dtype}")
    check_blank(op, blank, x.shape[2])
    if input_lengths is None:
        return x, None, unbatched
    return x, as_lengths(op, "input_lengths", input_lengths, x.shape[1], x.device), unbatched


def _torch_greedy(x: Tensor, frames: Tensor | None, blank: int) -> _Found:
    """In torch operations; (scores, labels, lengths) as of the raw operator."""
    acc = x.detach() if x.dtype == torch.float64 else x.detach().float()
    count, items = acc.shape[:2]
    if frames is None:
        frames = torch.full((items,), count, device=x.device)
    elif may_look(x):
        explain_bad_lengths("ctc_greedy_decode", frames, count)
    bad = (frames < 0) | (frames > count)
    best = acc.argmax(2)
    inside = (torch.arange(count, device=x.device)[:, None] < frames) & ~bad
    values = acc.gather(2, best.unsqueeze(2)).squeeze(2).double().where(inside, 0.0)
    before = torch.cat((torch.full_like(best[:1], blank), best[:-1]))
    kept = inside & (best != blank) & (best != before)
    # what is not kept goes to a place after the last
    place = torch.where(kept, kept.cumsum(0) - 1, count)
    labels = torch.full((items, count + 1), -1, device=x.device)
    labels = labels.scatter(1, place.t(), best.t())[:, :count].contiguous()
    return values.sum(0).to(acc.dtype).masked_fill(bad, math.nan), labels, kept.sum(0)


def _torch_beam(
    x: Tensor, frames: Tensor | None, beam_width: int, blank: int, top_paths: int, prune_log_prob: float
) -> _Found:
    """In Python, one dictionary of prefixes per frame; (scores, labels, lengths) as of the raw operator."""
    count, items = x.shape[:2]
    counts = [count] * items if frames is None else frames.tolist()
    if frames is not None:
        explain_bad_lengths("ctc_beam_search", frames, count)
    labels = torch.full((items, top_paths, count), -1)
    lengths = torch.zeros((items, top_paths), dtype=torch.int64)
    scores = torch.full((items, top_paths), -math.inf, dtype=torch.float64)
    for n, rows in enumerate(x.double().nan_to_num(-math.inf, math.inf, -math.inf).unbind(1)):
        beam: _Beam = {(): (0.0, -math.inf)}
        for row in rows[: counts[n]].tolist():
            beam = _next_beam(beam, row, beam_width, blank, prune_log_prob)
        for k, (prefix, ends) in enumerate(list(beam.items())[:top_paths]):
            labels[n, k, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
            lengths[n, k], scores[n, k] = len(prefix), _log_add(*ends)
    return scores.to(x.dtype if x.dtype == torch.float64 else torch.float32), labels, lengths


def _next_beam(beam: _Beam, row: list[float], beam_width: int, blank: int, prune_log_prob: float) -> _Beam:
    """The best prefixes after one more frame, each with its log-probability on a blank and on its last label."""
    grown: _Beam = {}
    for prefix, (on_blank, on_label) in beam.items():
        total = _log_add(on_blank, on_label)
        last = prefix[-1] if prefix else blank
        a, b = grown.get(prefix, (-math.inf, -math.inf))
        grown[prefix] = (_log_add(a, total + row[blank]), _log_add(b, on_label + row[last]) if prefix else b)
        for c, value in enumerate(row):
            if c == blank or value < prune_log_prob:
                continue
            longer = (*prefix, c)
            a, b = grown.get(longer, (-math.inf, -math.inf))
            grown[longer] = (a, _log_add(b, (on_blank if c == last else total) + value))
    ranked = sorted(grown.items(), key=lambda item: -_log_add(*item[1]))
    return {prefix: ends for prefix, ends in ranked[:beam_width] if max(ends) > -math.inf}


def _log_add(a: float, b: float) -> float:
    low, high = min(a, b), max(a, b)
    return high + math.log1p(math.exp(low - high)) if low > -math.inf and high < math.inf else high


def _scores_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _greedy_fake(x: Tensor, input_lengths: Tensor | None, blank: int) -> _Found:
    frames, items = x.shape[:2]
    labels = x.new_empty((items, frames), dtype=torch.int64)
    return x.new_empty((items,), dtype=_scores_dtype(x)), labels, x.new_empty((items,), dtype=torch.int64)


def _beam_fake(
    x: Tensor, input_lengths: Tensor | None, beam_width: int, blank: int, top_paths: int, prune_log_prob: float
) -> _Found:
    size = (x.shape[1], top_paths)
    labels = x.new_empty((*size, x.shape[0]), dtype=torch.int64)
    return x.new_empty(size, dtype=_scores_dtype(x)), labels, x.new_empty(size, dtype=torch.int64)


_greedy: Any = Op(
    "ctc_greedy",
    "(Tensor x, Tensor? input_lengths, SymInt blank) -> (Tensor scores, Tensor labels, Tensor lengths)",
    fake=_greedy_fake,
)
_beam: Any = Op(
    "ctc_beam",
    "(Tensor x, Tensor? input_lengths, SymInt beam_width, SymInt blank, SymInt top_paths, float prune_log_prob) "
    "-> (Tensor scores, Tensor labels, Tensor lengths)",
    fake=_beam_fake,
)
