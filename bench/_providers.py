"""Names on the command line to callables with an op's public signature.

torch              torch.nn.functional, or what the bench file's torch_function(case) gives where torch has no such op
compile            torch.compile of it, for these shapes
pydl               pydl.ops, the backend pydl chooses itself
pydl@BACKEND       pydl.ops under `with pydl.backend(BACKEND)`
module:function    anyone's: a callable with the op's public signature
others             what the bench file's providers(case) offers, such as a specialist library
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from bench._case import Case, load


@dataclass(frozen=True)
class Provider:
    """A callable to be measured; `scope` is entered around every measurement of it."""

    name: str
    fn: Callable[..., Any]
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def is_pydl(self) -> bool:
        return self.name.split("@")[0] == "pydl"


class Unavailable(Exception):
    """A provider that is not on this machine, with the reason."""


def default_providers(device: str, has_target: bool) -> list[str]:
    """What is measured when nothing is named: compiling takes seconds, so it is left to a GPU's rows with a target."""
    return ["pydl", "torch", "compile"] if device == "cuda" and has_target else ["pydl", "torch"]


def function_name(op: str, case: Case) -> str:
    """Name in pydl.ops, and in torch.nn.functional unless the bench file has a torch_function."""
    return case.function or load(op).FUNCTION


def torch_function(op: str, case: Case) -> Callable[..., Any]:
    own = getattr(load(op), "torch_function", None)
    return getattr(torch.nn.functional, function_name(op, case)) if own is None else own(case)


def resolve(name: str, op: str, case: Case) -> Provider:
    """The provider of a name.

    Raises:
        Unavailable: it cannot run here (not installed, not built, an unknown name).
    """
    if name == "torch":
        return Provider(name, torch_function(op, case))
    if name == "compile":
        torch._dynamo.reset()
        # a backward timed alone runs many times on one graph, so it must not reuse the graph's buffers
        torch._functorch.config.donated_buffer = False
        return Provider(name, torch.compile(_fresh(torch_function(op, case)), dynamic=False))
    if name.split("@")[0] == "pydl":
        return _pydl(name, op, case)
    if ":" in name:
        return Provider(name, _import(name))
    offered = getattr(load(op), "providers", lambda case: {})(case)
    if name not in offered:
        raise Unavailable(f"unknown provider {name!r}")
    if offered[name] is None:
        raise Unavailable(f"{name} is not installed")
    return Provider(name, offered[name])


def _fresh(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A new function object, so that compiled graphs of one case do not count against the next one's cache."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return call


def _pydl(name: str, op: str, case: Case) -> Provider:
    try:
        import pydl
    except ImportError as failure:
        raise Unavailable(f"pydl cannot be imported: {failure}") from failure
    fn = getattr(pydl.ops, function_name(op, case), None)
    if fn is None:
        raise Unavailable(f"pydl.ops has no {function_name(op, case)}")
    _, _, forced = name.partition("@")
    if not forced:
        return Provider(name, fn)
    return Provider(name, fn, lambda: pydl.backend(forced))


def _import(name: str) -> Callable[..., Any]:
    """The function of "module:function"; modules of the current folder are found as well."""
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as failure:
        raise Unavailable(f"{name}: {failure}") from failure
    if not callable(target):
        raise Unavailable(f"{name} is not callable")
    return target


def backend_of(provider: Provider, prepare_and_run: Callable[[], object], phase: str | None) -> tuple[str, str]:
    """(backend, reason) that a run used, from pydl's trace; other providers are their own backend.

    Where pydl calls torch, torch's own backward follows and leaves no record: then the forward's record stands.
    """
    if not provider.is_pydl:
        prepare_and_run()
        return {"compile": "inductor"}.get(provider.name, provider.name), ""
    import pydl

    with pydl.trace() as seen:
        prepare_and_run()
    records = [r for r in seen if phase is None or r.phase == phase] or list(seen)
    return "+".join(dict.fromkeys(r.backend for r in records)), "; ".join(dict.fromkeys(r.reason for r in records))
