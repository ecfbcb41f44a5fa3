"""The samples and error inputs of torch's own tests, as cases for ours."""

from __future__ import annotations

import functools
import importlib
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import torch


def internal(name: str) -> types.ModuleType:
    """A module of torch.testing._internal, without what importing it does to the rest of the process."""
    if "expecttest" not in sys.modules:  # torch's tests want it for a base class; nothing here does
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stub
    module = importlib.import_module(f"torch.testing._internal.{name}")
    # it forbids torch.backends.cudnn.benchmark = ... and the like from then on
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return module


@functools.cache
def _infos() -> dict[str, Any]:
    return {i.name: i for i in internal("common_methods_invocations").op_db if not i.variant_test_name}


def samples(name: str, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls of torch.nn.functional.<name>: a leaf, further arguments, keyword arguments."""
    for sample in _infos()[f"nn.functional.{name}"].sample_inputs("cpu", dtype, requires_grad=True):
        yield sample.input, sample.args, sample.kwargs


def errors(name: str) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls that torch refuses."""
    for error in _infos()[f"nn.functional.{name}"].error_inputs("cpu"):
        yield error.sample_input.input, error.sample_input.args, error.sample_input.kwargs
