"""Forced alignment: schema, fake, derivative, torch's composition and the public function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op
from pydl.ops._ctc_arguments import (
    BadTargetError,
    Lengths,
    as_lengths,
    as_targets,
    batched,
    check_blank,
    explain_bad_targets,
    may_look,
)

__all__ = ["ctc_forced_align"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FAMILY = Family(
    "ctc_forced_align",
    ops=("ctc_align",),
    order={"cpu": ("cpu",), "cuda": ("cuda",)},
    dtypes={"cpu": _FLOATS, "cuda": _FLOATS, "simt": _FLOATS},
)
_NAME = "ctc_forced_align"


def ctc_forced_align(
    log_probs: Tensor, targets: Tensor, input_lengths: Lengths, target_lengths: Lengths, blank: int = 0
) -> tuple[Tensor, Tensor]:
    """Most probable frame-by-frame alignment of known targets under connectionist temporal classification.

    Args:
        log_probs: [T, N, C] or [T, C], floating point, log-probabilities as for ctc_loss (not necessarily normalised).
        targets: integers, [N, S] with padding that is never read, or all targets one after the other in a 1-D tensor.
        input_lengths: [N] frames of each item, at most T; integer tensor on any device, or a tuple of ints.
        target_lengths: [N] labels of each item, likewise.
        blank: class of the blank, any in [0, C).

    Returns:
        alignment: [N, T] (or [T]) int64, the class at each frame, a label or the blank; -1 past the input length.
        scores: [N, T] (or [T]) log-probability of that class, 0 past the input length; float64 for float64, else
            float32. Their sum over an item is the log-probability of the path.

    Raises:
        TypeError: log_probs or targets is no tensor, or lengths are not ints.
        RuntimeError: a shape or blank that makes no sense.
        ValueError: on the CPU: a label or length out of range, or an item without a path, by item, position and value.

    Viterbi's search over the states of Graves et al. 2006, sums in float32 (float64 for float64) that are kept relative
    to the best state. Of equally good paths the one that is further along at the last frame where they differ is taken.
    NaN counts as probability zero. An item has no path if its frames are fewer than its labels plus the repeats among
    them, or if every path has probability zero. On a GPU nothing waits for the device, so nothing can be raised: there
    an item without a path has alignment -1 and scores -inf throughout its length, and an item with a bad label or
    length alignment -1 and scores NaN in all T frames. The gradient of the scores is that of picking them from
    log_probs; the alignment is taken as given.
    """
    x, unbatched = batched(_NAME, log_probs)
    if not x.is_floating_point():
        raise RuntimeError(f"{_NAME}: argument 'log_probs' must be floating point, got {x.dtype}")
    check_blank(_NAME, blank, x.shape[2])
    device, items = x.device, x.shape[1]
    targets = as_targets(_NAME, targets, items, device)
    frames = as_lengths(_NAME, "input_lengths", input_lengths, items, device)
    lengths = as_lengths(_NAME, "target_lengths", target_lengths, items, device)
    decision = choose(_FAMILY, x)
    longest = _longest(targets, target_lengths)
    if decision.backend == "torch":
        scores, alignment = _torch(x, targets, frames, lengths, blank, longest)
        if may_look(x) and _failed(alignment, targets, frames, lengths):
            _explain(x, targets, frames, lengths, blank, _torch)
    else:
        try:
            scores, alignment = _align(decision, x, targets, frames, lengths, blank, longest)
        except RuntimeError:
            _explain(x, targets, frames, lengths, blank, functools.partial(_align, decision))
            raise
    return (alignment.squeeze(0), scores.squeeze(0)) if unbatched else (alignment, scores)


def _longest(targets: Tensor, target_lengths: Lengths) -> int:
    """An upper bound of the target lengths that the host knows: the kernel is chosen by it."""
    if targets.dim() == 2:
        return targets.shape[1]
    if isinstance(target_lengths, Tensor):
        return targets.shape[0]
    return max(target_lengths, default=0)


def _failed(alignment: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor) -> bool:
    """Whether an item of the composition has no alignment, or targets has labels that belong to none."""
    missing = ((alignment >= 0).sum(1) != frames) | ((frames == 0) & (lengths != 0))
    return bool(missing.any()) or (targets.dim() == 1 and int(lengths.sum()) != targets.shape[0])


def _explain(
    x: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor, blank: int, align: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """Raises a ValueError that names the first item with a bad label or length, or else without a path; slow."""
    explain_bad_targets(_NAME, targets, frames, lengths, blank, x.shape[0], x.shape[2])
    sizes = lengths.tolist()
    rows = targets.split(sizes) if targets.dim() == 1 else [targets[n, :size] for n, size in enumerate(sizes)]
    for n, (row, have) in enumerate(zip(rows, frames.tolist(), strict=True)):
        repeats = int((row[1:] == row[:-1]).sum())
        if have < len(row) + repeats:
            raise BadTargetError(
                f"{_NAME}: item {n}: {len(row)} labels, {repeats} of them repeats, need at least {len(row) + repeats} "
                f"frames, got input length {have}"
            )
        if not _possible(align, x[:, n : n + 1].detach(), row, frames[n : n + 1], lengths[n : n + 1], blank):
            raise BadTargetError(f"{_NAME}: item {n}: every alignment with its {len(row)} labels has probability zero")


def _possible(align: Callable[..., tuple[Tensor, Tensor]], *item: Any) -> bool:
    try:
        _, alignment = align(*item, item[1].shape[0])
    except RuntimeError:
        return False
    return bool((alignment >= 0).sum() == item[2])


def _torch(
    x: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor, blank: int, longest: int
) -> tuple[Tensor, Tensor]:
    """The same search in torch operations, one step of all items at a time."""
    acc = x if x.dtype == torch.float64 else x.float()
    with torch.no_grad():
        classes, bad = _states(targets, lengths, blank, longest, x.shape[2])
        bad |= (frames < 0) | (frames > x.shape[0])
        path, found = _viterbi(
            acc.nan_to_num(-math.inf, math.inf, -math.inf), classes, frames, lengths.clamp(0, longest)
        )
        inside = torch.arange(x.shape[0], device=x.device) < frames[:, None]
        alignment = classes.gather(1, path).masked_fill(~(inside & (found & ~bad)[:, None]), -1)
    picked = acc.gather(2, alignment.clamp(min=0).t().unsqueeze(2)).squeeze(2).t()
    scores = picked.masked_fill(alignment < 0, 0.0).masked_fill(inside & ~found[:, None], -math.inf)
    return scores.masked_fill(bad[:, None], math.nan), alignment


def _states(targets: Tensor, lengths: Tensor, blank: int, longest: int, classes: int) -> tuple[Tensor, Tensor]:
    """Class of each state [N, 2 longest + 1], blank past a target's end; and which items have bad labels or lengths."""
    position = torch.arange(longest, device=targets.device)
    inside = position < lengths[:, None]
    bad = (lengths < 0) | (lengths > longest)
    targets = targets.long()
    if targets.dim() == 1:
        ends = lengths.clamp(min=0).cumsum(0)
        bad |= ends > targets.shape[0]
        place = (ends[:, None] - lengths[:, None] + position).clamp(0, max(targets.shape[0] - 1, 0))
        labels = targets.expand(lengths.shape[0], -1).gather(1, place) if targets.shape[0] else place
    else:
        labels = targets
    bad |= (inside & ((labels < 0) | (labels >= classes) | (labels == blank))).any(1)
    labels = labels.where(inside, blank).clamp(0, classes - 1)
    states = labels.new_full((lengths.shape[0], 2 * longest + 1), blank)
    states[:, 1::2] = labels
    return states, bad


def _viterbi(values: Tensor, classes: Tensor, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """State of the best path at each frame [N, T], and whether there is one [N]."""
    may_skip = torch.ones_like(classes, dtype=torch.bool)
    may_skip[:, 3::2] = classes[:, 3::2] != classes[:, 1:-2:2]
    may_skip[:, ::2] = False
    # two columns before the states; ahead of the first frame every path is in the second, one step from the first blank
    best = values.new_full((classes.shape[0], classes.shape[1] + 2), -math.inf)
    best[:, 1] = 0
    steps = []
    for t, value in enumerate(values.unbind()):
        stay, one, two = best[:, 2:], best[:, 1:-1], best[:, :-2].masked_fill(~may_skip, -math.inf)
        came, step = torch.where(one > stay, one, stay), (one > stay).long()
        came, step = torch.where(two > came, two, came), torch.where(two > came, 2, step)
        score = came + value.gather(1, classes)
        active = (t < frames)[:, None]
        score = torch.where(active, score.masked_fill(score.isnan(), -math.inf), stay)
        steps.append(torch.where(active, step, 0))
        best = torch.nn.functional.pad(score, (2, 0), value=-math.inf)
    last = 2 * lengths[:, None].long()
    ends = best.gather(1, torch.cat((last + 1, last + 2), 1))
    state = last - (ends[:, :1] > ends[:, 1:]).long()
    found = (ends.amax(1) > -math.inf) & (frames > 0) | (frames == 0) & (lengths == 0)
    path = [state]
    for step in steps[:0:-1]:
        path.append(path[-1] - step.gather(1, path[-1]))
    if not steps:
        return classes.new_zeros((classes.shape[0], 0)), found
    return torch.cat(path[::-1], 1).clamp(min=0), found


def _align_fake(
    x: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, longest: int
) -> tuple[Tensor, Tensor]:
    size = (x.shape[1], x.shape[0])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=torch.int64)


def _align_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(outputs[1])
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _align_backward(ctx: Any, dscores: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (alignment,) = ctx.saved_tensors
    if dscores is None:
        return None, None, None, None, None, None
    picked = dscores.masked_fill(alignment < 0, 0.0).to(ctx.dtype).t().unsqueeze(2)
    dx = dscores.new_zeros(ctx.shape, dtype=ctx.dtype)
    return dx.scatter(2, alignment.clamp(min=0).t().unsqueeze(2), picked), None, None, None, None, None


_align = Op(
    "ctc_align",
    "(Tensor x, Tensor targets, Tensor input_lengths, Tensor target_lengths, SymInt blank, SymInt longest) "
    "-> (Tensor scores, Tensor alignment)",
    fake=_align_fake,
    setup=_align_setup,
    backward=_align_backward,
)
