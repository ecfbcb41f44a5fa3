"""BatchNorm1d, 2d and 3d on pydl's ops."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pydl.ops.batch_norm import batch_norm, batch_norm_act

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


def with_flag(base: type[_BatchNorm]) -> Any:
    """A constructor with the arguments of torch's class and ``biased_running_var`` behind them."""

    def __init__(self: Any, *args: Any, biased_running_var: bool = False, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.biased_running_var = biased_running_var

    theirs = inspect.signature(base.__init__)
    flag = inspect.Parameter("biased_running_var", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    __init__.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), flag])  # type: ignore[attr-defined]
    return __init__


def statistics(module: _BatchNorm) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """(running_mean, running_var, training, momentum) of this call, by torch's rules; counts the batch."""
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # the plain average of all batches
            momentum = 1.0 / float(module.num_batches_tracked)
    mean, var = module.running_mean, module.running_var
    training = module.training or (mean is None and var is None)
    if module.training and not module.track_running_stats:
        mean = var = None
    return mean, var, training, momentum


def normalise(module: Any, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
    """What the module computes, and an addition and an activation behind it."""
    if isinstance(input, torch.fx.Proxy) and residual is None and activation is None:
        # traced, the module stays a module, as torch's do: whether it trains is asked when the graph runs
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), (input,), {})
    module._check_input_dim(input)
    mean, var, training, momentum = statistics(module)
    arguments = (input, mean, var, module.weight, module.bias, training, momentum, module.eps)
    if residual is None and activation is None:
        return batch_norm(*arguments, biased_running_var=module.biased_running_var)
    tail: dict[str, Any] = {"residual": residual, "activation": activation}
    return batch_norm_act(*arguments, **tail, biased_running_var=module.biased_running_var)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d whose forward is :func:`pydl.ops.batch_norm`; same arguments, parameters and state_dict.

    Shape: input and output [N, C] or [N, C, L]. One more keyword, biased_running_var: the running variance averages the
    biased variance of the batches.
    """

    biased_running_var = False
    __init__ = with_flag(torch.nn.BatchNorm1d)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel over the batch and all positions."""
        return normalise(self, input)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d whose forward is :func:`pydl.ops.batch_norm`; same arguments, parameters and state_dict.

    Shape: input and output [N, C, H, W]. One more keyword, biased_running_var: the running variance averages the biased
    variance of the batches.
    """

    biased_running_var = False
    __init__ = with_flag(torch.nn.BatchNorm2d)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel over the batch and all positions."""
        return normalise(self, input)


class BatchNorm3d(torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d whose forward is :func:`pydl.ops.batch_norm`; same arguments, parameters and state_dict.

    Shape: input and output [N, C, D, H, W]. One more keyword, biased_running_var: the running variance averages the
    biased variance of the batches.
    """

    biased_running_var = False
    __init__ = with_flag(torch.nn.BatchNorm3d)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel over the batch and all positions."""
        return normalise(self, input)
