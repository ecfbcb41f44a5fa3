"""scaled_dot_product_attention with masks as tensors, and attention with masks by kind, beside torch's own.

A full tile costs two products of 128 x 64 x D; what a mask hides is not counted as work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench._case import Call, Case

FUNCTION = "scaled_dot_product_attention"


def _shape(b: int, h: int, s: int, d: int, mask: str, **kinds: Any) -> dict[str, Any]:
    return {"b": b, "h": h, "s": s, "d": d, "mask": mask, **kinds}


_BOTH = ("cpu", "cuda")
_MODES = ("fwd", "full")
_TINY = _shape(1, 1, 2, 2, "causal tensor")
_HOST = {"cpu fwd": {"host_us": 8.0}, "cuda fwd": {"host_us": 20.0}}
_HOST_GRAD = {"cpu fwd": {"host_us": 16.0}, "cuda fwd": {"host_us": 30.0}}
_FASTER, _TWICE = {"cuda fwd": {"ratio_to_torch": 1.0}}, {"cuda full": {"ratio_to_torch": 2.0}}
_CALL = "torch is called, which takes most of the time; the arguments are checked first"

CASES = [
    Case(
        "window-256-S2048",
        _shape(1, 8, 2048, 64, "window"),
        _BOTH,
        _MODES,
        {"cpu fwd": {"ratio_to_torch": 2.2}},
        panel=True,
    ),
    Case("segments-512-S2048", _shape(1, 8, 2048, 64, "segments"), _BOTH, _MODES, {"cpu fwd": {"ratio_to_torch": 3.3}}),
    Case("half-at-random-S1024", _shape(1, 8, 1024, 64, "random"), _BOTH, _MODES),
    Case("bias-S1024", _shape(1, 8, 1024, 64, "bias"), _BOTH, _MODES),
    Case("padding-S512", _shape(4, 8, 512, 64, "padding"), _BOTH, _MODES),
    Case("causal-S1024", _shape(1, 8, 1024, 64, "causal"), _BOTH, _MODES),
    Case("small-S64", _shape(2, 4, 64, 32, "causal tensor"), _BOTH, _MODES),
    Case("one-query-S1024", _shape(4, 8, 1024, 64, "one query"), _BOTH, _MODES),
    Case("ids-S2048", _shape(1, 8, 2048, 64, "ids"), _BOTH, _MODES, function="attention"),
    Case(
        "mask-8k-window-1k",
        _shape(2, 16, 8192, 128, "window"),
        ("cuda",),
        _MODES,
        {"cuda fwd": {"ratio_to_torch": 3.0}},
        panel=True,
    ),
    Case(
        "mask-8k-half",
        _shape(2, 16, 8192, 128, "causal tensor"),
        ("cuda",),
        _MODES,
        {"cuda fwd": {"ratio_to_torch": 1.0}},
    ),
    Case(
        "bias-gradient-4k",
        _shape(2, 16, 4096, 128, "bias"),
        ("cuda",),
        ("full",),
        {"cuda full": {"ratio_to_torch": 2.0}},
    ),
    Case("host-8", _TINY, _BOTH, ("fwd",), _HOST, host=True, why_missed={"cpu fwd": _CALL}),
    Case("host-8-grad", _TINY, _BOTH, ("fwd",), _HOST_GRAD, grad=True, host=True, why_missed={"cpu fwd": _CALL}),
]


def _window(case: Case) -> int:
    return case.params["s"] // 8


def _dense(case: Case, device: str) -> torch.Tensor:
    """The mask of a case as bool [S, S]."""
    s, kind = case.params["s"], case.params["mask"]
    i = torch.arange(s, device=device)
    ahead = i[:, None] - i[None, :]
    if kind == "window":
        return (ahead >= 0) & (ahead < _window(case))
    if kind in ("segments", "ids"):
        return i[:, None] // (s // 4) == i[None, :] // (s // 4)
    return ahead >= 0


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
    """Normal q, k, v and the mask of the case."""
    p = case.params
    shape = (p["b"], p["h"], p["s"], p["d"])
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    if p["mask"] == "one query":
        q = q[:, :, :1]
    if p["mask"] == "bias":
        bias = torch.randn(p["h"], p["s"], p["s"], generator=generator, device=device).to(dtype)
        return Call((q, k, v, bias), {}, (q, k, v, bias), (p["s"], p["s"], p["s"], p["b"]))
    wrt, reduced = (q, k, v), (p["s"],) * 3
    if p["mask"] == "causal":
        return Call((q, k, v), {"is_causal": True}, wrt, reduced)
    if p["mask"] == "ids":
        ids = (torch.arange(p["s"], device=device) // (p["s"] // 4)).unsqueeze(0)
        return Call((q, k, v), {"segment_ids": ids}, wrt, reduced)
    if p["mask"] == "random":
        mask = torch.rand(p["s"], p["s"], generator=generator, device=device) < 0.5
    elif p["mask"] in ("padding", "one query"):
        lengths = torch.linspace(p["s"] // 4, p["s"], p["b"], device=device)
        mask = (torch.arange(p["s"], device=device) < lengths[:, None])[:, None, None, :]
    else:
        mask = _dense(case, device)
    return Call((q, k, v, mask), {}, wrt, reduced)


def torch_function(case: Case) -> Callable[..., Any]:
    """torch's own attention; of masks by kind it is given the tensor, made in the call."""
    if case.function is None:
        return F.scaled_dot_product_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attention


def providers(case: Case) -> dict[str, Callable[..., Any] | None]:
    """FlexAttention, compiled, on masks that are tensors; its block mask is made once for each mask."""
    if case.function is not None or case.params["mask"] in ("bias", "causal", "one query", "padding"):
        return {}
    if not torch.cuda.is_available():
        return {"flex": None}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    @functools.lru_cache(maxsize=1)
    def blocks(mask: torch.Tensor) -> Any:
        size = mask.shape[0]
        return create_block_mask(lambda b, h, i, j: mask[i, j], None, None, size, size, device=str(mask.device))

    return {"flex": lambda q, k, v, mask: compiled(q, k, v, block_mask=blocks(mask))}


def work(case: Case, itemsize: int) -> dict[str, tuple[int, int]]:
    """fwd: q, k, v and the mask in, out; two products of the scores that are allowed; bwd: twice as much and a half."""
    p = case.params
    rows, d = p["b"] * p["h"] * p["s"], p["d"]
    shares = {"window": 0.125, "segments": 0.25, "ids": 0.25, "random": 0.5, "bias": 1.0, "padding": 0.625}
    queries = 1 if p["mask"] == "one query" else p["s"]
    flops = int(4 * p["b"] * p["h"] * queries * p["s"] * d * shares.get(p["mask"], 0.5))
    mask = p["h"] * p["s"] ** 2 * itemsize if p["mask"] == "bias" else queries * p["s"]
    read = 4 * rows * d * itemsize + (0 if p["mask"] in ("causal", "ids") else mask)
    return {"fwd": (read, flops), "bwd": (2 * read, flops * 5 // 2)}
