"""What the test of every op asks in the same words: values, gradients, layouts, errors, opcheck, compile, autocast."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pydl._problems import Problem, applicable, problems, same_bits
from pydl._verify import verify_problem
from pydl.reference import Case
from pydl.reference import spec as spec_of

__all__ = [
    "assert_same_bits",
    "check_autocast",
    "check_cases",
    "check_compile",
    "check_deterministic",
    "check_gradcheck",
    "check_layouts",
    "check_opcheck",
    "check_same_error",
    "ops_called",
]


def _assert_rows(rows: Iterable[tuple[str, str, Any]]) -> int:
    rows = list(rows)
    failed = [f"{check}, {case}: {grade}" for check, case, grade in rows if not grade.ok]
    assert not failed, "\n".join(failed)
    return len(rows)


def check_cases(
    backend,
    dtype: torch.dtype,
    level: str,
    keep: Callable[[Case], bool] = lambda case: True,
    function: str | None = None,
) -> None:
    """Values, "gradients" or "second" gradients of the op's own cases against the oracle, contiguous inputs.

    Args:
        backend: a Backend of `_backends`, called as the op.
        dtype: dtype of all tensors.
        level: what is compared.
        keep: chooses among the cases, where all of them would take too long.
        function: name of the spec; the backend's op by default.
    """
    spec = spec_of(function or backend.op)
    chosen = [p for p in problems(spec, dtype) if p.layout == "contiguous" and keep(p.case)]
    if level == "gradients":
        chosen = [p for p in chosen if p.case.gradients]
    if level == "second":
        chosen = [p for p in chosen if p.case.second]
    assert chosen, "no case is left: the test would pass whatever the op does"
    device = torch.device(backend.device)
    ran = sum(_assert_rows(verify_problem(backend, p, device, level, reruns=1)) for p in chosen)
    assert ran >= len(chosen)


def check_layouts(backend, dtype: torch.dtype, case: Case, levels: Sequence[str] = ("values", "gradients")) -> None:
    """One case with its tensors misaligned, cropped, strided, transposed, expanded and channels_last."""
    spec = spec_of(backend.op)
    for layout in applicable(case):
        problem = Problem(spec, case, dtype, layout)
        for level in levels:
            _assert_rows(verify_problem(backend, problem, torch.device(backend.device), level, reruns=1))


def check_gradcheck(fn: Callable[..., Tensor], inputs: Sequence[Tensor], second: bool = True) -> None:
    """First and second derivatives of `fn` against finite differences; float64 inputs."""
    for tensor in inputs:
        assert tensor.dtype == torch.float64 and tensor.requires_grad, "gradcheck needs float64 leaves"
    assert torch.autograd.gradcheck(fn, tuple(inputs))
    if second:
        assert torch.autograd.gradgradcheck(fn, tuple(inputs))


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equality of every bit, NaN included, whatever the strides."""
    assert a.shape == b.shape and a.dtype == b.dtype, f"{a.shape} {a.dtype} against {b.shape} {b.dtype}"
    assert same_bits(a, b), f"{int((a != b).sum())} of {a.numel()} values differ"


def check_deterministic(fn: Callable[..., Tensor], *tensors: Tensor, runs: int = 3) -> None:
    """The same bits for output and gradients on every run."""

    def run() -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = fn(*leaves)
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    first = run()
    for _ in range(runs - 1):
        for a, b in zip(first, run(), strict=True):
            assert_same_bits(a, b)


def check_same_error(
    ours: Callable[..., Any], torchs: Callable[..., Any], *args: Any, says: Sequence[str] = (), **kwargs: Any
) -> None:
    """Torch refuses these arguments, and so does pydl with an exception of the same class (or a subclass).

    Args:
        ours: the op of pydl.
        torchs: torch's.
        args: the bad arguments, with kwargs.
        says: what the message must hold: op, argument, rule, value.
        kwargs: further arguments of both.
    """
    with pytest.raises(Exception) as expected:  # noqa: PT011 - the class is what is being asked
        torchs(*args, **kwargs)
    with pytest.raises(expected.type) as raised:
        ours(*args, **kwargs)
    message = str(raised.value)
    for part in says:
        assert re.search(re.escape(part), message), f"{part!r} is missing in {message!r}"


def check_opcheck(op: Any, *args: Any) -> None:
    """torch.library.opcheck: schema, autograd registration, fake tensors, aot_autograd with dynamic shapes."""
    torch.library.opcheck(op, args)


def check_compile(fn: Callable[..., Tensor], shapes: Sequence[Sequence[Tensor]], backend: str = "aot_eager") -> None:
    """fullgraph compilation gives eager's values and gradients, again for a second shape.

    Args:
        fn: function of tensors.
        shapes: argument tensors for each call, at least two sets of different shape.
        backend: of torch.compile; "aot_eager" needs no compiler.
    """
    torch._dynamo.reset()
    assert len(shapes) > 1 and shapes[0][0].shape != shapes[1][0].shape
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    for tensors in shapes:
        results = []
        for f in (fn, compiled):
            leaves = [t.detach().clone().requires_grad_() for t in tensors]
            y = f(*leaves)
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, equal_nan=True)
            assert graph.stride() == eager.stride()


def check_autocast(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], *args: Any, device: str = "cpu", low: torch.dtype
) -> None:
    """Under autocast the result has the dtype that torch's has, and its values."""
    with torch.autocast(device, dtype=low):
        y, expected = ours(*args), torchs(*args)
    assert y.dtype == expected.dtype
    tolerance = 8 * torch.finfo(low).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


class ops_called(TorchDispatchMode):
    """Names of the operators that run inside the block, such as "pydl::layer_norm_fwd"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().rsplit(".", 1)[0] if "." in func.name() else func.name())
        return func(*args, **(kwargs or {}))

    def pydl(self) -> list[str]:
        """Only pydl's own, without the namespace."""
        return [name.split("::")[1] for name in self.names if name.startswith("pydl")]
