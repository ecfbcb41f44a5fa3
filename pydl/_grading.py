"""How far a result may be from the oracle: one rule, used by `pydl verify`, the tests and the benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

VALUE_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR_ULPS = 4.0
BIAS_ULPS, BIAS_VALUES = 0.25, 256  # a mean of 256 roundings to nearest stays below 0.1, cutting digits off gives 0.5


@dataclass(frozen=True)
class Grade:
    """Outcome of one comparison: errors relative to rms(oracle); `why` names the rule that was broken, if one was."""

    ok: bool
    err: float
    bound: float
    torch_err: float
    why: str = ""

    def __str__(self) -> str:
        text = f"err {self.err:.2e} <= {self.bound:.2e} (torch {self.torch_err:.2e})"
        return text if self.ok else f"{self.why or 'too far from the oracle'}: {text.replace('<=', 'against')}"


def to_numpy(values: Any) -> np.ndarray:
    """A tensor or array as NumPy: floating values as float64, integers and booleans as they are."""
    if isinstance(values, torch.Tensor):
        values = values.detach()
        if values.is_floating_point():
            values = values.double()
        values = values.cpu().numpy()
    array = np.asarray(values)
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array


def _after_overflow(oracle: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The oracle with what `dtype` rounds to infinity as infinity."""
    if dtype == torch.float64 or oracle.size == 0:
        return oracle
    rounded = torch.from_numpy(np.ascontiguousarray(oracle)).to(dtype).double().numpy().reshape(oracle.shape)
    return np.where(np.isinf(rounded), rounded, oracle)


def _non_finite_differ(a: np.ndarray, b: np.ndarray) -> int:
    """Number of positions where exactly one is NaN, or an infinity of one sign stands against anything else."""
    infinite = (np.isinf(a) | np.isinf(b)) & (a != b)
    return int(np.count_nonzero((np.isnan(a) != np.isnan(b)) | (infinite & ~(np.isnan(a) & np.isnan(b)))))


def _scale(out: np.ndarray, oracle: np.ndarray) -> float:
    """rms(oracle) over positions where both are finite; 0 where there are none."""
    both = np.isfinite(out) & np.isfinite(oracle)
    return math.sqrt(np.mean(oracle[both] ** 2)) if both.any() else 0.0


def _error(out: np.ndarray, oracle: np.ndarray, scale: float) -> float:
    """max |out - oracle| / scale over positions where both are finite, absolute if the scale is 0."""
    both = np.isfinite(out) & np.isfinite(oracle)
    return float(np.abs(out[both] - oracle[both]).max() / (scale or 1.0)) if both.any() else 0.0


def rounding_bias(out: np.ndarray, oracle: np.ndarray, dtype: torch.dtype) -> float:
    """Mean of |out| - |oracle| in units of the last place, each at most 1: near 0 for rounding, -0.5 for truncation.

    Only for dtypes narrower than float32, whose arithmetic error is the final rounding; 0 for fewer than 256 values.
    """
    info = torch.finfo(dtype)
    if info.bits >= 32:
        return 0.0
    usable = np.isfinite(out) & np.isfinite(oracle) & (np.abs(oracle) >= info.tiny)
    if np.count_nonzero(usable) < BIAS_VALUES:
        return 0.0
    size = np.abs(oracle[usable])
    unit = info.eps * 2.0 ** np.floor(np.log2(size))
    return float(np.mean(np.clip((np.abs(out[usable]) - size) / unit, -1.0, 1.0)))


def grade(
    out: Any,
    oracle: Any,
    torch_out: Any = None,
    *,
    dtype: torch.dtype | None = None,
    gradient: bool = False,
    reduction: int = 1,
    oracle_err: float = 0.0,
) -> Grade:
    """Compares a result with the oracle, allowing for what torch itself gets wrong in the same dtype.

    err = max |out - oracle| / rms(oracle) over positions where both are finite must not exceed 2 times torch's own
    error (3 times for gradients) plus a floor of 4 units in the last place. Non-finite positions must match, shapes
    must match. Where rms(oracle) is 0 errors are absolute and there is no floor: the result must be exact if
    torch's is. Integer results must be equal. Half-precision results must not lean to one side, as they do where digits
    were cut off instead of rounded: an error of that kind is within the bound, but adds up over layers.

    Args:
        out: the result to grade, tensor or array.
        oracle: exact values in float64, or integers.
        torch_out: torch's result on the same input in the same dtype; None where torch has no such op.
        dtype: dtype of the result; taken from `out` if that is a tensor.
        gradient: whether the looser factor for gradients applies.
        reduction: number of terms in the sum behind each value; the floor grows with its square root.
        oracle_err: relative error of the oracle itself, for oracles made by finite differences.

    Returns:
        Grade.
    """
    dtype = dtype or (out.dtype if isinstance(out, torch.Tensor) else torch.float64)
    got, exact = to_numpy(out), to_numpy(oracle)
    if got.shape != exact.shape:
        return Grade(False, math.inf, 0.0, 0.0, f"shape is {got.shape}, not {exact.shape}")
    if not np.issubdtype(exact.dtype, np.floating):
        wrong = int(np.count_nonzero(got != exact))
        return Grade(wrong == 0, float(wrong), 0.0, 0.0, f"{wrong} of {exact.size} integers differ" if wrong else "")
    exact = _after_overflow(exact, dtype)
    scale = _scale(got, exact)
    torch_err = 0.0 if torch_out is None else _error(to_numpy(torch_out), exact, scale)
    factor = GRADIENT_FACTOR if gradient else VALUE_FACTOR
    floor = FLOOR_ULPS * torch.finfo(dtype).eps * math.sqrt(max(reduction, 1)) + oracle_err
    bound = factor * torch_err + (floor if scale else 0.0)
    err = _error(got, exact, scale)
    wrong = _non_finite_differ(got, exact)
    if wrong:
        return Grade(
            False, err, bound, torch_err, f"{wrong} of {exact.size} values are wrongly NaN or inf, or wrongly not"
        )
    if err > bound:
        return Grade(False, err, bound, torch_err, "too far from the oracle")
    bias = rounding_bias(got, exact, dtype)
    torch_bias = 0.0 if torch_out is None else rounding_bias(to_numpy(torch_out), exact, dtype)
    if abs(bias) > BIAS_ULPS + 2.0 * abs(torch_bias):
        return Grade(False, err, bound, torch_err, f"rounded to one side, by {bias:+.2f} ulp on average")
    return Grade(True, err, bound, torch_err)
