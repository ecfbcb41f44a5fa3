"""Is a provider right: the rule that lets it be timed.

err = max |out - oracle| / rms(oracle) over positions where both are finite; other positions must match exactly. A
result passes when err <= 2 x the error of torch's own op in the same dtype (3 x for gradients) + 4 ulp of the dtype at
the oracle's scale (times the root of the reduction length for gradients of parameters). This is the rule of
pydl._grading, on torch tensors where they are: large cases stay on the GPU, and a tree without pydl can be measured.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench._case import Call

# the NumPy oracles are clear, not fast: above this many elements torch in float64 stands in for them
ORACLE_LIMIT = 1 << 18


@dataclass(frozen=True)
class Verdict:
    ok: bool
    max_err: float | None
    note: str = ""


def error(out: torch.Tensor, oracle: torch.Tensor) -> float:
    """max |out - oracle| / rms(oracle); inf where non-finite positions differ or a zero oracle is missed."""
    if out.shape != oracle.shape:
        return math.inf
    if not oracle.is_floating_point():
        return 0.0 if torch.equal(out.detach().to(oracle.dtype), oracle) else math.inf
    wide, oracle = out.detach().double(), oracle.detach().double()
    finite = torch.isfinite(oracle)
    if not bool(torch.equal(finite, torch.isfinite(wide))):
        return math.inf
    odd, odd_oracle = wide[~finite], oracle[~finite]
    if not bool(torch.all((odd == odd_oracle) | (odd.isnan() & odd_oracle.isnan()))):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    difference = (wide - oracle)[finite].abs().max().item()
    scale = oracle[finite].square().mean().sqrt().item()
    if scale == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / scale


def bound(torch_error: float, oracle: torch.Tensor, dtype: torch.dtype, gradient: bool, reduced: int = 1) -> float:
    """The largest error that passes."""
    if not oracle.is_floating_point():
        return 0.0
    values = oracle.detach().double()
    values = values[torch.isfinite(values)]
    floor = 4 * torch.finfo(dtype).eps * math.sqrt(max(reduced, 1)) if bool(values.any()) else 0.0
    known = torch_error if math.isfinite(torch_error) else 0.0
    return (3 if gradient else 2) * known + floor


def evaluate(fn: Callable[..., Any], call: Call, gradients: bool, seed: int = 1) -> list[torch.Tensor]:
    """[*outputs] or [*outputs, *gradients] of one call, the gradients being those of the first output.

    The upstream gradient depends on the seed and shape only.
    """
    if not gradients:
        with torch.no_grad():
            return list(_outputs(fn(*call.args, **call.kwargs)))
    out = _outputs(fn(*call.args, **call.kwargs))
    grads = torch.autograd.grad(out[0], call.wrt, upstream(out[0], seed), allow_unused=True)
    missing = [torch.full_like(w, math.nan) if g is None else g for g, w in zip(grads, call.wrt, strict=True)]
    return [*(y.detach() for y in out), *missing]


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def upstream(y: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """A gradient for y, drawn in float32 and rounded so that it is the same for every dtype and provider."""
    generator = torch.Generator(device=y.device).manual_seed(seed)
    drawn = torch.randn(y.shape, generator=generator, device=y.device).to(torch.bfloat16)
    return torch.empty_like(y, requires_grad=False).copy_(drawn)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are filled with NaN, so that an element nobody wrote is seen."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an op that is not deterministic may still be measured
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def numpy_oracle(function: str, call: Call, gradients: bool) -> list[torch.Tensor] | None:
    """[*outputs] or [*outputs, *gradients] by pydl.reference; None where it has no such op or the case is too large."""
    if any(isinstance(t, torch.Tensor) and t.numel() > ORACLE_LIMIT for t in call.args):
        return None
    try:
        from pydl.reference import specs

        spec = specs(function)[function]
    except (ImportError, ValueError, KeyError):
        return None

    def plain(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()

    args, kwargs = [plain(a) for a in call.args], {k: plain(v) for k, v in call.kwargs.items()}
    device = call.args[0].device

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, order="C")).to(device)

    out = [tensor(y) for y in _outputs(spec.forward(*args, **kwargs))]
    if not gradients or spec.gradient is None:
        return out
    like = torch.empty(out[0].shape, dtype=call.args[0].dtype, device=device)
    return out + [tensor(g) for g in spec.gradient(upstream(like).double().cpu().numpy(), *args, **kwargs)]


class Gate:
    """Oracle and torch's error of one case, computed once and held against every provider."""

    def __init__(self, function: str, torch_fn: Callable[..., Any], call: Call, gradients: bool) -> None:
        self.call, self.gradients = call, gradients

        def widen(t: torch.Tensor) -> torch.Tensor:
            return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

        known = numpy_oracle(function, call, gradients)
        self.source = "torch float64" if known is None else "numpy float64"
        self.oracle = evaluate(torch_fn, call.map(widen), gradients) if known is None else known
        theirs = evaluate(torch_fn, call, gradients)
        self.dtypes = [t.dtype for t in theirs]
        self.theirs = [error(o, r) for o, r in zip(theirs, self.oracle, strict=True)]
        self._values = len(theirs) - (len(call.wrt) if gradients else 0)

    def bounds(self, outputs: Sequence[torch.Tensor]) -> list[float]:
        ones = (1,) * len(outputs)
        reduced = ((1,) * self._values + tuple(self.call.reduced) + ones)[: len(outputs)]
        return [
            bound(t, o, out.dtype, i >= self._values, reduced[i])
            for i, (t, o, out) in enumerate(zip(self.theirs, self.oracle, outputs, strict=True))
        ]

    def check(self, fn: Callable[..., Any], poison: bool = True) -> Verdict:
        """Runs fn once; never raises."""
        try:
            with poisoned() if poison else contextlib.nullcontext():
                outputs = evaluate(fn, self.call, self.gradients)
            for i, (out, dtype) in enumerate(zip(outputs, self.dtypes, strict=True)):
                if out.dtype != dtype:
                    return Verdict(False, None, f"{self._name(i)} is {out.dtype}, expected {dtype}")
                shape = tuple(self.oracle[i].shape)
                if out.shape != shape:
                    return Verdict(False, None, f"{self._name(i)} has shape {tuple(out.shape)}, expected {shape}")
            errors = [error(out, o) for out, o in zip(outputs, self.oracle, strict=True)]
            bounds = self.bounds(outputs)
        except Exception as failure:  # a provider may fail in any way: it is reported, the others are still measured
            return Verdict(False, None, f"{type(failure).__name__}: {str(failure)[:160]}")
        wrong = [i for i, (e, b) in enumerate(zip(errors, bounds, strict=True)) if not e <= b]
        worst = max(errors)
        note = "; ".join(f"{self._name(i)} error {errors[i]:.2e} > {bounds[i]:.2e}" for i in wrong)
        return Verdict(not wrong, worst if math.isfinite(worst) else None, note)

    def _name(self, i: int) -> str:
        if i >= self._values:
            return f"gradient {i - self._values}"
        return "output" if self._values == 1 else f"output {i}"
