"""Batch norm, addition and relu of a module's forward as one call, where torch.fx sees that they belong together.

A module's own forward is traced once, with its children as they are: each stays a call of that child, with its hooks
and its training flag. What is found is compiled into a function of the same module, which looks its children up when it
runs. A fused call asks again, every time, whether it may: children of the very classes that were seen, without hooks, a
residual of the same shape and dtype. Otherwise the three run one by one.

Tracing fixes the branches that Python took. Plain attributes of the module that were read meanwhile, and which children
it has, are compared on each call, and the original forward runs when one has changed; but a branch on a global variable
or on the inside of an object would not be noticed. That is why fusing must be asked for.
"""

from __future__ import annotations

import inspect
import math
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor

from pydl import functional
from pydl.nn.activations import ReLU
from pydl.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, normalise
from pydl.ops.activations import relu as pydl_relu

_MARK = "_pydl_fused"
_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_RELUS = (ReLU, torch.nn.ReLU)
_RELU_FUNCTIONS = (torch.relu, torch.relu_, torch.nn.functional.relu, torch.nn.functional.relu_, pydl_relu)


def _in_place(name: str) -> Callable[..., Any]:
    """An operator such as ``iadd`` under a name of its own: for torch's, fx writes ``a += b``, which also renames a."""

    def function(a: Any, b: Any) -> Any:
        return getattr(operator, name)(a, b)

    function.__name__ = function.__qualname__ = f"in_place_{name}"
    return function


_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
_IN_PLACE = {name: _in_place(name) for name in (*_OPERATORS, "ilshift", "irshift")}
_ADD_FUNCTIONS = (operator.add, _IN_PLACE["iadd"], torch.add)
# their output is new memory, which nothing but the next module sees
_FRESH = (
    *(torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear),
    *(torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    getattr(torch.nn.modules.module, f"_global{name}", {}) for name in (*_HOOKS, "_forward_hooks_always_called")
)
_SIMPLE = (bool, int, float, str, type(None))


def fuse(module: torch.nn.Module) -> tuple[int, str]:
    """Fuses what can be fused in a module's own forward; says how many batch norms that were, or why tracing failed."""
    if not any(type(child) in _NORMS for child in module.modules()) or type(module) in _NORMS:
        return 0, ""
    if "forward" in module.__dict__:
        fused = _MARK in module.__dict__
        return 0, "already fused" if fused else "not fused: its forward is overridden on the instance"
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty for p in parameters):
        return 0, "not fused: its forward has optional arguments, which a trace would fix"
    try:
        graph, reads = _trace(module)
    except Exception as error:  # a module's code may raise anything when it meets a proxy
        reason = str(error).splitlines()[0] if str(error) else ""
        return 0, f"not fused: its forward cannot be traced ({type(error).__name__}: {reason})"
    count = sum(_rewrite(module, graph, node) for node in list(graph.nodes))
    if count:
        forward = _forward(type(module).forward, graph, reads, _children(module))
        module.__dict__["forward"] = types.MethodType(forward, module)
        module.__dict__[_MARK] = count
    return count, ""


def undo(module: torch.nn.Module) -> int:
    """Gives a module its own forward back; returns how many batch norms were fused in it."""
    count: int = module.__dict__.pop(_MARK, 0)
    if count:
        module.__dict__.pop("forward", None)
    return count


class _Proxy(torch.fx.Proxy):
    """A proxy that keeps ``a += b`` in place: torch.fx by itself makes it ``a = a + b``, which is another thing for
    whoever else holds a."""


def _record_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: torch.fx.Proxy, other: Any) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name, _function in _IN_PLACE.items():
    setattr(_Proxy, f"__{_name}__", _record_in_place(_function))


class _OwnForward(torch.fx.Tracer):
    """Every child is a leaf, and so are pydl's own functions."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, functional))  # type: ignore[arg-type]

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)


def _trace(module: torch.nn.Module) -> tuple[torch.fx.Graph, dict[str, Any]]:
    """The graph of a module's own forward, and the plain attributes that it read."""
    reads: dict[str, Any] = {}
    cls = type(module)

    class Watched(cls):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if not name.startswith("_") and name in object.__getattribute__(self, "__dict__"):
                reads[name] = value
            return value

    module.__class__ = Watched
    try:
        graph = _OwnForward().trace(module)
    finally:
        module.__class__ = cls
    return graph, reads


def _children(module: torch.nn.Module) -> list[str]:
    """The names of a module's children, without those that are None."""
    return [name for name, child in module._modules.items() if child is not None]


def _forward(
    original: Callable[..., Any], graph: torch.fx.Graph, reads: dict[str, Any], children: list[str]
) -> Callable[..., Any]:
    graph.lint()
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    fused = scope["forward"]

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _children(self) != children:
            return original(self, *args, **kwargs)
        for name, value in reads.items():
            now = self.__dict__.get(name)
            if now is not value and not (isinstance(value, _SIMPLE) and type(now) is type(value) and now == value):
                return original(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    return forward


def _child(module: torch.nn.Module, node: torch.fx.Node) -> torch.nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(module: torch.nn.Module, node: torch.fx.Node) -> bool:
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return False
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return type(_child(module, node)) in _RELUS


def _in_place_add(node: torch.fx.Node) -> bool:
    return node.target is _IN_PLACE["iadd"] or node.target == "add_"


def _residual(node: torch.fx.Node, norm: torch.fx.Node) -> torch.fx.Node | None:
    """The other operand, if a node adds it to the batch norm's result and changes nothing else."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(a, torch.fx.Node) for a in node.args):
        return None
    first, second = node.args
    adds = node.target in (_ADD_FUNCTIONS if node.op == "call_function" else ("add", "add_"))
    if node.op not in ("call_function", "call_method") or not adds or first is second:
        return None
    if _in_place_add(node) and first is not norm:  # the other operand would change for everyone
        return None
    return second if first is norm else first  # type: ignore[return-value]


def _may_wait(module: torch.nn.Module, norm: torch.fx.Node, last: torch.fx.Node) -> bool:
    """Whether the batch norm may run where ``last`` stands: nothing between them may change its input or itself."""
    own = _child(module, norm)
    source = norm.args[0]
    private = (
        isinstance(source, torch.fx.Node) and _only_user(source) is norm and type(_child(module, source)) in _FRESH
    )
    node = norm.next
    while node is not last:
        child = _child(module, node)
        shared = child is not None and any(m is own for m in child.modules())
        if not private or shared or (node.op == "get_attr" and str(node.target).startswith(f"{norm.target}.")):
            return False
        node = node.next
    return True


def _rewrite(module: torch.nn.Module, graph: torch.fx.Graph, norm: torch.fx.Node) -> bool:
    """Puts one call in the place of a batch norm, an addition if there is one, and relu."""
    if type(_child(module, norm)) not in _NORMS or len(norm.args) != 1 or norm.kwargs:
        return False
    if sum(_child(module, n) is _child(module, norm) for n in graph.nodes) != 1:
        return False
    add, residual = None, None
    relu = _only_user(norm)
    if relu is not None and not _is_relu(module, relu):
        residual = _residual(relu, norm)
        add, relu = relu, _only_user(relu)
        if residual is None or relu is None or add.next is not relu or not _is_relu(module, relu):
            return False
    if relu is None or not _may_wait(module, norm, add or relu):
        return False
    with graph.inserting_before(relu):
        own = graph.create_node("get_attr", norm.target)
        activation = graph.create_node("get_attr", relu.target) if relu.op == "call_module" else None
        in_place = add is not None and _in_place_add(add)
        fused = graph.call_function(norm_add_relu, (own, norm.args[0], residual, activation, in_place))
    relu.replace_all_uses_with(fused)
    for node in (relu, add, norm):
        if node is not None:
            graph.erase_node(node)
    return True


def _plain(module: torch.nn.Module) -> bool:
    """Whether calling the module is calling its class's forward."""
    own = module.__dict__
    hooked = any(own.get(name) for name in _HOOKS) or any(_GLOBAL_HOOKS)
    return not hooked and "forward" not in own and own.get("_compiled_call_impl") is None


def norm_add_relu(
    norm: torch.nn.Module, x: Tensor, residual: Tensor | None, relu: torch.nn.Module | None, in_place: bool
) -> Tensor:
    """relu(norm(x) + residual), in one call if that is sure to be the same; in_place: how the residual is added."""
    fits = residual is None or (
        isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype
    )
    known = type(norm) in _NORMS and _plain(norm) and (relu is None or (type(relu) in _RELUS and _plain(relu)))
    if known and fits and isinstance(x, Tensor):
        return normalise(norm, x, residual, "relu")
    y = norm(x)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    return torch.relu(y) if relu is None else relu(y)
