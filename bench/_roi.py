"""What the benchmarks of RoI pooling share: boxes as a detector proposes them, torchvision where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def proposals(
    count: int, shape: tuple[int, ...], sides: tuple[int, int], generator: torch.Generator, device: str
) -> Tensor:
    """[count, 5] boxes in pixels of a map [N, C, H, W], with sides drawn evenly; they may hang over the edges."""
    n, _, h, w = shape

    def uniform(columns: int) -> Tensor:
        return torch.rand(count, columns, generator=generator, device=device)

    half = (uniform(2) * (sides[1] - sides[0]) + sides[0]) / 2
    center = uniform(2) * torch.tensor([w, h], device=device)
    image = (uniform(1) * n).floor()
    return torch.cat([image, center - half, center + half], 1)


def grid_of_samples(rows: Tensor, input: Tensor, bins: int, sampling: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """Places of all samples of boxes [K, 4] in F.grid_sample's coordinates, and which lie on the map.

    [K, y, x, 2] and [K, y, x] with bins * sampling places along each axis, ordered by bin.
    """
    rows = rows - 0.5 if aligned else rows
    size = rows[:, 2:] - rows[:, :2]
    if not aligned:
        size = size.clamp(min=1)
    steps = (torch.arange(bins * sampling, device=rows.device) + 0.5) / (bins * sampling)
    points = rows[:, :2, None] + size[:, :, None] * steps  # [K, (x, y), bins * sampling]
    extent = torch.tensor(input.shape[:1:-1], device=rows.device)[:, None]
    inside = (points >= -1) & (points <= extent)
    x, y = (2 * points / (extent - 1).clamp(min=1) - 1).to(input.dtype).unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    return grid, inside[:, 1, :, None] & inside[:, 0, None, :]


def torchvision_op(name: str) -> Callable[..., Any] | None:
    """torchvision.ops.<name>, None where it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision import ops

    found: Callable[..., Any] = getattr(ops, name)
    return found
