"""layer_norm: rows that fit the L2 cache, the reference row of the CPU table, large and wide rows, and host cost."""

from __future__ import annotations

from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "layer_norm"

_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_GPU = {"cuda fwd": {"roof_share": 0.85}, "cuda bwd": {"ratio_to_torch": 1.0, "roof_share": 0.75}}
_MEMORY = (
    "16.8 MB in and 16.8 MB out: both sides wait for memory and for page faults of the fresh output, so the ratio "
    "moves from run to run (forward 1.0 to 1.5, backward 0.99 to 1.3)"
)
_CALL = (
    "the operator itself takes about 4 us, one of them for the list normalized_shape on its way through the "
    "dispatcher; with a gradient autograd.Function with six arguments adds about 7"
)


def _shape(rows: int, columns: int) -> dict[str, Any]:
    return {"rows": rows, "columns": columns}


CASES = [
    Case(
        "4096x1024",
        _shape(4096, 1024),
        devices=("cpu", "cuda"),
        targets={"cpu fwd": {"ratio_to_torch": 1.2}, "cpu bwd": {"ratio_to_torch": 1.0}},
        panel=True,
        why_missed={"cpu fwd": _MEMORY, "cpu bwd": _MEMORY},
    ),
    Case("small-256x512", _shape(256, 512), devices=("cpu", "cuda")),
    Case("tokens-3152x768", _shape(16 * 197, 768)),
    Case("wide-64x65536", _shape(64, 65536), devices=("cpu", "cuda")),
    Case("wide-4x1000000", _shape(4, 1000000), devices=("cpu", "cuda")),
    Case("large-8192x2048", _shape(8192, 2048)),
    Case("16384x4096", _shape(16384, 4096), devices=("cuda",), targets=_GPU, panel=True),
    Case("16384x8192", _shape(16384, 8192), devices=("cuda",), targets=_GPU),
    Case("4096x32768", _shape(4096, 32768), devices=("cuda",), targets=_GPU),
    Case("65536x1024", _shape(65536, 1024), devices=("cuda",)),
    Case("host-8", _shape(1, 8), ("cpu", "cuda"), ("fwd",), _HOST, host=True, why_missed={"cpu fwd": _CALL}),
    Case(
        "host-8-grad",
        _shape(1, 8),
        ("cpu", "cuda"),
        ("fwd",),
        _HOST_GRAD,
        grad=True,
        host=True,
        why_missed={"cpu fwd": _CALL},
    ),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """x with mean 1, weight around 1, bias around 0."""
    rows, columns = case.params["rows"], case.params["columns"]

    def normal(*shape: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
        return (mean + scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    x = normal(rows, columns, mean=1.0)
    weight, bias = normal(columns, mean=1.0, scale=0.2), normal(columns, scale=0.2)
    return Call((x, (columns,), weight, bias, 1e-5), {}, (x, weight, bias), (1, rows, rows))


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: x in, y out; bwd: x and dy in, dx out. Parameters and statistics are one part in `columns` and left out."""
    n = case.params["rows"] * case.params["columns"]
    return {"fwd": (2 * n * itemsize, 8 * n), "bwd": (3 * n * itemsize, 14 * n)}


def providers(case: Case) -> dict[str, Any]:
    """liger: the Triton layer norm of liger-kernel, on a GPU."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        return {"liger": None}
    return {"liger": lambda x, shape, weight, bias, eps: LigerLayerNormFunction.apply(x, weight, bias, eps)}
