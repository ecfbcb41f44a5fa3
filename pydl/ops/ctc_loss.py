"""Connectionist temporal classification: schemas, fakes, derivatives and the public functions."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pydl.backend import _CHECKED, Decision, Family, choose
from pydl.ops._contract import Op, wants
from pydl.ops._ctc_arguments import (
    Lengths,
    as_lengths,
    as_targets,
    batched,
    check_blank,
    explain_bad_targets,
)
from pydl.ops._ctc_second import ctc_second

__all__ = ["ctc_loss", "ctc_loss_from_logits"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_OPS = ("ctc_loss_value", "ctc_loss_fwd", "ctc_loss_bwd")
_FAMILY, _FAMILY_LOGITS = (
    Family(
        name,
        ops=_OPS,
        order={"cpu": ("cpu",), "cuda": ("cuda",)},
        dtypes={"cpu": _FLOATS, "cuda": _FLOATS, "simt": _FLOATS},
    )
    for name in ("ctc_loss", "ctc_loss_from_logits")
)
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Negative log-likelihood of label sequences, summed over all their alignments.

    Args:
        log_probs: [T, N, C] or [T, C], natural log-probabilities (log_softmax over C); floating point, any strides.
        targets: labels, [N, S] padded or [sum of target_lengths] one after the other; what lies behind a target's
            length is not looked at.
        input_lengths: frames of each item, at most T; tensor [N] on any device, or a tuple of ints.
        target_lengths: labels of each item; likewise.
        blank: class of the blank; any, the last one included.
        reduction: "none" gives [N] (or [] without N); "mean" divides by the target lengths (at least 1), then takes the
            mean over the batch; "sum" adds.
        zero_infinity: whether an infinite loss, of an input too short for its target, and its gradient become 0.

    Returns:
        Loss in the dtype of log_probs, float32 for half precision, which is computed in float32.

    Raises:
        TypeError: an argument of another type.
        ValueError: a CPU tensor holds a label or length out of range; the message names item, position and value. On a
            GPU such an item has loss NaN and nothing outside the tensors is read; with PYDL_CHECKED=1 in the
            environment the call waits for the GPU and raises as on the CPU.
        RuntimeError: shapes or a blank that make no sense.

    The gradient follows torch: exp(log_probs) minus the posterior, which is the derivative for the logits before a
    log_softmax and the one for log_probs only up to a term that log_softmax removes. An infinite loss has gradient NaN.
    The forward keeps the posterior of every state (T times the sum of 2 L + 1), in log2 with offsets, so float32 does
    not drift with T; nothing waits for a GPU; the same bits on every run. The second derivative is computed by
    composed torch operations, frame by frame.

    Source: Graves et al., Connectionist Temporal Classification, ICML 2006.
    """
    arguments = (targets, input_lengths, target_lengths)
    return _public(_FAMILY, log_probs, arguments, blank, reduction, zero_infinity)


def ctc_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """:func:`ctc_loss` of log_softmax(logits, -1), without writing the log-probabilities.

    Args:
        logits: [T, N, C] or [T, C], any real numbers; floating point, any strides.
        targets: as in :func:`ctc_loss`.
        input_lengths: as in :func:`ctc_loss`.
        target_lengths: as in :func:`ctc_loss`.
        blank: as in :func:`ctc_loss`.
        reduction: as in :func:`ctc_loss`.
        zero_infinity: as in :func:`ctc_loss`.

    Returns:
        Loss in the dtype of logits, float32 for half precision.

    Raises:
        TypeError: an argument of another type.
        ValueError: as in :func:`ctc_loss`.
        RuntimeError: shapes or a blank that make no sense.

    The forward reads each logit once, the backward reads it once more and writes its gradient, softmax minus posterior.
    """
    arguments = (targets, input_lengths, target_lengths)
    return _public(_FAMILY_LOGITS, logits, arguments, blank, reduction, zero_infinity)


def _public(
    family: Family,
    x_in: Tensor,
    arguments: tuple[Tensor, Lengths, Lengths],
    blank: int,
    reduction: str,
    zero_infinity: bool,
) -> Tensor:
    op, logits = family.name, family is _FAMILY_LOGITS
    x, unbatched = batched(op, x_in, "logits" if logits else "log_probs")
    code = _reduction(op, reduction, zero_infinity)
    declined = "" if x.is_floating_point() else f"dtype {x.dtype} is left to torch"
    decision = choose(family, x, declined)
    steps, n, classes = x.shape
    if x.numel() == 0:
        raise RuntimeError(
            f"{op}: argument {'logits' if logits else 'log_probs'!r} must not be empty, got {[*x.shape]}"
        )
    check_blank(op, blank, classes)
    targets = as_targets(op, arguments[0], n, x.device)
    input_lengths = as_lengths(op, "input_lengths", arguments[1], n, x.device)
    target_lengths = as_lengths(op, "target_lengths", arguments[2], n, x.device)
    tensors = (targets, input_lengths, target_lengths)
    explain = functools.partial(explain_bad_targets, op, *tensors, blank, steps, classes)
    if decision.backend == "torch":
        if x.device.type == "cpu" and not _unreadable(target_lengths):
            explain()
        composed = torch_loss_from_logits if logits else torch_loss
        loss = composed(x, *tensors, blank, reduction, zero_infinity)
    else:
        most = _most_labels(targets, arguments[2])
        args = (x, *tensors, blank, most, logits, zero_infinity, code)
        try:
            loss = _fwd(decision, *args) if wants((x,)) else _value(decision, *args)
        except RuntimeError:
            if x.device.type == "cpu" and not _unreadable(target_lengths):
                explain()
            raise
        if _CHECKED and decision.backend in ("cuda", "simt") and not _unreadable(loss) and loss.isnan().any():
            explain()
    return loss.squeeze(0) if unbatched and code == 0 else loss


def _reduction(op: str, reduction: str, zero_infinity: bool) -> int:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: argument 'reduction' must be 'none', 'mean' or 'sum', got {reduction!r}")
    if type(zero_infinity) is not bool:
        raise TypeError(f"{op}: argument 'zero_infinity' must be a bool, got {zero_infinity!r}")
    return _REDUCTIONS[reduction]


def _unreadable(values: Tensor) -> bool:
    """Whether the values cannot be looked at now: a graph is being traced, or a transform wraps them."""
    return (
        torch.compiler.is_compiling()
        or type(values) is not Tensor
        or torch._C._functorch.is_functorch_wrapped_tensor(values)
    )


def _most_labels(targets: Tensor, target_lengths: Lengths) -> int:
    """A bound on the target lengths that the host knows without asking a GPU; kernels are chosen by it."""
    if targets.dim() == 2:
        return targets.shape[1]
    most = targets.numel()
    if isinstance(target_lengths, Tensor):
        known = target_lengths.device.type == "cpu" and target_lengths.numel() and not _unreadable(target_lengths)
        largest = int(target_lengths.max()) if known else most
    else:
        largest = max((int(v) for v in target_lengths), default=0)
    return max(0, min(most, largest))


def torch_loss(log_probs: Tensor, *args: Any) -> Tensor:
    """Torch's own op on float32, since it takes no half precision."""
    if log_probs.is_floating_point() and log_probs.dtype.itemsize < 4:
        log_probs = log_probs.float()
    return torch.nn.functional.ctc_loss(log_probs, *args)


def torch_loss_from_logits(logits: Tensor, *args: Any) -> Tensor:
    """The same from logits."""
    wide = logits.float() if logits.is_floating_point() and logits.dtype.itemsize < 4 else logits
    return torch_loss(wide.log_softmax(-1), *args)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _width(targets: Tensor, n: int) -> int:
    """States of all items in one frame: two for each label and one more."""
    return n * (2 * targets.shape[1] + 1) if targets.dim() == 2 else 2 * targets.shape[0] + n


def _value_fake(
    x: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    max_length: int,
    logits: bool,
    zero_infinity: bool,
    reduction: int,
) -> Tensor:
    return x.new_empty((x.shape[1],) if reduction == 0 else (), dtype=_wide(x.dtype))


def _fwd_fake(x: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, ...]:
    steps, n, _ = x.shape
    dtype = _wide(x.dtype)
    return (
        _value_fake(x, targets, *args),
        x.new_empty((n,), dtype=dtype),
        x.new_empty((steps * _width(targets, n),), dtype=dtype),
        x.new_empty((steps, n) if args[4] else (0,), dtype=dtype),
        x.new_empty((targets.numel(),), dtype=torch.int32),
    )


def _bwd_fake(dloss: Tensor, x: Tensor, *args: Any) -> Tensor:
    swapped = x.transpose(0, 1)
    if swapped.is_contiguous() and not x.is_contiguous():
        return torch.empty(swapped.shape, dtype=x.dtype, device=x.device).transpose(0, 1)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, targets, input_lengths, target_lengths, blank, _, *flags = inputs
    ctx.save_for_backward(x, targets, input_lengths, target_lengths, *outputs[1:])
    ctx.flags = (blank, *flags)


def _fwd_backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = None if dloss is None else _bwd(ctx.decision, dloss, *ctx.saved_tensors, *ctx.flags)
    return dx, *((None,) * 8)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dloss, x, targets, input_lengths, target_lengths, nll, *_ = inputs
    ctx.save_for_backward(dloss, x, targets, input_lengths, target_lengths, nll)
    ctx.flags = inputs[-4:]


def _bwd_backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, ...]:
    ddloss, dx = (None, None) if ddx is None else ctc_second(ddx, *ctx.saved_tensors, *ctx.flags)
    return ddloss, dx, *((None,) * 11)


_ARGUMENTS = "Tensor x, Tensor targets, Tensor input_lengths, Tensor target_lengths"
_FLAGS = "bool logits, bool zero_infinity, int reduction"
# nll [N]; rows: log2 of each state's posterior, per frame the states of all items; lse [T, N] with logits; chain: links
# between equal labels
_KEPT = "Tensor nll, Tensor rows, Tensor lse, Tensor chain"

_fwd = Op(
    "ctc_loss_fwd",
    f"({_ARGUMENTS}, SymInt blank, SymInt max_length, {_FLAGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
    hidden=4,
)
_bwd = Op(
    "ctc_loss_bwd",
    f"(Tensor dloss, {_ARGUMENTS}, {_KEPT}, SymInt blank, {_FLAGS}) -> Tensor",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)


def _value_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.flags = inputs[4:]


def _value_backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
    """Only for a direct call of the operator with a gradient: the posteriors are computed then."""
    if dloss is None:
        return (None,) * 9
    blank, _, *flags = ctx.flags
    decision: Decision = ctx.decision
    x, *tensors = ctx.saved_tensors
    handle = _fwd.overload(decision)
    _, *kept = handle(x.detach(), *tensors, *ctx.flags)
    return _bwd(decision, dloss, x, *tensors, *kept, blank, *flags), *((None,) * 8)


_value = Op(
    "ctc_loss_value",
    f"({_ARGUMENTS}, SymInt blank, SymInt max_length, {_FLAGS}) -> Tensor",
    fake=_value_fake,
    setup=_value_setup,
    backward=_value_backward,
)
