"""rle_encode: many masks of blobs, as an instance segmentation has them, beside composed torch operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench._case import Call, Case

FUNCTION = "rle_encode"
_HOST = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 200.0}}

_TARGET = {"cpu fwd": {"ratio_to_torch": 2.0}}

CASES = [
    Case("100x480x640", {"n": 100, "h": 480, "w": 640}, ("cpu",), ("fwd",), _TARGET, panel=True),
    Case("1x480x640", {"n": 1, "h": 480, "w": 640}, ("cpu",), ("fwd",)),
    Case("host-8", {"n": 1, "h": 2, "w": 4}, ("cpu", "cuda"), ("fwd",), _HOST, host=True, panel=True),
]


def torch_function(case: Case) -> Callable[..., Any]:
    """pydl's own composition of torch operations."""
    import pydl

    def encode(masks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with pydl.backend("torch"):
            return pydl.ops.rle_encode(masks)

    return encode


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Smooth random blobs; the dtype of the masks is bool whatever is asked for."""
    p = case.params
    coarse = torch.randn(p["n"], 1, 5, 5, generator=generator, device=device)
    masks = torch.nn.functional.interpolate(coarse, (p["h"], p["w"]), mode="bilinear")[:, 0] > 0.5
    return Call((masks,), {}, ())


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """Each pixel is a byte, compared with the one before it."""
    pixels = case.params["n"] * case.params["h"] * case.params["w"]
    return {"fwd": (pixels, pixels)}
