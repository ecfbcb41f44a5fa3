"""rms_norm: rows that fit the L2 cache, the rows of layer_norm's table, large and wide rows, and host cost."""

from __future__ import annotations

from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "rms_norm"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_CPU = {"cpu fwd": {"ratio_to_torch": 0.97}, "cpu bwd": {"ratio_to_torch": 0.97}}
_GPU = {"cuda fwd": {"roof_share": 0.85}, "cuda bwd": {"ratio_to_torch": 1.0, "roof_share": 0.75}}


def _shape(rows: int, columns: int) -> dict[str, Any]:
    return {"rows": rows, "columns": columns}


CASES = [
    Case("4096x1024", _shape(4096, 1024), devices=("cpu", "cuda"), targets=_CPU, panel=True),
    Case("small-256x512", _shape(256, 512), devices=("cpu", "cuda"), targets=_CPU),
    Case("tokens-3152x768", _shape(16 * 197, 768)),
    Case("wide-64x65536", _shape(64, 65536), devices=("cpu", "cuda"), targets=_CPU),
    Case("wide-4x1000000", _shape(4, 1000000), devices=("cpu", "cuda")),
    Case("large-8192x2048", _shape(8192, 2048)),
    Case("16384x4096", _shape(16384, 4096), devices=("cuda",), targets=_GPU, panel=True),
    Case("4096x32768", _shape(4096, 32768), devices=("cuda",), targets=_GPU),
    Case("65536x1024", _shape(65536, 1024), devices=("cuda",)),
    Case("host-8", _shape(1, 8), ("cpu", "cuda"), ("fwd",), _HOST, host=True),
    Case("host-8-grad", _shape(1, 8), ("cpu", "cuda"), ("fwd",), _HOST_GRAD, grad=True, host=True),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal x, weight around 1."""
    rows, columns = case.params["rows"], case.params["columns"]
    x = torch.randn(rows, columns, generator=generator, device=device).to(dtype)
    weight = (1 + 0.2 * torch.randn(columns, generator=generator, device=device)).to(dtype)
    return Call((x, (columns,), weight, 1e-5), {}, (x, weight), (1, rows))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: x and dy in, dx out. Weight and statistics are one part in `columns` and left out."""
    n = case.params["rows"] * case.params["columns"]
    return {"fwd": (2 * n * itemsize, 4 * n), "bwd": (3 * n * itemsize, 9 * n)}
