"""Run-length codes of masks of blobs, as an instance segmentation has them, and of label maps, both ways.

Beside composed torch operations, and for encoding with texts beside pycocotools where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench._case import Call, Case

FUNCTION = "rle_encode"
_HOST = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 200.0}}


def _case(name: str, n: int, function: str, ratio: float, **options: Any) -> Case:
    target = {"cpu fwd": {"ratio_to_torch": ratio}} if ratio else {}
    return Case(name, {"n": n, "h": 480, "w": 640}, ("cpu",), ("fwd",), target, function=function, **options)


CASES = [
    _case("100x480x640", 100, "rle_encode", 8.0, panel=True),
    _case("decode-100x480x640", 100, "rle_decode", 20.0),
    _case("labels-16x480x640", 16, "rle_encode_labels", 8.0),
    _case("decode-labels-16x480x640", 16, "rle_decode_labels", 8.0),
    _case("1x480x640", 1, "rle_encode", 0),
    Case("host-8", {"n": 1, "h": 2, "w": 4}, ("cpu", "cuda"), ("fwd",), _HOST, host=True, panel=True),
]


def torch_function(case: Case) -> Callable[..., Any]:
    """pydl's own composition of torch operations."""
    import pydl

    def composed(*args: Any) -> Any:
        with pydl.backend("torch"):
            return getattr(pydl.ops, case.function or FUNCTION)(*args)

    return composed


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Smooth random blobs, cut at three heights for label maps; the dtype is theirs whatever is asked for."""
    from pydl import ops

    p, name = case.params, case.function or FUNCTION
    coarse = torch.randn(p["n"], 1, 5, 5, generator=generator, device=device)
    smooth = torch.nn.functional.interpolate(coarse, (p["h"], p["w"]), mode="bilinear")[:, 0]
    planes = (2 * smooth).int().clamp(-2, 2) if "labels" in name else smooth > 0.5
    if "encode" in name:
        return Call((planes,), {}, ())
    runs = ops.rle_encode_labels(planes) if "labels" in name else ops.rle_encode(planes)
    return Call((*runs, (p["h"], p["w"])), {}, ())


def providers(case: Case) -> dict[str, Callable[..., Any] | None]:
    """pycocotools, which encodes to texts."""
    if (case.function or FUNCTION) != "rle_encode" or case.host:
        return {}
    try:
        import pycocotools.mask as coco
    except ImportError:
        return {"pycocotools": None}
    from pydl.ops import rle_from_string

    def encode(masks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = coco.encode(masks.numpy().view(np.uint8).transpose(1, 2, 0).copy(order="F"))
        counts = [rle_from_string(code["counts"]) for code in found]
        return torch.cat(counts), torch.tensor([len(own) for own in counts])

    return {"pycocotools": encode}


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """Each pixel once, compared with the one before it; the runs are few beside them."""
    p = case.params
    pixels = p["n"] * p["h"] * p["w"]
    return {"fwd": (pixels * (4 if "labels" in (case.function or "") else 1), pixels)}
