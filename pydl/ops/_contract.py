"""How an op's formulas become a torch operator: the one generator of handles, autograd, fake and trace.

An op file declares an :class:`Op` per raw operator: schema, fake, and, where it has one, the formula of its derivative
(``setup`` saves what ``backward`` needs; ``backward`` calls other ops through their own gate, so it can be
differentiated again). From that, every namespace that may hold an implementation gets a torch operator with autograd
registered, so ``torch.ops.pydl.<op>``, ``torch.compile`` and ``torch.export`` are right by themselves.

Eager calls take a shorter way to the same result: a ctx-style ``autograd.Function``, entered only when a gradient is
wanted, over the same operator called below its autograd key. Three tensors in and out, torch 2.13 on a CPU: 10.8 us
against 21.6 us through the registration, and 5.4 us against 9.2 us without a gradient. Under a torch.func transform a
``setup_context``-style Function takes its place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydl.backend import _INTERPRET, NAMESPACES, Decision, record

__all__ = ["Op"]

_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_transforms_active = torch._C._are_functorch_transforms_active
# a backward reached through the dispatcher, not through a public call, has only its namespace to go by
_BY_NAMESPACE = {
    "pydl": Decision("", "cpu", "called through torch.ops"),
    "pydl_triton": Decision("", "triton", "called through torch.ops"),
    "pydl_simt": Decision("", "simt", "called through torch.ops"),
}

Formula = Callable[..., Any]


class Op:
    """One raw operator in every namespace that may implement it.

    Args:
        name: operator name; the handles are ``torch.ops.{pydl,pydl_triton,pydl_simt}.<name>``.
        schema: arguments and results in torch's schema language; functional, fixed arity, no aliasing.
        fake: computes the outputs' shapes, dtypes and strides with ``new_empty``.
        setup: ``setup(ctx, inputs, outputs)`` saves for the backward; ``None`` for an op without a derivative.
        backward: ``backward(ctx, *grads)`` returns one gradient (or ``None``) for each input; ``ctx.decision`` is the
            decision of the forward and must be handed to the ops it calls. Undefined gradients arrive as ``None``.
        hidden: how many of the last outputs are for the backward alone: never differentiable, not handed to callers.
            Eager calls then need not wrap them (layer_norm with a gradient: 2 us).
        triton: ``"module:function"`` below ``pydl.kernels``, imported on the first call; takes the schema's arguments.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Formula,
        setup: Formula | None = None,
        backward: Formula | None = None,
        hidden: int = 0,
        triton: str | None = None,
    ) -> None:
        if (setup is None) != (backward is None):
            raise ValueError(f"Op {name}: setup and backward go together")
        self.name = name
        self.hidden = hidden
        self._handles: dict[str, _Handle] = {}
        for namespace in dict.fromkeys(NAMESPACES.values()):
            torch.library.define(f"{namespace}::{name}", schema)
            torch.library.register_fake(f"{namespace}::{name}", fake)
            self._handles[namespace] = _Handle(self, namespace, setup, backward)
        if triton is not None:
            launch = _lazy_triton(triton)
            for key in ("CUDA", "CPU") if _INTERPRET else ("CUDA",):
                torch.library.impl(f"pydl_triton::{name}", key)(launch)

    def overload(self, decision: Decision) -> Any:
        """The operator itself, which also returns what is hidden from callers."""
        return self._handles[NAMESPACES[decision.backend]].overload

    def __call__(self, decision: Decision, *args: Any) -> Any:
        """Run on the decided backend, recording autograd history only when a gradient is wanted."""
        handle = self._handles[NAMESPACES[decision.backend]]
        if torch.compiler.is_compiling():
            return _visible(handle.overload(*args), self.hidden)
        if _transforms_active():
            run = handle.overload if handle.transform is None else handle.transform.apply
            return _visible(run(*args), self.hidden)
        if handle.eager is not None and torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return handle.eager.apply(*args, decision)
        with _BelowAutograd():
            return _visible(handle.run(*args), self.hidden)


def _visible(out: Any, hidden: int) -> Any:
    if not hidden:
        return out
    return out[0] if len(out) == hidden + 1 else out[:-hidden]


class _Handle:
    """The operator in one namespace and the two Functions that eager calls go through."""

    def __init__(self, op: Op, namespace: str, setup: Formula | None, backward: Formula | None) -> None:
        self.overload = getattr(getattr(torch.ops, namespace), op.name).default
        self.run = self.overload._op  # what the overload's Python method calls, 0.35 us later
        self.eager: Any = None
        self.transform: Any = None
        if setup is None or backward is None:
            return
        by_dispatcher = _BY_NAMESPACE[namespace]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.decision = by_dispatcher
            if op.hidden:
                ctx.mark_non_differentiable(*output[-op.hidden :])
            setup(ctx, inputs, output)

        def formula(ctx: Any, *grads: Tensor | None) -> Any:
            return backward(ctx, *grads[: len(grads) - op.hidden])

        torch.library.register_autograd(f"{namespace}::{op.name}", formula, setup_context=setup_context)
        self.eager = _eager_function(op, self.run, setup, backward)
        self.transform = _transform_function(op, self.overload, setup_context, formula)


def _eager_function(op: Op, run: Formula, setup: Formula, backward: Formula) -> type:
    hidden = op.hidden

    def forward(ctx: Any, *args: Any) -> Any:
        # the decision comes last, so that ctx.needs_input_grad counts as it does under register_autograd
        *args, ctx.decision = args  # type: ignore[assignment]
        with _BelowAutograd():
            out = run(*args)
        ctx.set_materialize_grads(False)
        setup(ctx, args, out)
        return _visible(out, hidden)

    def run_backward(ctx: Any, *grads: Tensor | None) -> Any:
        decision = ctx.decision
        record(decision, "backward")
        return (*_flat(backward(ctx, *grads)), None)

    return _function(op, forward, run_backward)


def _transform_function(op: Op, overload: Any, setup_context: Formula, backward: Formula) -> type:
    def forward(*args: Any) -> Any:
        return overload(*args)

    def run_backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _flat(backward(ctx, *grads))

    body = {"setup_context": staticmethod(setup_context), "generate_vmap_rule": True}
    return _function(op, forward, run_backward, **body)


def _flat(given: Any) -> tuple[Any, ...]:
    """As a Function gives gradients: None for a list of tensors, where an operator's formula gives a list of None."""
    given = given if isinstance(given, tuple) else (given,)
    return tuple([None if isinstance(g, list) else g for g in given]) if list in map(type, given) else given


def _function(op: Op, forward: Formula, backward: Formula, **body: Any) -> type:
    title = "".join(part.title() for part in op.name.split("_"))
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward), "__module__": __name__, **body}
    return type(title, (torch.autograd.Function,), members)


def _lazy_triton(target: str) -> Formula:
    module_name, function_name = target.split(":")
    loaded: list[Formula] = []

    def launch(*args: Any) -> Any:
        if not loaded:
            if _INTERPRET:  # else bfloat16 is silently wrong
                importlib.import_module("pydl._interpreter").repair()
            loaded.append(getattr(importlib.import_module(f"pydl.kernels.{module_name}"), function_name))
        return loaded[0](*args)

    return launch


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; where it has it already, without the 2 us that ``to`` takes to find out."""
    return t if t.dtype is dtype else t.to(dtype)


def wants(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient may be wanted for one of these tensors in the current mode."""
    if _transforms_active() or torch.compiler.is_exporting():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
