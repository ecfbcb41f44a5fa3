"""pydl: Triton and CUDA C++ kernels for deep learning as drop-in torch ops, with a native C++ path for the CPU."""

from pydl import functional, nn, ops
from pydl._version import __version__
from pydl.accelerate import accelerate, restore
from pydl.backend import backend, trace

__all__ = ["__version__", "accelerate", "backend", "functional", "nn", "ops", "restore", "trace", "verify"]


def __getattr__(name: str) -> object:
    if name == "verify":  # loads NumPy oracles: only on demand
        from pydl._verify import verify

        return verify
    raise AttributeError(f"module 'pydl' has no attribute {name!r}")
