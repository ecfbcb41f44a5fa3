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


def torchvision_op(name: str) -> Callable[..., Any] | None:
    """torchvision.ops.<name>, None where it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision import ops

    found: Callable[..., Any] = getattr(ops, name)
    return found
