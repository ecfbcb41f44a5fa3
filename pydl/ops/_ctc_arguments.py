"""The arguments that the CTC ops share: lengths, targets, the unbatched form, and what is wrong with them.

All of them take log_probs [T, N, C] or [T, C], targets as padded rows [N, S] or one after the other in a 1-D tensor,
and two lengths for each item, by torch's rules. The public function calls, in this order,

    x, unbatched = batched(op, log_probs)                    # [T, N, C]
    check_blank(op, blank, x.shape[2])
    targets = as_targets(op, targets, x.shape[1], x.device)
    input_lengths = as_lengths(op, "input_lengths", input_lengths, x.shape[1], x.device)
    target_lengths = as_lengths(op, "target_lengths", target_lengths, x.shape[1], x.device)

None of them looks at a value on a device, so nothing waits for a GPU. The kernels check labels and lengths where they
read them. When a CPU kernel refuses them, :func:`explain_bad_targets` finds out which item it was:

    except RuntimeError:
        explain_bad_targets(op, targets, input_lengths, target_lengths, blank, *sizes)
        raise
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Lengths = Tensor | Sequence[int]
_INTEGERS = (torch.int32, torch.int64)


class BadTargetError(ValueError, RuntimeError):
    """A label or length outside its range; a RuntimeError too, as torch.nn.functional.ctc_loss raises for lengths."""


def require_tensor(op: str, name: str, value: Any) -> None:
    """TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: argument {name!r} must be a Tensor, got {type(value).__name__}")


def batched(op: str, log_probs: Tensor, name: str = "log_probs") -> tuple[Tensor, bool]:
    """``log_probs`` as [T, N, C], and whether it came without N."""
    require_tensor(op, name, log_probs)
    if log_probs.dim() not in (2, 3):
        raise RuntimeError(f"{op}: argument {name!r} must have shape [T, N, C] or [T, C], got {list(log_probs.shape)}")
    unbatched = log_probs.dim() == 2
    return (log_probs.unsqueeze(1) if unbatched else log_probs), unbatched


def check_blank(op: str, blank: int, classes: int) -> None:
    """TypeError unless ``blank`` is an int, RuntimeError unless it is a class."""
    if isinstance(blank, bool) or not isinstance(blank, (int, torch.SymInt)):
        raise TypeError(f"{op}: argument 'blank' must be an int, got {blank!r}")
    if not 0 <= blank < classes:
        raise RuntimeError(f"{op}: argument 'blank' must be in [0, C={classes}), got {blank}")


def as_lengths(op: str, name: str, lengths: Lengths, n: int, device: torch.device) -> Tensor:
    """Lengths as a contiguous int32 or int64 tensor [n] on ``device``.

    Args:
        op: the public function's name, for messages.
        name: the argument's name.
        lengths: integer tensor with n elements on any device, or a tuple or list of n ints.
        n: batch size.
        device: where the kernel runs. Moving host lengths to a GPU does not wait for it; the reverse must.

    Raises:
        TypeError: neither a tensor nor a tuple or list of ints.
        RuntimeError: a tensor that is not integral, or not n lengths.
    """
    if isinstance(lengths, Tensor):
        if lengths.dtype is torch.bool or lengths.is_floating_point() or lengths.is_complex():
            raise RuntimeError(f"{op}: argument {name!r} must be integral, got {lengths.dtype}")
        count = lengths.numel()
    elif isinstance(lengths, (tuple, list)):
        lengths, count = [_as_int(op, name, lengths, v) for v in lengths], len(lengths)
    else:
        raise TypeError(
            f"{op}: argument {name!r} must be a Tensor or a tuple of ints, got {lengths!r} of type "
            f"{type(lengths).__name__}"
        )
    if count != n:
        raise RuntimeError(f"{op}: argument {name!r} must hold one length for each of the {n} items, got {count}")
    if not isinstance(lengths, Tensor):
        return _to_device(torch.tensor(lengths, dtype=torch.int64), device, True)
    if lengths.dtype not in _INTEGERS:
        lengths = lengths.to(torch.int64)
    if lengths.dim() != 1:
        lengths = lengths.reshape(-1)
    return _to_device(lengths, device, False).contiguous()


def _as_int(op: str, name: str, lengths: Any, value: Any) -> int:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        # NumPy's integers and 0-dimensional tensors
        return operator.index(value)
    raise TypeError(f"{op}: argument {name!r} must be a Tensor or a tuple of ints, got {lengths!r}")


def _to_device(values: Tensor, device: torch.device, private: bool) -> Tensor:
    """``values`` on ``device``, without waiting where nobody could change them meanwhile.

    A copy from pageable memory has read it when it returns. Pinned memory that the caller holds is read later.
    """
    if values.device == device:
        return values
    to_gpu = device.type == "cuda" and values.device.type == "cpu"
    return values.to(device, non_blocking=to_gpu and (private or not values.is_pinned()))


def as_targets(op: str, targets: Tensor, n: int, device: torch.device) -> Tensor:
    """Targets as an int32 or int64 tensor [n, S] or [sum of the lengths] on ``device``; other dtypes become int64.

    Raises:
        TypeError: no tensor.
        RuntimeError: a tensor of another rank, or not n rows.
    """
    require_tensor(op, "targets", targets)
    if targets.dim() not in (1, 2):
        raise RuntimeError(
            f"{op}: argument 'targets' must have shape [N, S] or [sum of target_lengths], got {list(targets.shape)}"
        )
    if targets.dim() == 2 and targets.shape[0] != n:
        raise RuntimeError(
            f"{op}: argument 'targets' must have one row for each of the {n} items, got {list(targets.shape)}"
        )
    return _to_device(targets if targets.dtype in _INTEGERS else targets.to(torch.int64), device, False)


def may_look(x: Tensor) -> bool:
    """Whether a composition may decide by values: on the CPU, outside of graphs and transforms."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return x.device.type == "cpu" and not traced


def explain_bad_lengths(op: str, input_lengths: Tensor, frames: int) -> None:
    """Raises BadTargetError for the first input length outside [0, frames]; returns if there is none."""
    for n, value in enumerate(input_lengths.tolist()):
        if not 0 <= value <= frames:
            raise BadTargetError(f"{op}: item {n}: input length {value} must be in [0, T={frames}]")


def explain_bad_targets(
    op: str,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    frames: int,
    classes: int,
) -> None:
    """Names the first length or label that is out of range; returns if there is none.

    Slow, for the error path only: every value is looked at on the host.

    Args:
        op: the public function's name, for messages.
        targets: [N, S] or 1-D, as from :func:`as_targets`.
        input_lengths: [N], as from :func:`as_lengths`.
        target_lengths: [N], likewise.
        blank: the blank's class.
        frames: T, the largest input length.
        classes: C; labels lie below.

    Raises:
        BadTargetError: with item, position, rule and value.
    """
    explain_bad_lengths(op, input_lengths, frames)
    lengths = target_lengths.tolist()
    longest, limit = (targets.numel(), "all targets") if targets.dim() == 1 else (targets.shape[1], "S")
    for n, value in enumerate(lengths):
        if not 0 <= value <= longest:
            raise BadTargetError(f"{op}: item {n}: target length {value} must be in [0, {limit}={longest}]")
    if targets.dim() == 1 and sum(lengths) != longest:
        raise BadTargetError(
            f"{op}: argument 'targets' must hold as many labels as target_lengths say, {sum(lengths)}, got {longest}"
        )
    rows = targets.split(lengths) if targets.dim() == 1 else [targets[n, :v] for n, v in enumerate(lengths)]
    for n, row in enumerate(rows):
        for position, label in enumerate(row.tolist()):
            if not 0 <= label < classes or label == blank:
                raise BadTargetError(
                    f"{op}: item {n}: label {label} at position {position} must be in [0, C={classes}) "
                    f"and not the blank {blank}"
                )
