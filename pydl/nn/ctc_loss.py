"""The CTC loss module on pydl's op."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops.ctc_loss import ctc_loss

__all__ = ["CTCLoss"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
torch.fx.wrap("ctc_loss")


class CTCLoss(torch.nn.CTCLoss):
    """torch.nn.CTCLoss whose forward is :func:`pydl.ops.ctc_loss`; same arguments.

    Shape: log_probs [T, N, C] or [T, C]; targets [N, S] or [sum of target_lengths]; lengths [N]; output [], or [N] for
    reduction="none".
    """

    def forward(self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor) -> Tensor:
        """The loss of a batch."""
        return ctc_loss(
            log_probs, targets, input_lengths, target_lengths, self.blank, self.reduction, self.zero_infinity
        )
