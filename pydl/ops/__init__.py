"""All public ops. Each module beside this file is one op; its ``__all__`` is re-exported here."""

from __future__ import annotations

from pydl import _library
from pydl._collect import public_names
from pydl.backend import check_environment

_library.cpu_library()
_library.cuda_library()

_public = public_names(__name__, __path__)
globals().update(_public)
__all__ = sorted(_public)
check_environment()
