"""Inputs and parameters that the tests of the CTC loss share."""

from __future__ import annotations

import pytest
import torch

OPS = ("ctc_loss", "ctc_loss_from_logits")
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
TORCH = ("torch",)


def every_op(parameters):
    """(op, backend, ...) for both functions."""
    return [
        pytest.param(*p.values, id=f"{op}-{p.id}", marks=p.marks) for op in OPS for p in parameters(op)
    ]  # the backend knows its op


def batch(steps=30, n=4, classes=12, labels=7, seed=0, dtype=torch.float32, device="cpu", spread=1.0):
    """Logits, targets and full lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(steps, n, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, classes, (n, labels), generator=generator)
    return x.to(device, dtype), targets.to(device), torch.full((n,), steps), torch.full((n,), labels)
