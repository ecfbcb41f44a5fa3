"""Activation modules on pydl's ops; in-place ones are torch's own kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops.activations import gelu, heaviside_step, leaky_relu, relu, sigmoid, silu, tanh

__all__ = ["GELU", "HeavisideStep", "LeakyReLU", "ReLU", "SiLU", "Sigmoid", "Tanh"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
for _name in ("gelu", "heaviside_step", "leaky_relu", "relu", "sigmoid", "silu", "tanh"):
    torch.fx.wrap(_name)


class ReLU(torch.nn.ReLU):
    """torch.nn.ReLU on :func:`pydl.ops.relu`; any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """max(x, 0)."""
        return relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """torch.nn.LeakyReLU on :func:`pydl.ops.leaky_relu`; any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """x where x > 0, else negative_slope * x."""
        return leaky_relu(input, self.negative_slope, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """torch.nn.Sigmoid on :func:`pydl.ops.sigmoid`; any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """1 / (1 + exp(-x))."""
        return sigmoid(input)


class Tanh(torch.nn.Tanh):
    """torch.nn.Tanh on :func:`pydl.ops.tanh`; any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Hyperbolic tangent."""
        return tanh(input)


class GELU(torch.nn.GELU):
    """torch.nn.GELU on :func:`pydl.ops.gelu`; any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """x Phi(x), exact or by tanh."""
        return gelu(input, self.approximate)


class SiLU(torch.nn.SiLU):
    """torch.nn.SiLU on :func:`pydl.ops.silu`; any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """x * sigmoid(x)."""
        return silu(input, self.inplace)


class HeavisideStep(torch.nn.Module):
    """1 where x >= threshold, else 0, with zero gradient: :func:`pydl.ops.heaviside_step`; any shape.

    Args:
        threshold: where the step is.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, input: Tensor) -> Tensor:
        """Ones at and above the threshold."""
        return heaviside_step(input, self.threshold)

    def extra_repr(self) -> str:
        """The threshold."""
        return f"threshold={self.threshold}"
