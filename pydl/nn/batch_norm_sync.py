"""SyncBatchNorm on pydl's kernels: statistics of all processes, on the CPU as well."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydl.nn.batch_norm import statistics, with_flag
from pydl.ops._batch_norm_sync import sync_batch_norm, sync_decision
from pydl.ops.batch_norm import batch_norm

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm on pydl's kernels; same arguments, parameters and state_dict, and CPU tensors too.

    In training the statistics are those of the joined batches of a process group (gloo or nccl), which may differ in
    size; a process may have none. Without a process group, with a single process, and in evaluation it is batch_norm.
    Its gradient cannot be differentiated again. One more keyword, biased_running_var: the running variance averages the
    biased variance of the joined batches.

    Shape: input and output [N, C, *].
    """

    biased_running_var = False
    __init__ = with_flag(torch.nn.SyncBatchNorm)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel over the batches of all processes and all positions."""
        group = self._group()
        decision = None if group is None else sync_decision(input)
        if decision is not None and decision.backend == "torch":
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        mean, var, training, momentum = statistics(self)
        if decision is None:
            flag = {"biased_running_var": self.biased_running_var}
            return batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps, **flag)
        arguments = (input, mean, var, self.weight, self.bias, momentum, self.eps, self.biased_running_var)
        return sync_batch_norm(decision, *arguments, group)

    def _group(self) -> Any:
        """The process group to join in this call, if there is more than one process in it."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """As torch's: every BatchNorm1d, 2d and 3d in the module becomes a SyncBatchNorm, of this class.

        Args:
            module: a module that is or holds batch norms.
            process_group: the group that shares statistics; all processes by default.

        Returns:
            The module, or a new one if it is itself a batch norm.
        """
        flags = {name: getattr(m, "biased_running_var", False) for name, m in module.named_modules()}
        converted = super().convert_sync_batchnorm(module, process_group)
        for name, m in converted.named_modules():
            if type(m) is torch.nn.SyncBatchNorm:
                m.__class__ = cls
                m.biased_running_var = flags.get(name, False)  # type: ignore[assignment]
        return converted
