"""Triton kernels and their launchers, one module per op.

In a checkout the modules live in the folder ``kernels/`` beside the package, and this file adds that folder to the
package's path; in a wheel they are installed here. Either way they are ``pydl.kernels.<op>``, and the top-level name
``kernels`` stays free.
"""

from pathlib import Path as _Path

_checkout = _Path(__file__).resolve().parents[2] / "kernels"
if (_checkout.parent / "csrc").is_dir() and not (_checkout / "__init__.py").exists():
    __path__.append(str(_checkout))
