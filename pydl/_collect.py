"""What a package re-exports: the ``__all__`` of every module in it, so that no list is kept by hand."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def public_names(package: str, path: Iterable[str]) -> dict[str, Any]:
    """The public objects of a package's modules (those whose name has no leading underscore), by name.

    All modules are imported before the caller binds a name, so a function named like its module wins the attribute.
    """
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(path):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{package}.{info.name}")
            found.update({name: getattr(module, name) for name in module.__all__})
    return found
