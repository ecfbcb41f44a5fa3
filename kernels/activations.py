"""Elementwise activations and their derivatives: one read and one write per element forward, two reads backward.

GELU: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016). SiLU: Elfwing, Uchibe and Doya (2017). Arithmetic is
fp32 for every dtype, rounded once at the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import Case
from ._launch import Device, cdiv, device_facts, device_guard, require_dtype
from ._math import sigmoid, sigmoid_and_slope, tanh

KINDS = ("relu", "leaky_relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "step")


@triton.jit
def _activation(x, alpha, KIND: tl.constexpr):
    # comparisons are written so that NaN falls through to itself
    if KIND == "relu":
        y = tl.where(x <= 0.0, 0.0, x)
    elif KIND == "leaky_relu":
        y = tl.where(x > 0.0, x, x * alpha)
    elif KIND == "sigmoid":
        y = sigmoid(x)
    elif KIND == "tanh":
        y = tanh(x)
    elif KIND == "gelu":
        y = x * (0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u), which does not cancel for negative u
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "silu":
        y = x * sigmoid(x)
    else:
        tl.static_assert(KIND == "step", "unknown activation")
        y = tl.where(x >= alpha, 1.0, 0.0)
    return y


@triton.jit
def _activation_grad(dy, s, alpha, KIND: tl.constexpr):
    if KIND == "relu":
        dx = tl.where(s <= 0.0, 0.0, dy)
    elif KIND == "leaky_relu":
        dx = tl.where(s > 0.0, dy, dy * alpha)
    elif KIND == "sigmoid":
        dx = dy * (1.0 - s) * s
    elif KIND == "tanh":
        dx = dy * (1.0 - s * s)
    elif KIND == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(s * 0.7071067811865476)
        dx = dy * (cdf + s * (0.3989422804014327 * tl.exp(-0.5 * s * s)))
    elif KIND == "gelu_tanh":
        # past |x| = 16 the slope is 0 in fp32; bounding x keeps its square finite
        t = tl.minimum(tl.maximum(s, -16.0), 16.0)
        p, slope = sigmoid_and_slope(1.5957691216057308 * (t + 0.044715 * t * t * t))
        dx = dy * (p + s * (slope * (1.5957691216057308 * (1.0 + 0.134145 * t * t))))
    elif KIND == "silu":
        p, slope = sigmoid_and_slope(s)
        dx = dy * (p + s * slope)
    else:
        tl.static_assert(KIND == "step", "unknown activation")
        dx = tl.zeros_like(dy)
    return dx


@triton.jit
def _activation_fwd_kernel(x_ptr, y_ptr, n, alpha, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    # a full block needs no mask, which keeps its loads wide whatever n's divisibility
    if start + BLOCK <= n:
        x = tl.load(x_ptr + offs)
        tl.store(y_ptr + offs, _activation(x.to(tl.float32), alpha, KIND).to(x.dtype))
    else:
        mask = offs < n
        x = tl.load(x_ptr + offs, mask=mask, other=0.0)
        tl.store(y_ptr + offs, _activation(x.to(tl.float32), alpha, KIND).to(x.dtype), mask=mask)


@triton.jit
def _activation_bwd_kernel(dy_ptr, saved_ptr, dx_ptr, n, alpha, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        dy = tl.load(dy_ptr + offs)
        s = tl.load(saved_ptr + offs).to(tl.float32)
        tl.store(dx_ptr + offs, _activation_grad(dy.to(tl.float32), s, alpha, KIND).to(dy.dtype))
    else:
        mask = offs < n
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0)
        s = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, _activation_grad(dy.to(tl.float32), s, alpha, KIND).to(dy.dtype), mask=mask)


class Config(NamedTuple):
    """Elements per program and warps per program."""

    block: int
    num_warps: int


def config(n: int, itemsize: int, device: Device) -> Config:
    """Tile choice: two 16-byte loads a thread, or one where that leaves multiprocessors idle."""
    num_warps = 4
    vector = num_warps * 32 * (16 // itemsize)
    return Config(2 * vector if n >= 8 * vector * device.sm_count else vector, num_warps)


def _dense_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (a contiguous copy if it has gaps or overlaps) and an uninitialised tensor of the same strides."""
    y = torch.empty_like(x)
    if x.is_contiguous() or y.stride() == x.stride():
        return x, y
    x = x.contiguous()
    return x, torch.empty_like(x)


def activation_fwd(x: Tensor, kind: str, alpha: float) -> Tensor:
    """Apply one activation elementwise.

    Args:
        x: any shape, float32, float16 or bfloat16; a non-overlapping and dense layout is kept, else it is copied.
        kind: one of KINDS.
        alpha: leaky_relu's negative slope, step's threshold; unused by the others.

    Returns:
        The result, of ``x``'s shape, dtype and (if dense) strides.
    """
    if kind not in KINDS:
        raise ValueError(f"activation_fwd: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    require_dtype("activation_fwd", x)
    x, y = _dense_like(x)
    n = x.numel()
    if n == 0:
        return y
    block, num_warps = config(n, x.element_size(), device_facts(x))
    with device_guard(x):
        _activation_fwd_kernel[(cdiv(n, block),)](
            x, y, n, alpha, KIND=kind, BLOCK=block, num_warps=num_warps, num_stages=1, enable_fp_fusion=True
        )
    return y


def activation_bwd(dy: Tensor, saved: Tensor, kind: str, alpha: float) -> Tensor:
    """Gradient of :func:`activation_fwd` with respect to its input.

    Args:
        dy: gradient of the output; ``saved``'s shape and dtype, any strides.
        saved: the output for relu, sigmoid and tanh, the input for the others.
        kind, alpha: as in the forward.

    Returns:
        The gradient, of ``saved``'s shape, dtype and (if dense) strides.
    """
    if kind not in KINDS:
        raise ValueError(f"activation_bwd: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if dy.shape != saved.shape or dy.dtype != saved.dtype:
        raise ValueError(
            f"activation_bwd: dy must have saved's shape and dtype, got {tuple(dy.shape)} {dy.dtype} "
            f"for {tuple(saved.shape)} {saved.dtype}"
        )
    require_dtype("activation_bwd", saved)
    saved, dx = _dense_like(saved)
    n = saved.numel()
    if n == 0:
        return dx
    if dy.stride() != saved.stride():
        dy = torch.empty_like(saved).copy_(dy)
    block, num_warps = config(n, saved.element_size(), device_facts(saved))
    with device_guard(saved):
        _activation_bwd_kernel[(cdiv(n, block),)](
            dy, saved, dx, n, alpha, KIND=kind, BLOCK=block, num_warps=num_warps, num_stages=1, enable_fp_fusion=True
        )
    return dx


def aot_cases(arch: int) -> Iterator[Case]:
    """Every kind and dtype in the large tile; the small tile, 64-bit sizes and a single element for one kind each."""
    device = Device(arch, 132)
    for dtype, itemsize in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        for kind in KINDS:
            sizes = [(2**28, "")] + [(2**12, " small")] * (kind == "gelu") + [(2**32, " 64-bit")] * (kind == "tanh")
            sizes += [(1, " n = 1")] * (kind == "relu")
            for n, suffix in sizes:
                types = {name: f"*{dtype}" for name in ("x_ptr", "y_ptr", "dy_ptr", "saved_ptr", "dx_ptr")}
                types |= {"n": "i64" if n >= 2**31 else "i32", "alpha": "fp32"}
                block, num_warps = config(n, itemsize, device)
                tile = {"KIND": kind, "BLOCK": block} | ({"n": 1} if n == 1 else {})
                quick = dtype == "bf16" and kind == "gelu" and not suffix
                for kernel in (_activation_fwd_kernel, _activation_bwd_kernel):
                    yield Case(kernel, f"{kind} {dtype}{suffix}", types, tile, num_warps, quick)
