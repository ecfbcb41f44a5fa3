"""NumPy float64 oracles, one module per op, written from the formulas. They import neither torch nor pydl's ops."""

from __future__ import annotations

import importlib
import pkgutil

from pydl.reference._spec import Case, Spec

__all__ = ["Case", "Spec", "modules", "specs"]


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
