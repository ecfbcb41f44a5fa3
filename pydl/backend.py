"""Which implementation of an op runs, why, and the record of it.

Every public op asks :func:`choose` once per call. The answer, a :class:`Decision`, is kept for the call's backward and
is what :class:`trace` records. Choices are process-wide on purpose: a backward runs on another thread and must see the
same forced backend and the same traces as the forward.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from pydl import _library

__all__ = ["Decision", "Family", "Record", "backend", "choose", "trace"]

BACKENDS = ("cpu", "cuda", "triton", "torch", "simt")
# the dispatcher namespace in which a backend's implementations are registered
NAMESPACES = {"cpu": "pydl", "cuda": "pydl", "triton": "pydl_triton", "simt": "pydl_simt"}
MIN_CAPABILITY = (8, 0)

_jit_is_tracing = torch._C._is_tracing
_transforms_active = torch._C._are_functorch_transforms_active
_log = logging.getLogger("pydl")
_DISABLED = frozenset(name.strip() for name in os.environ.get("PYDL_DISABLE", "").split(",") if name.strip())
_CHECKED = os.environ.get("PYDL_CHECKED", "0") not in ("", "0")
_STRICT = os.environ.get("PYDL_STRICT", "0") not in ("", "0")
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
if os.environ.get("PYDL_LOG", "0") not in ("", "0"):
    logging.basicConfig(format="%(name)s: %(message)s")
    _log.setLevel(logging.INFO)


@dataclass(frozen=True, slots=True)
class Decision:
    """The implementation that a call uses: op name, backend, why, and whether that is a fallback from a pydl kernel."""

    op: str
    backend: str
    reason: str
    fallback: bool = False

    @property
    def namespace(self) -> str:
        """The ``torch.ops`` namespace that holds this backend's implementations."""
        return NAMESPACES[self.backend]


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a trace: op, backend, reason, and phase ("forward" or "backward")."""

    op: str
    backend: str
    reason: str
    phase: str


@dataclass(slots=True)
class Family:
    """What the chooser must know of one public op.

    Args:
        name: the public op's name, as in ``PYDL_DISABLE`` and in traces.
        ops: the raw ops that a call needs; a backend implements the family when it has a kernel for each of them.
        order: for each device type the backends to try, best first. A device type that is absent goes to torch.
        dtypes: the dtypes a backend takes.
        policy: for a device type where torch itself is the best known implementation, the reason; not a fallback.
    """

    name: str
    ops: tuple[str, ...]
    order: dict[str, tuple[str, ...]]
    dtypes: dict[str, tuple[torch.dtype, ...]]
    policy: dict[str, str] = field(default_factory=dict)
    _cache: dict[Any, Decision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _families[self.name] = self


_families: dict[str, Family] = {}
_forced: str | None = None
_traces: tuple[trace, ...] = ()
_lock = threading.Lock()
_logged: set[Decision] = set()


def families() -> dict[str, Family]:
    """All public ops known to the chooser, by name."""
    return dict(_families)


def check_environment() -> None:
    """Warn of names in PYDL_DISABLE that no op has; called once all ops are known."""
    unknown = sorted(_DISABLED - _families.keys() - {"all"})
    if unknown:
        known = ", ".join(sorted(_families))
        warnings.warn(f"PYDL_DISABLE names no op of pydl: {', '.join(unknown)} (ops: {known}, all)", stacklevel=2)


class backend:
    """Force one backend for every pydl op inside the ``with`` block, in all threads.

    Args:
        name: "cpu" (native C++), "cuda" (CUDA C++), "triton", "torch", or in tests "simt".

    Raises:
        ValueError: for an unknown name.
        RuntimeError: from the op called inside, when that backend cannot run it; the message says why.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
        self.name = name
        self._outer: list[str | None] = []

    def __enter__(self) -> backend:
        global _forced
        self._outer.append(_forced)
        _forced = self.name
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._outer.pop()


class trace:
    """Record which backend each pydl op ran on, and why, while the ``with`` block is active (all threads).

    Iterating gives :class:`Record` objects with ``.op``, ``.backend``, ``.reason`` and ``.phase``; ``print(trace)``
    gives a table with counts. A backward that runs inside the block is recorded also when its forward ran before it.
    A compiled or exported graph calls its ops without passing here: its choices are recorded once, while it is traced.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __enter__(self) -> trace:
        global _traces
        with _lock:
            _traces = (*_traces, self)
        return self

    def __exit__(self, *exc: object) -> None:
        global _traces
        with _lock:
            _traces = tuple(t for t in _traces if t is not self)

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self.records))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def __str__(self) -> str:
        rows = [("op", "phase", "backend", "calls", "why")]
        for record, calls in Counter(self.records).items():
            rows.append((record.op, record.phase, record.backend, str(calls), record.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)


def record(decision: Decision, phase: str) -> None:
    """Add a decision to the active traces and, with PYDL_LOG=1, log it the first time it is taken."""
    if _traces:
        entry = Record(decision.op, decision.backend, decision.reason, phase)
        for active in _traces:
            active.records.append(entry)
    if _log.isEnabledFor(logging.INFO) and decision not in _logged:
        _logged.add(decision)
        _log.info("%s -> %s (%s)", decision.op, decision.backend, decision.reason)


def choose(family: Family, x: Tensor, declined: str = "", best: str = "") -> Decision:
    """The implementation for a call whose leading tensor is ``x``; recorded as a forward.

    Args:
        family: the op.
        x: the tensor that decides: its device, dtype and type.
        declined: a non-empty reason why this very call must go to torch (an argument no kernel takes).
        best: a non-empty reason why torch is the best known implementation of this very call; not a fallback, and a
            forced backend runs all the same.

    Raises:
        RuntimeError: a forced backend cannot run the call, or ``PYDL_STRICT=1`` and the call falls back to torch.
    """
    if x.layout is not torch.strided or x.is_nested:
        declined = declined or ("nested tensors are" if x.is_nested else f"layout {x.layout} is") + " left to torch"
    if torch.compiler.is_compiling():
        op, name, reason, fallback = _choose_compiling(
            family.name, x.device.type, str(x.dtype), _kind(x), declined, _forced, best
        )
        return Decision(op, name, reason, fallback)
    if not declined and forward_ad._current_level >= 0:
        declined = "forward-mode differentiation is left to torch"
    if not declined and _transforms_active() and _inside_vmap():
        declined = "vmap is left to torch, whose own ops need no loop over the batch"
    if not declined and _jit_is_tracing():
        declined = "torch.jit.trace is left to torch: its graph cannot hold a Python autograd.Function"
    if declined:
        decision = _resolve(family, x.device, x.dtype, _kind(x), declined, _forced, best)
    else:
        key = (x.device, x.dtype, type(x), _forced, best)
        cached = family._cache.get(key)
        decision = cached or _resolve(family, x.device, x.dtype, _kind(x), "", _forced, best)
        if cached is None and not decision.fallback:
            family._cache[key] = decision
    if _traces or _log.level == logging.INFO:
        record(decision, "forward")
    return decision


def _inside_vmap() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def _kind(x: Tensor) -> str:
    """The name of a tensor subclass, whose behaviour torch must preserve; empty for tensors that kernels may read."""
    if type(x) is Tensor or type(x) is Parameter or isinstance(x, (FakeTensor, FunctionalTensor)):
        return ""
    return type(x).__name__


def _choose_compiling(
    name: str, device_type: str, dtype: str, kind: str, declined: str, forced: str | None, best: str
) -> tuple[str, str, str, bool]:
    """:func:`choose` while a graph is traced: runs in Python at trace time, so that its answer is a constant."""
    device = torch.device(device_type)
    family, wanted = _families[name], getattr(torch, dtype.removeprefix("torch."))
    decision = _resolve(family, device, wanted, kind, declined, forced, best)
    record(decision, "forward")
    return decision.op, decision.backend, decision.reason, decision.fallback


# what torch.compiler.assume_constant_result sets, without the 1.4 s that importing torch._dynamo adds to `import pydl`
_choose_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _resolve(
    family: Family,
    device: torch.device,
    dtype: torch.dtype,
    kind: str,
    declined: str,
    forced: str | None,
    best: str = "",
) -> Decision:
    name = family.name
    if kind:
        declined = declined or f"tensor subclass {kind} is left to torch"
    if forced == "torch":
        return Decision(name, "torch", "forced by pydl.backend('torch')")
    if forced is not None:
        why = declined or _unavailable(family, forced, device, dtype)
        if why:
            raise RuntimeError(f"{name}: backend {forced!r} is forced but cannot run this call: {why}")
        return Decision(name, forced, f"forced by pydl.backend({forced!r})")
    if name in _DISABLED or "all" in _DISABLED:
        declined = declined or "disabled by PYDL_DISABLE"
    best = best or family.policy.get(device.type, "")
    if best and not declined:
        return Decision(name, "torch", best)
    reasons = [declined] if declined else []
    if not declined:
        order = family.order.get(device.type, ())
        for candidate in order:
            why = _unavailable(family, candidate, device, dtype)
            if not why:
                return Decision(name, candidate, "; ".join([*reasons, f"best kernel for {device.type}"]))
            reasons.append(why)
        if not order:
            reasons.append(f"no pydl kernel for device {device.type!r}")
    reason = "; ".join(reasons)
    if _STRICT:
        raise RuntimeError(f"{name}: PYDL_STRICT=1 and the call would fall back to torch: {reason}")
    return Decision(name, "torch", reason, fallback=True)


def _unavailable(family: Family, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot run an op on this device and dtype; empty if it can."""
    on_gpu = device.type == "cuda"
    if name == "triton":
        why = _triton_missing(on_gpu)
    elif name == "cuda":
        why = "" if on_gpu else f"the cuda backend needs a CUDA tensor, got device {device.type!r}"
    else:
        why = "" if device.type == "cpu" else f"the {name} backend needs a CPU tensor, got device {device.type!r}"
    have = (
        torch.cuda.get_device_capability(device)
        if on_gpu and torch.version.cuda and torch.cuda.is_available()
        else None
    )
    if not why and have is not None and have < MIN_CAPABILITY:
        why = f"compute capability {have[0]}.{have[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    if not why and not has_kernels(family, name, "CUDA" if on_gpu else "CPU"):
        library = {"cpu": _library.cpu_library, "cuda": _library.cuda_library}.get(name)
        why = (library().reason if library else "") or f"no {name} kernel for {family.name}"
    if not why and dtype not in family.dtypes.get(name, ()):
        why = f"the {name} kernel does not take {dtype}"
    return why


def _triton_missing(on_gpu: bool) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not on_gpu and not _INTERPRET:
        return "triton kernels need a GPU tensor (or TRITON_INTERPRET=1 for tests on the CPU)"
    return ""


def has_kernels(family: Family, name: str, key: str) -> bool:
    """Whether a backend has a kernel for every raw op of a family at a dispatch key ("CPU", "CUDA")."""
    return all(has_kernel(f"{NAMESPACES[name]}::{op}", key) for op in family.ops)


def has_kernel(qualified_name: str, key: str) -> bool:
    """Whether the dispatcher holds a kernel for an op, such as ``pydl::layer_norm_fwd``, at a dispatch key."""
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(qualified_name, key))
    except RuntimeError:  # the dispatcher has no such operator at all
        return False
