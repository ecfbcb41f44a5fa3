"""The second derivative of the CTC loss, in composed torch operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# stands for log 0: sums over every frame stay finite, so that derivatives of unreachable states are 0 and not NaN
_NEVER = -1e30


def ctc_second(
    ddx: Tensor,
    dloss: Tensor,
    x: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    nll: Tensor,
    blank: int,
    logits: bool,
    zero_infinity: bool,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(ddx * dx) with respect to dloss and x, where dx = g (exp(lp) - posterior) is the first gradient.

    The posterior P is the gradient of log p with respect to the log-probabilities, so its Jacobian is symmetric, and
    its product with ddx is the derivative of P along ddx. That derivative is carried through the two recursions
    beside their values (a tangent), frame by frame: 2 T steps over [N, 2 S + 1]. On a GPU, 1-D targets make the host
    wait for the longest target length. Differentiable again, as everything here is a torch operation.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    steps, n, _ = x.shape
    lp = x.to(wide)
    lp = lp.log_softmax(-1) if logits else lp
    frames = torch.arange(steps, device=x.device).unsqueeze(1)
    inside = (frames < input_lengths).unsqueeze(-1)
    lengths = target_lengths.clamp(min=1).to(wide)
    share = {0: torch.ones_like(lengths), 1: 1.0 / (n * lengths), 2: torch.ones_like(lengths)}[reduction]
    share = share.masked_fill(nll.isinf(), 0.0 if zero_infinity else float("nan"))
    scale = (dloss.to(wide) * share).view(1, n, 1)
    along = torch.where(inside, ddx.to(wide), 0.0)
    states, skips = _states(targets, target_lengths, blank)
    posterior, change = _posterior(lp, along, states, skips, input_lengths, target_lengths)
    p = lp.exp()
    ddloss = torch.where(inside, along * (p - posterior), 0.0).sum((0, 2)) * share
    ddloss = ddloss if reduction == 0 else ddloss.sum()
    dlp = torch.where(inside, scale * (along * p - change), 0.0)
    dx = dlp - p * dlp.sum(-1, keepdim=True) if logits else dlp
    return ddloss.reshape(dloss.shape).to(dloss.dtype), dx.to(x.dtype)


def _states(targets: Tensor, target_lengths: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Class of every state [N, 2 S + 1], and whether it may be entered from two states before (else from one)."""
    n = target_lengths.shape[0]
    labels = targets.long()
    if targets.dim() == 1:
        # while a graph is traced no length is known: no target is longer than all labels together
        known = type(target_lengths) is Tensor and not torch.compiler.is_compiling()
        most = int(target_lengths.max()) if known and n else targets.shape[0]
        start = target_lengths.cumsum(0) - target_lengths
        place = start.unsqueeze(1) + torch.arange(most, device=targets.device)
        labels = labels[place.clamp(max=max(targets.numel() - 1, 0))] if targets.numel() else labels.new_zeros(n, most)
    real = torch.arange(labels.shape[1], device=labels.device) < target_lengths.unsqueeze(1)
    labels = labels.masked_fill(~real, blank)
    blanks = torch.full_like(labels, blank)
    states = pad(torch.stack([blanks, labels], -1).flatten(1), (0, 1), value=blank)
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    return states, skips


def _posterior(
    lp: Tensor, along: Tensor, states: Tensor, skips: Tensor, input_lengths: Tensor, target_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Posterior of every class [T, N, C], and its derivative along `along`."""
    steps, n, _ = lp.shape
    index = states.unsqueeze(0).expand(steps, -1, -1)
    y = lp.gather(2, index).clamp(min=_NEVER)
    v = along.gather(2, index)
    width = states.shape[1]
    place = torch.arange(width, device=lp.device).unsqueeze(0)
    last = 2 * target_lengths.unsqueeze(1)
    exists = place <= last
    alpha, dalpha = _recursion(y, v, (place < 2) & exists, skips, torch.zeros_like(input_lengths), input_lengths, 1)
    ends = (place <= last) & (place >= last - 1)
    # backwards the states are walked from the right, and the skip belongs to the state that is left
    back = torch.zeros_like(skips)
    back[:, : width - 2] = skips[:, 2:]
    mirrored = (y.flip(-1), v.flip(-1), ends.flip(-1), back.flip(-1))
    beta, dbeta = _recursion(*mirrored, input_lengths - 1, input_lengths, -1)
    beta, dbeta = beta.flip(-1), dbeta.flip(-1)
    inside = (torch.arange(steps, device=lp.device).unsqueeze(1) < input_lengths).unsqueeze(-1)
    total = torch.where(exists & inside, alpha + beta - y, _NEVER)
    weights = torch.where(inside, torch.softmax(total, -1), 0.0)  # the frame's log p is the sum over its states
    slope = torch.where(inside, dalpha + dbeta - v, 0.0)
    change = weights * (slope - (weights * slope).sum(-1, keepdim=True))
    zeros = torch.zeros_like(lp)
    return zeros.scatter_add(2, index, weights), zeros.scatter_add(2, index, change)


def _recursion(
    y: Tensor, v: Tensor, start: Tensor, skips: Tensor, first: Tensor, input_lengths: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of arriving in each state [T, N, 2 S + 1] and their derivatives along v.

    Each item begins at its frame `first` in the states `start` and walks by `step`; frames outside it hold log 0.
    """
    steps = y.shape[0]
    never = torch.full_like(y[0], _NEVER)
    state, tangent = never, torch.zeros_like(never)
    values, tangents = [never] * steps, [tangent] * steps
    for t in range(steps) if step > 0 else range(steps - 1, -1, -1):
        opens = (first == t).unsqueeze(1)
        active = (t < input_lengths).unsqueeze(1)
        paths = torch.stack([state, pad(state, (1, -1), value=_NEVER), pad(state, (2, -2), value=_NEVER)])
        paths = torch.cat([paths[:2], paths[2:].masked_fill(~skips, _NEVER)])
        moves = torch.stack([tangent, pad(tangent, (1, -1)), pad(tangent, (2, -2))])
        arrived = torch.where(opens, torch.where(start, 0.0, never), paths.logsumexp(0))
        moved = torch.where(opens, 0.0, (paths.softmax(0) * moves).sum(0))
        state = torch.where(active, (arrived + y[t]).clamp(min=_NEVER), never)
        tangent = torch.where(active, moved + v[t], 0.0)
        values[t], tangents[t] = state, tangent
    return torch.stack(values), torch.stack(tangents)
