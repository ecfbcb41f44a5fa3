"""GroupNorm and InstanceNorm1d, 2d and 3d on pydl's ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydl.ops.group_norm import group_norm, instance_norm

__all__ = ["GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
torch.fx.wrap("group_norm")


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm whose forward is :func:`pydl.ops.group_norm`; same arguments, parameters and state_dict.

    Shape: input and output [N, C, *].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise groups of channels of each sample."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _leaf(module: Any, input: Any) -> Any:
    """Traced, the module stays a module, as torch's do: whether it trains is asked when the graph runs."""
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), (input,), {})


def _apply(module: Any, input: Tensor) -> Tensor:
    return instance_norm(
        input,
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        module.training or not module.track_running_stats,
        module.momentum if module.momentum is not None else 0.0,
        module.eps,
    )


class InstanceNorm1d(torch.nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d whose forward calls :func:`pydl.ops.instance_norm`; same arguments and state_dict.

    Shape: input and output [N, C, L] or [C, L].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel of each sample over its positions."""
        return _leaf(self, input) if isinstance(input, torch.fx.Proxy) else super().forward(input)

    _apply_instance_norm = _apply


class InstanceNorm2d(torch.nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d whose forward calls :func:`pydl.ops.instance_norm`; same arguments and state_dict.

    Shape: input and output [N, C, H, W] or [C, H, W].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel of each sample over its positions."""
        return _leaf(self, input) if isinstance(input, torch.fx.Proxy) else super().forward(input)

    _apply_instance_norm = _apply


class InstanceNorm3d(torch.nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d whose forward calls :func:`pydl.ops.instance_norm`; same arguments and state_dict.

    Shape: input and output [N, C, D, H, W] or [C, D, H, W].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel of each sample over its positions."""
        return _leaf(self, input) if isinstance(input, torch.fx.Proxy) else super().forward(input)

    _apply_instance_norm = _apply
