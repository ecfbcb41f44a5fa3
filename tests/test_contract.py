"""The op contract on a toy operator y = s * w * x^3 with known derivatives: all the ways in which torch calls an op."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import timeit
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pydl
from pydl.backend import Decision, Family, choose
from pydl.ops._contract import Op

SCALE = 0.5
_NEEDED: list[tuple[bool, ...]] = []


def _fwd_setup(ctx, inputs, outputs):
    x, w, s = inputs
    ctx.save_for_backward(x, w)
    ctx.s = s


def _fwd_backward(ctx, dy):
    x, w = ctx.saved_tensors
    if dy is None:
        return None, None, None
    _NEEDED.append(tuple(ctx.needs_input_grad[:3]))
    dx, dw = _BWD(ctx.decision, dy, x, w, ctx.s)
    return dx, dw if w is not None else None, None


def _bwd_setup(ctx, inputs, outputs):
    dy, x, w, s = inputs
    ctx.save_for_backward(dy, x, w)
    ctx.s = s


def _bwd_backward(ctx, v, u):
    # dx = 3 s w x^2 dy, dw = s x^3 dy
    dy, x, w = ctx.saved_tensors
    w_ = torch.ones_like(x) if w is None else w
    v = torch.zeros_like(x) if v is None else v
    u = torch.zeros_like(x) if u is None or w is None else u
    ddy = ctx.s * (3 * w_ * x**2 * v + x**3 * u)
    ddx = ctx.s * (6 * w_ * x * dy * v + 3 * x**2 * dy * u)
    ddw = None if w is None else ctx.s * 3 * x**2 * dy * v
    return ddy, ddx, ddw, None


def _fwd_fake(x, w, s):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _bwd_fake(dy, x, w, s):
    return x.new_empty(x.shape), x.new_empty(x.shape if w is not None else (0,))


_FWD = Op(
    "toy_fwd",
    "(Tensor x, Tensor? w, float s) -> (Tensor, Tensor)",
    fake=_fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
    hidden=1,
)
_BWD = Op(
    "toy_bwd",
    "(Tensor dy, Tensor x, Tensor? w, float s) -> (Tensor, Tensor)",
    fake=_bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)


def _toy_fwd_cpu(x, w, s):
    y = x.new_empty(x.shape)
    y.copy_(s * x**3 * (1 if w is None else w))
    return y, x.clone(memory_format=torch.contiguous_format)


def _toy_bwd_cpu(dy, x, w, s):
    dx = (3 * s * x**2 * dy * (1 if w is None else w)).contiguous()
    return dx, x.new_empty((0,)) if w is None else (s * x**3 * dy).contiguous()


torch.library.impl("pydl::toy_fwd", "CPU")(_toy_fwd_cpu)
torch.library.impl("pydl::toy_bwd", "CPU")(_toy_bwd_cpu)

_FAMILY = Family(
    "toy", ops=("toy_fwd", "toy_bwd"), order={"cpu": ("cpu",)}, dtypes={"cpu": (torch.float32, torch.float64)}
)


def toy(x: Tensor, w: Tensor | None = None, s: float = SCALE) -> Tensor:
    decision = choose(_FAMILY, x)
    if decision.backend == "torch":
        return s * x**3 * (1 if w is None else w)
    return _FWD(decision, x, w, s)


def formula(x: Tensor, w: Tensor | None = None, s: float = SCALE) -> Tensor:
    return s * x**3 * (1 if w is None else w)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return toy(x, self.w.expand(x.shape).contiguous()).sum()


def pair(*shape: int, grad: bool = True) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(*shape, dtype=torch.float64, requires_grad=grad),
        torch.randn(*shape, dtype=torch.float64, requires_grad=grad),
    )


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def test_eager_values_and_gradients() -> None:
    x, w = pair(3, 5)
    with pydl.trace() as t:
        torch.testing.assert_close(toy(x, w), formula(x, w))
    assert t[0].backend == "cpu", "the toy must run on its own kernel, or nothing below tests the contract"
    ours = torch.autograd.grad(toy(x, w).sum(), (x, w))
    theirs = torch.autograd.grad(formula(x, w).sum(), (x, w))
    torch.testing.assert_close(ours, theirs)
    assert not toy(x.detach(), w.detach()).requires_grad
    with torch.no_grad():
        assert not toy(x, w).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(toy(x, w), formula(x, w))


@pytest.mark.parametrize("call", ["public", "operator", "compiled", "transformed"])
def test_formulas_see_which_gradients_are_needed(call: str) -> None:
    """On every way into an op ``ctx.needs_input_grad`` counts the schema's arguments from zero."""
    x, w = torch.randn(3), torch.randn(3, requires_grad=True)
    _NEEDED.clear()
    if call == "transformed":
        torch.func.grad(lambda v: toy(x, v).sum())(w.detach())
    elif call == "operator":
        torch.ops.pydl.toy_fwd(x, w, SCALE)[0].sum().backward()
    else:
        function = torch.compile(toy, backend="aot_eager") if call == "compiled" else toy
        function(x, w).sum().backward()
    assert _NEEDED == [(False, True, False)]


@pytest.mark.parametrize("with_weight", [True, False])
def test_gradcheck_and_gradgradcheck(with_weight: bool) -> None:
    x, w = pair(2, 3)
    args = (x, w) if with_weight else (x, None)
    assert torch.autograd.gradcheck(toy, args)
    assert torch.autograd.gradgradcheck(toy, args)


def test_third_derivative() -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    (g1,) = torch.autograd.grad(toy(x).sum(), x, create_graph=True)
    (g2,) = torch.autograd.grad(g1.sum(), x, create_graph=True)
    (g3,) = torch.autograd.grad(g2.sum(), x)
    torch.testing.assert_close(g3, torch.full_like(x, 6 * SCALE).detach())


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph_with_a_second_shape(compiler: str) -> None:
    compiled = torch.compile(toy, fullgraph=True, backend=compiler)
    for shape in ((3, 5), (7, 2), (4, 6)):
        x, w = pair(*shape)
        torch.testing.assert_close(compiled(x, w), formula(x, w))
        ours = torch.autograd.grad(compiled(x, w).sum(), (x, w))
        torch.testing.assert_close(ours, torch.autograd.grad(formula(x, w).sum(), (x, w)))


def test_compile_obeys_a_forced_backend_and_recompiles() -> None:
    compiled = torch.compile(toy, fullgraph=True, backend="eager")
    x = torch.randn(3)
    with pydl.trace() as native:
        compiled(x)
    with pydl.trace() as forced, pydl.backend("torch"):
        compiled(x)
    assert [r.backend for r in native] == ["cpu"]
    assert [r.backend for r in forced] == ["torch"]


def test_double_backward_under_compile_is_torch_s_own_error() -> None:
    compiled = torch.compile(toy, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (g,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
        torch.autograd.grad(g.sum(), x)


@pytest.mark.parametrize("strict", [True, False])
def test_export_then_train(strict: bool) -> None:
    net = Net()
    x = torch.randn(3, 5)
    exported = torch.export.export(net, (x,), strict=strict).module()
    exported(x).backward()
    (expected,) = torch.autograd.grad(formula(x, net.w.expand(3, 5)).sum(), net.w)
    torch.testing.assert_close(dict(exported.named_parameters())["w"].grad, expected)


def test_func_grad_twice_and_per_sample_gradients() -> None:
    x = torch.randn(6, dtype=torch.float64)
    first = torch.func.grad(lambda t: toy(t).sum())
    second = torch.func.grad(lambda t: first(t).sum())
    torch.testing.assert_close(first(x), 3 * SCALE * x**2)
    torch.testing.assert_close(second(x), 6 * SCALE * x)
    with pydl.trace() as t:
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(toy))(x), 3 * SCALE * x**2)
    assert "vmap" in t[0].reason
    w = torch.randn(6, dtype=torch.float64)
    jacobian = torch.func.jacrev(toy, argnums=1)(x, w)
    torch.testing.assert_close(jacobian, torch.diag(SCALE * x**3))


def test_compile_of_func_grad_is_an_error_not_a_zero() -> None:
    compiled = torch.compile(torch.func.grad(lambda t: toy(t).sum()), backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="toy_fwd"):
        compiled(torch.randn(4))


def test_forward_mode_goes_to_torch_and_says_so() -> None:
    x, v = pair(3, grad=False)
    with pydl.trace() as t:
        _, tangent = torch.func.jvp(toy, (x,), (v,))
    torch.testing.assert_close(tangent, 3 * SCALE * x**2 * v)
    assert t[0].backend == "torch" and "forward-mode" in t[0].reason


def test_the_raw_operator_is_differentiable_by_itself() -> None:
    x, w = pair(4)
    ours = torch.autograd.grad(torch.ops.pydl.toy_fwd(x, w, SCALE)[0].sum(), (x, w))
    torch.testing.assert_close(ours, torch.autograd.grad(formula(x, w).sum(), (x, w)))
    assert torch.autograd.gradgradcheck(lambda a, b: torch.ops.pydl.toy_fwd(a, b, SCALE)[0], (x, w))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(grad: bool, permuted: bool) -> None:
    x, w = pair(4, 3)
    if permuted:
        x, w = (t.detach().t().contiguous().t() for t in (x, w))
    x, w = (t.detach().requires_grad_(grad) for t in (x, w))
    torch.library.opcheck(torch.ops.pydl.toy_fwd.default, (x, w, SCALE))
    torch.library.opcheck(torch.ops.pydl.toy_bwd.default, (x, x, w, SCALE))
    torch.library.opcheck(torch.ops.pydl.toy_fwd.default, (x, None, SCALE))


def test_opcheck_fails_for_a_lying_fake() -> None:
    op = Op("toy_liar", "(Tensor x) -> Tensor", fake=lambda x: x.new_empty(x.shape[0]))
    torch.library.impl("pydl::toy_liar", "CPU")(lambda x: x.new_zeros(x.shape[0] + 1))
    assert op(Decision("toy", "cpu", ""), torch.ones(2)).shape == (3,)
    with pytest.raises(torch.testing._internal.optests.OpCheckError):
        torch.library.opcheck(torch.ops.pydl.toy_liar.default, (torch.ones(2),))


def test_autocast_leaves_the_gradient_dtype_alone() -> None:
    x = torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = toy(x)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_hidden_outputs_take_no_part_in_autograd() -> None:
    x = torch.randn(3, requires_grad=True)
    assert isinstance(_FWD(Decision("toy", "cpu", ""), x, None, SCALE), Tensor)
    y, aside = torch.ops.pydl.toy_fwd(x, None, SCALE)
    assert y.requires_grad and not aside.requires_grad


def test_undefined_gradients_arrive_as_none() -> None:
    # a gradient of the backward that is wanted for one of its two results only: the other one's cotangent is None
    x, w = pair(3)
    dx, _ = torch.autograd.grad(toy(x, w).sum(), (x, w), create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(second, 6 * SCALE * (w * x).detach())


def test_functional_tensors_and_fake_mode() -> None:
    with FakeTensorMode(), pydl.trace() as t:
        assert toy(torch.empty(3, 4)).shape == (3, 4)
        # a fake CUDA tensor takes the GPU's kernel, so that a GPU model can be traced on a machine without one
        pydl.functional.layer_norm(torch.empty(3, 4, device="cuda"), (4,))
    assert [r.backend for r in t] == ["cpu", "triton"]


class TestTrace:
    def test_records_forward_and_backward_of_another_thread(self) -> None:
        x = torch.randn(3, requires_grad=True)
        y = toy(x)
        with pydl.trace() as t:
            worker = threading.Thread(target=lambda: y.sum().backward())
            worker.start()
            worker.join()
        assert [(r.op, r.backend, r.phase) for r in t] == [("toy", "cpu", "backward")]

    def test_nested_traces_and_nothing_after_the_block(self) -> None:
        x = torch.randn(3)
        with pydl.trace() as outer:
            toy(x)
            with pydl.trace() as inner:
                toy(x)
        toy(x)
        assert (len(outer), len(inner)) == (2, 1)
        assert "best kernel" in str(outer) and str(outer).splitlines()[1].split()[:4] == ["toy", "forward", "cpu", "2"]

    def test_the_decision_of_the_forward_is_kept_for_its_backward(self) -> None:
        x = torch.randn(3, requires_grad=True)
        y = toy(x)
        with pydl.backend("torch"), pydl.trace() as t:
            y.sum().backward()
        assert [r.backend for r in t] == ["cpu"]


class TestChoice:
    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match="'tpu'"):
            pydl.backend("tpu")

    @pytest.mark.parametrize(("name", "why"), [("cuda", "CUDA tensor"), ("triton", "no triton kernel|GPU tensor")])
    def test_forced_backend_that_cannot_run(self, name: str, why: str) -> None:
        with pydl.backend(name), pytest.raises(RuntimeError, match=f"toy: backend '{name}' is forced.*({why})"):
            toy(torch.randn(2))
        toy(torch.randn(2))

    def test_dtype_without_a_kernel_goes_to_torch(self) -> None:
        with pydl.trace() as t:
            assert toy(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert t[0].backend == "torch" and "torch.bfloat16" in t[0].reason

    @pytest.mark.parametrize("device", ["meta", "xpu", "mps"])
    def test_other_devices_go_to_torch(self, device: str) -> None:
        with FakeTensorMode(), pydl.trace() as t:
            assert toy(torch.ones(2, device=device)).device.type == device
        assert t[0].backend == "torch" and repr(device) in t[0].reason

    def test_sparse_tensors_go_to_torch(self) -> None:
        with pydl.trace() as t:
            toy(torch.eye(2).to_sparse_coo())
        assert t[0].backend == "torch" and "torch.sparse_coo" in t[0].reason

    def test_subclasses_go_to_torch_and_keep_their_type(self) -> None:
        class Tagged(Tensor):
            pass

        x = torch.ones(2).as_subclass(Tagged)
        with pydl.trace() as t:
            assert type(toy(x)) is Tagged
        assert "Tagged" in t[0].reason


def _run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


_CALL = "import torch, pydl\nwith pydl.trace() as t: pydl.functional.layer_norm(torch.randn(2, 4), (4,))\nprint(t)"


@pytest.mark.parametrize("value", ["relu,layer_norm", "all"])
def test_environment_disables_ops(value: str) -> None:
    done = _run(_CALL, PYDL_DISABLE=value)
    assert "disabled by PYDL_DISABLE" in done.stdout, done.stderr


def test_environment_names_an_op_that_does_not_exist() -> None:
    done = _run("import pydl", PYDL_DISABLE="max_pool")
    assert done.returncode == 0 and "PYDL_DISABLE names no op of pydl: max_pool (ops: " in done.stderr


def test_environment_strict_raises_on_a_fallback() -> None:
    done = _run(_CALL, PYDL_DISABLE="all", PYDL_STRICT="1")
    assert "RuntimeError: layer_norm: PYDL_STRICT=1" in done.stderr


def test_environment_log_names_op_backend_and_reason_once() -> None:
    done = _run(_CALL + "\npydl.functional.layer_norm(torch.randn(2, 4), (4,))", PYDL_LOG="1", PYDL_DISABLE="all")
    assert done.stderr.count("pydl: layer_norm -> torch (disabled by PYDL_DISABLE)") == 1


def test_cost_of_a_call() -> None:
    """Cheaper than torch's own registered autograd on the same operator, with a gradient and without."""
    x, g = torch.randn(8), torch.randn(8, requires_grad=True)
    raw = torch.ops.pydl.toy_fwd.default
    calls = {
        "ours": lambda: toy(x),
        "ours, gradient": lambda: toy(g),
        "registered": lambda: raw(x, None, SCALE),
        "registered, gradient": lambda: raw(g, None, SCALE),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(40):  # interleaved, and the best of many: a loaded machine slows all alike
        for name, call in calls.items():
            best[name] = min(best[name], timeit.timeit(call, number=25) / 25 * 1e6)
    # without a gradient the two differ by the guard alone, a tenth covers what noise the best of many leaves
    assert best["ours"] < 1.1 * best["registered"], best
    assert best["ours, gradient"] < best["registered, gradient"], best


def test_a_call_that_torch_does_best_is_no_fallback():
    """A reason given for one call alone: recorded, not cached for the next, and a forced backend runs all the same."""
    from pydl.backend import choose, families

    family, x = families()["layer_norm"], torch.randn(2, 8)
    decision = choose(family, x, best="measured: torch is faster here")
    assert (decision.backend, decision.reason, decision.fallback) == ("torch", "measured: torch is faster here", False)
    assert choose(family, x).backend == "cpu"
    with pydl.backend("cpu"):
        assert choose(family, x, best="measured").backend == "cpu"
    assert choose(family, x, declined="no kernel takes it", best="measured").fallback
