"""Batch normalisation whose statistics are those of several processes: local kernels, and two exchanges of vectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydl.backend import Decision, choose
from pydl.ops.batch_norm import SYNC_FAMILY, bwd, dx_from_sums, normalise, stats, update

_ONCE = (
    "SyncBatchNorm: its gradient cannot be differentiated again, since the sums in it come from other processes; "
    "use BatchNorm1d, 2d or 3d where second derivatives are needed"
)


def sync_decision(x: Tensor) -> Decision:
    """The implementation for a call on ``x``."""
    return choose(SYNC_FAMILY, x)


def sync_batch_norm(
    decision: Decision,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    biased_running_var: bool,
    group: Any,
) -> Tensor:
    """:func:`pydl.ops.batch_norm` in training over the joined batches of a process group.

    Each process gets the result of its own batch, and gradients of parameters that hold its own share; a batch may be
    empty. The running statistics are updated in place.
    """
    y: Tensor = _Sync.apply(
        x, weight, bias, running_mean, running_var, momentum, eps, biased_running_var, group, decision
    )
    return y


def _joined(decision: Decision, x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, count) of all processes, in float64 and the same bits in each."""
    mean, var = stats(decision, x)
    count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
    own = torch.cat([mean.double(), var.double(), count])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    table = torch.stack(every)
    means, variances, counts = table.split([mean.numel(), mean.numel(), 1], dim=1)
    total = counts.sum()
    share = counts / total.clamp(min=1)
    joined = (share * means).sum(0)
    return joined, (share * (variances + (means - joined) ** 2)).sum(0), total


class _Sync(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        biased: bool,
        group: Any,
        decision: Decision,
    ) -> Tensor:
        mean, var, total = _joined(decision, x, group)
        if running_mean is not None and running_var is not None:
            batch_var = var if biased else var * (total / (total - 1))
            # where no process has a value, nothing moves
            seen = [torch.where(total > 0, b, r.double()) for b, r in ((mean, running_mean), (batch_var, running_var))]
            update(decision, running_mean, running_var, *seen, momentum, 1.0)
        y: Tensor = normalise(decision, x, mean, var, weight, bias, None, False, eps, False)
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps, ctx.group, ctx.decision = eps, group, decision
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        with torch.no_grad():
            mask = [False, True, True, False]
            _, dweight, dbias, _ = bwd(ctx.decision, dy, x, mean, var, None, None, True, ctx.eps, mask)
            dx = None
            if ctx.needs_input_grad[0]:
                sums = torch.cat([dweight, dbias]).double()
                dist.all_reduce(sums, group=ctx.group)
                averages = (sums / total.clamp(min=1)).chunk(2)
                dx = dx_from_sums(ctx.decision, dy, x, mean, var, weight, *averages, ctx.eps)
        given: tuple[Tensor | None, ...] = (
            dx,
            dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            dbias.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
        )
        if torch.is_grad_enabled():
            given = tuple(None if g is None else _Once.apply(g, dy, x) for g in given)
        return (*given, *([None] * 7))


class _Once(torch.autograd.Function):
    """A gradient as it is, whose own derivative is an error with a reason."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_ONCE)
