"""Put pydl's modules into a model that was written with torch's, and take them out again.

A module is replaced by changing its class to the drop-in subclass, so the object, its parameters, buffers, hooks, and
every reference to it (weight tying, optimisers, a module used twice) stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.utils import parametrize

from pydl import _fuse, nn

__all__ = ["Report", "Row", "accelerate", "restore"]

_MARK = "_pydl_accelerated"
# for each torch class the drop-in that subclasses it
_DROP_INS: dict[type, type] = {
    base: cls
    for cls in (getattr(nn, name) for name in nn.__all__)
    for base in cls.__bases__
    if base is not torch.nn.Module
}


# containers, and modules that only rearrange: nothing to replace, nothing to report
_NO_KERNEL_NEEDED = (
    *(torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict),
    *(torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One module of the model: its qualified name, its class, whether it was replaced, and why (not)."""

    name: str
    kind: str
    replaced: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What :func:`accelerate` or :func:`restore` did, a row for each module that computes something."""

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The rows of modules whose class or, with ``fuse``, whose forward was changed."""
        return tuple(row for row in self.rows if row.replaced)

    @property
    def kept(self) -> tuple[Row, ...]:
        """The rows of modules left as they are."""
        return tuple(row for row in self.rows if not row.replaced)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("module", "class", "now", "why")]
        cells += [(r.name or "(model)", r.kind, "pydl" if r.replaced else "torch", r.reason) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in cells)


def accelerate(model: torch.nn.Module, fuse: bool = False) -> Report:
    """Replace the modules of a model that pydl has a drop-in for, in place.

    Only modules whose class is exactly torch's are replaced; their parameters, buffers, hooks, ties and names stay.
    Subclasses, parametrised, quantised, scripted and compiled modules are left alone, with the reason in the report.
    Functions called inside a ``forward`` (``F.relu``) are not changed: call ``pydl.functional`` there.

    Args:
        model: any module; shared submodules are handled once.
        fuse: also run batch norm, addition and relu as one call where a module's forward has them in a row. Forwards
            are traced with torch.fx for this, which fixes their Python branches as they are now: a change of the
            module's own attributes is noticed and the original forward runs, one of a global variable is not. Hooks and
            training flags are asked for on each call. Copies stay fused; unpickled modules do not.

    Returns:
        A report, iterable by rows; ``str(report)`` is a table of what was replaced, what was kept, and why.

    Raises:
        TypeError: model is no module, or fuse is no bool.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: argument 'model' must be a torch.nn.Module, got {type(model).__name__}")
    if type(fuse) is not bool:
        raise TypeError(f"accelerate: argument 'fuse' must be a bool, got {fuse!r}")
    rows = []
    for name, module, keep in _walk(model):
        kind = type(module).__name__
        reason = keep or _reason_to_keep(module)
        if reason is None:
            module.__class__ = _DROP_INS[type(module)]
            setattr(module, _MARK, True)
            rows.append(Row(name, kind, True, f"pydl.nn.{kind}"))
        elif reason:
            rows.append(Row(name, kind, False, reason))
    if fuse:
        rows += _fused(model)
    return Report(tuple(rows))


def _fused(model: torch.nn.Module) -> Iterator[Row]:
    for name, module, keep in _walk(model):
        count, reason = (0, "") if keep else _fuse.fuse(module)
        if count:
            reason = f"{count} x batch norm, addition and relu in one call"
        if reason:
            yield Row(name, type(module).__name__, count > 0, reason)


def restore(model: torch.nn.Module) -> Report:
    """Undo :func:`accelerate`: give every module it replaced torch's class back; pydl modules of your own stay.

    Args:
        model: a model that went through :func:`accelerate` (copies and unpickled models too).

    Returns:
        A report whose rows are the modules that were changed back.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore: argument 'model' must be a torch.nn.Module, got {type(model).__name__}")
    rows = []
    for name, module in model.named_modules():
        if _fuse.undo(module):
            rows.append(Row(name, type(module).__name__, False, "its own forward again"))
        if module.__dict__.pop(_MARK, False):
            module.__class__ = next(base for base, cls in _DROP_INS.items() if cls is type(module))
            rows.append(Row(name, type(module).__name__, False, "torch's class again"))
    return Report(tuple(rows))


def _walk(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Every module with its name and, inside a region that must not be touched, the reason."""
    untouchable: dict[str, str] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        keep = untouchable.get(parent, "") if name else ""
        region = keep or _untouchable(module)
        if region:
            untouchable[name] = region
        yield name, module, region


def _untouchable(module: torch.nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: its code is fixed"
    dynamo = sys.modules.get("torch._dynamo")  # a model can only be compiled once this is imported
    if (dynamo and isinstance(module, dynamo.OptimizedModule)) or module._compiled_call_impl is not None:
        return "compiled: accelerate the model before torch.compile"
    if isinstance(module, torch.fx.GraphModule):
        return "a traced graph: accelerate the model before tracing"
    return ""


def _reason_to_keep(module: torch.nn.Module) -> str | None:
    """None to replace; "" for a pure container, which needs no row; else why torch's module stays."""
    cls = type(module)
    if getattr(module, _MARK, False) or cls in _DROP_INS.values():
        return "already pydl's"
    if parametrize.is_parametrized(module):
        return "parametrised: its class is generated"
    if cls.__module__.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat")):
        return "quantised: has its own kernels"
    if cls in _DROP_INS:
        if "forward" in module.__dict__:
            return "its forward is overridden on the instance"
        return None
    for base in _DROP_INS:
        if isinstance(module, base):
            return f"a subclass of torch.nn.{base.__name__}, which may change its behaviour"
    if cls.__module__.startswith("torch.nn.") and not isinstance(module, _NO_KERNEL_NEEDED):
        return "no pydl kernel for it yet: torch's is used"
    return ""
