"""NumPy float64 oracles, one module per op, written from the formulas. They import neither torch nor pydl's ops."""

from __future__ import annotations

import importlib
import pkgutil

from pydl.reference._spec import Case, Spec

__all__ = ["Case", "Spec", "modules", "spec", "specs"]


def modules() -> list[str]:
    """Names of the ops that have an oracle, one per module of this folder."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def specs(op: str | None = None) -> dict[str, Spec]:
    """The specs of every op, or of one module or function name, by function name.

    Args:
        op: a module of this folder ("activations") or one function ("gelu"); None for all.

    Returns:
        dict of Spec in the order of the modules.

    Raises:
        ValueError: if no op has this name.
    """
    found: dict[str, Spec] = {}
    for module in modules():
        declared = importlib.import_module(f"{__name__}.{module}").SPECS
        found.update({spec.name: spec for spec in declared if op in (None, module, spec.name)})
    if not found:
        raise ValueError(f"op must be one of {', '.join(specs())} or {', '.join(modules())}, but got {op!r}")
    return found


def spec(function: str) -> Spec:
    """The spec of one function, or of a module that holds a single one.

    Raises:
        ValueError: if no op has this name, or a module of this name holds several and none is called like it.
    """
    found = specs(function)
    if function not in found and len(found) != 1:
        raise ValueError(f"op must be one function, but {function!r} holds {', '.join(found)}")
    return found.get(function) or next(iter(found.values()))
