"""Drop-in modules: subclasses of torch's with the same signature, state_dict and repr, whose forward calls pydl's ops.

Each module file beside this one lists its classes in ``__all__``; they are re-exported here.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def _collect() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{info.name}")
            found.update({name: getattr(module, name) for name in module.__all__})
    return found


_public = _collect()
globals().update(_public)
__all__ = sorted(_public)
