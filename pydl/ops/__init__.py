"""All public ops. Each module beside this file is one op; its ``__all__`` is re-exported here."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from pydl import _library
from pydl.backend import check_environment

_library.cpu_library()
_library.cuda_library()


def _collect() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        found.update({name: getattr(module, name) for name in module.__all__})
    return found


_public = _collect()
# after all imports: a function named like its module must win the attribute
globals().update(_public)
__all__ = sorted(_public)
check_environment()
