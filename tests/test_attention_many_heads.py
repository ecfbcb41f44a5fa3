"""More batch items and heads than a grid's second dimension holds: windows of a picture are such a batch."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

MOST = 65535  # blocks along the second and third dimension of a grid
BATCH = 40_000


@pytest.fixture
def grids(monkeypatch):
    """The grids of all launches of attention's kernels, none of which runs."""
    found = []

    class Kernel:
        def __getitem__(self, grid):
            found.append(grid)
            return lambda *args, **kwargs: None

    for name in ("attention_fwd", "attention_bwd", "attention_bias_bwd", "attention_map", "_attention_bwd"):
        module = importlib.import_module(f"pydl.kernels.{name}")
        for kernel in [k for k in vars(module) if k.startswith("_attention") and k.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Kernel())
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_every_grid_is_legal(grids, masked):
    fwd, bwd, bias_bwd, tile_map = (
        getattr(importlib.import_module(f"pydl.kernels.{name}"), name)
        for name in ("attention_fwd", "attention_bwd", "attention_bias_bwd", "attention_map")
    )
    q, k, v = (torch.zeros(BATCH, 2, 3, 16) for _ in range(3))
    mask = torch.ones(BATCH, 2, 3, 3, dtype=torch.bool) if masked else None
    bias = torch.zeros(BATCH, 2, 3, 3)
    vectors, band = (None,) * 5, (0, -1, -1)
    tiles = list(tile_map(mask, *vectors, BATCH, 3, 3, *band)) if masked else []
    tail = (*vectors, tiles, *band, 0.25, 0.0, 0)
    out, lse = fwd(q, k, v, mask, bias, *tail)
    bwd(out, None, q, k, v, out, lse, mask, bias, *tail)
    bias_bwd(out, None, q, k, v, out, lse, mask, bias, *tail)
    assert len(grids) >= (9 if masked else 5)  # delta twice, and four for a map
    assert all(max(grid[1:], default=1) <= MOST and grid[0] < 2**31 for grid in grids), grids
    assert any(grid[0] > MOST for grid in grids)
