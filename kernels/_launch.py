"""What every launcher shares: facts about the device for tile choice, and the guard for the current device."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

_NO_GUARD = contextlib.nullcontext()


class Device(NamedTuple):
    """The facts about a device that tile choice depends on.

    ``arch`` is 10 * major + minor of the compute capability, 0 for an AMD part; ``sm_count`` counts multiprocessors.
    """

    arch: int
    sm_count: int


# the interpreter runs programs one after another: a handful is enough to exercise partial results
INTERPRETED = Device(arch=90, sm_count=4)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = 0 if torch.version.hip else 10 * properties.major + properties.minor
    return Device(arch, properties.multi_processor_count)


def device_facts(x: Tensor) -> Device:
    """Facts about the device that holds ``x``, looked up once per device."""
    return _cuda_device(x.get_device()) if x.is_cuda else INTERPRETED


def device_guard(x: Tensor) -> AbstractContextManager:
    """Make ``x``'s device current for a launch: Triton launches on the current device, whatever its arguments say."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.get_device())


def cdiv(a: int, b: int) -> int:
    """a / b rounded up (triton.cdiv costs microseconds on the host)."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def require_dtype(op: str, x: Tensor) -> None:
    """Raise NotImplementedError for a dtype that these kernels would compute with fewer bits than it holds."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise NotImplementedError(f"{op}: Triton kernels take float32, float16 or bfloat16, got {x.dtype}")
