"""The ops of pydl that :mod:`torch.nn.functional` also has, under torch's names and signatures."""

from __future__ import annotations

import torch

from pydl import ops

__all__ = [name for name in ops.__all__ if hasattr(torch.nn.functional, name)]
globals().update({name: getattr(ops, name) for name in __all__})
