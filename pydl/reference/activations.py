"""Elementwise activations and their derivatives in NumPy float64, from their formulas.

GELU: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016). SiLU: Elfwing, Uchibe and Doya (2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from pydl.reference._spec import Case, Spec

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0); NaN stays NaN."""
    return np.where(x <= 0, 0.0, x)


def relu_grad(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dy where x > 0, else 0; the gradient at NaN is dy, as in torch."""
    return np.where(x <= 0, 0.0, dy)


def leaky_relu(x: np.ndarray, negative_slope: float = 0.01) -> np.ndarray:
    """x where x > 0, else negative_slope * x."""
    return np.where(x > 0, x, negative_slope * x)


def leaky_relu_grad(dy: np.ndarray, x: np.ndarray, negative_slope: float = 0.01) -> np.ndarray:
    """dy where x > 0, else negative_slope * dy (also at 0 and NaN)."""
    return np.where(x > 0, dy, negative_slope * dy)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), with the exponential always of a number that is not positive."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


def sigmoid_grad(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dy * s * (1 - s), where 1 - s = sigmoid(-x)."""
    return dy * sigmoid(x) * sigmoid(-x)


def tanh(x: np.ndarray) -> np.ndarray:
    """Hyperbolic tangent."""
    return np.tanh(x)


def tanh_grad(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dy * (1 - tanh(x)^2), where 1 - tanh(x)^2 = 4 * sigmoid(2 x) * sigmoid(-2 x)."""
    return dy * 4.0 * sigmoid(2.0 * x) * sigmoid(-2.0 * x)


@np.errstate(invalid="ignore", over="ignore")
def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * _erfc(-x / math.sqrt(2.0)) if x.size else np.zeros(x.shape)


def _tanh_cdf(x: np.ndarray) -> np.ndarray:
    """The approximation of the normal distribution function behind approximate="tanh"."""
    return 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


@np.errstate(invalid="ignore", over="ignore")
def gelu(x: np.ndarray, approximate: str = "none") -> np.ndarray:
    """x * Phi(x), with the exact normal distribution function or its tanh approximation."""
    return x * (_normal_cdf(x) if approximate == "none" else _tanh_cdf(x))


@np.errstate(invalid="ignore", over="ignore")
def gelu_grad(dy: np.ndarray, x: np.ndarray, approximate: str = "none") -> np.ndarray:
    """dy * (Phi(x) + x * Phi'(x))."""
    if approximate == "none":
        density = np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
        return dy * (_normal_cdf(x) + x * density)
    slope = math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * x**2)
    cdf = _tanh_cdf(x)
    return dy * (cdf + x * 2.0 * cdf * (1.0 - cdf) * slope)


@np.errstate(invalid="ignore", over="ignore")
def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


@np.errstate(invalid="ignore", over="ignore")
def silu_grad(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dy * s * (1 + x * (1 - s))."""
    return dy * sigmoid(x) * (1.0 + x * sigmoid(-x))


def heaviside_step(x: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """Heaviside step: 1 where x >= threshold, else 0 (also at NaN)."""
    return np.where(x >= threshold, 1.0, 0.0)


def heaviside_step_grad(dy: np.ndarray, x: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """Zero: the step has no slope wherever it has a derivative."""
    return np.zeros(x.shape)


def _cases(forms: tuple[dict[str, Any], ...], at_infinity: bool) -> Iterator[Case]:
    """Inputs for `pydl verify`; `at_infinity` where torch's result at +-inf is a limit, not an accident."""
    rng = np.random.default_rng(7)
    for kwargs in forms:
        form = "".join(f" {value}" for value in kwargs.values())
        for n in (1, 31, 1024, 4099):  # one, an odd tail, one tile, several tiles and a prime rest
            yield Case(f"{n}{form}", (rng.standard_normal(n),), kwargs)
        yield Case(f"4-D{form}", (rng.standard_normal((2, 3, 8, 5)),), kwargs, layouts=True, second=True)
        yield Case(f"mean 8{form}", (8.0 + rng.standard_normal(500),), kwargs)
        yield Case(f"wide{form}", (np.linspace(-30.0, 30.0, 1001),), kwargs)
        yield Case(
            f"large{form}", (np.array([-6e4, -300.0, -1.0, 0.5, 300.0, 6e4]),), kwargs
        )  # 6e4: near the end of fp16
        yield Case(f"denormals{form}", (np.linspace(-1e-38, 1e-38, 33),), kwargs)
        edges = [0.0, -0.0, np.nan] + ([np.inf, -np.inf] if at_infinity else [])
        yield Case(f"special values{form}", (np.array(edges),), kwargs, gradients=at_infinity)
        yield Case(f"empty{form}", (np.zeros((3, 0)),), kwargs)


def _spec(name: str, *forms: dict[str, Any], at_infinity: bool = True, in_torch: bool = True) -> Spec:
    forward = globals()[name]
    derivative = globals()[f"{name}_grad"]

    def gradient(dy: np.ndarray, x: np.ndarray, **options: Any) -> tuple[np.ndarray, ...]:
        return (derivative(dy, x, **options),)

    torch_name = f"nn.functional.{name}" if in_torch else ""
    return Spec(name, torch_name, forward, gradient, partial(_cases, forms or ({},), at_infinity))


SPECS = (
    _spec("relu"),
    _spec("leaky_relu", {"negative_slope": 0.01}, {"negative_slope": 0.2}),
    _spec("sigmoid"),
    _spec("tanh"),
    _spec("gelu", {"approximate": "none"}, {"approximate": "tanh"}, at_infinity=False),
    _spec("silu", at_infinity=False),
    _spec("heaviside_step", {"threshold": 0.0}, {"threshold": 0.5}, in_torch=False),
)
