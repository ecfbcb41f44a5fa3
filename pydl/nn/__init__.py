"""Drop-in modules: subclasses of torch's with the same signature, state_dict and repr, whose forward calls pydl's ops.

Each module file beside this one lists its classes in ``__all__``; they are re-exported here.
"""

from __future__ import annotations

from pydl._collect import public_names

_public = public_names(__name__, __path__)
globals().update(_public)
__all__ = sorted(_public)
