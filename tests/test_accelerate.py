"""accelerate and restore: what is replaced, what is left alone and why; and the drop-in modules themselves."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, weight_norm

import pydl

DROP_INS = [name for name in pydl.nn.__all__ if hasattr(nn, name)]
ARGUMENTS = {"LayerNorm": ((6, 4),), "LocalResponseNorm": (5,), "RMSNorm": ((6, 4),), "GroupNorm": (1, 5)}
ARGUMENTS |= {f"{kind}Norm{dims}d": (5,) for kind in ("Batch", "Instance") for dims in (1, 2, 3)} | {
    "SyncBatchNorm": (5,)
}
ARGUMENTS |= {f"{kind}Pool{dims}d": (3, 2, 1) for kind in ("Avg", "Max") for dims in (1, 2, 3)}
ARGUMENTS |= {f"Adaptive{kind}Pool{dims}d": (2,) for kind in ("Avg", "Max") for dims in (1, 2, 3)}
SHAPES = {f"{kind}Norm1d": (2, 5, 24) for kind in ("Batch", "Instance")}
SHAPES |= {f"{kind}Norm3d": (2, 5, 3, 2, 4) for kind in ("Batch", "Instance")}
ARGUMENTS |= {f"{kind}{dims}d": args for kind, args in (("LPPool", (2, 2)), ("MaxUnpool", (2,))) for dims in (1, 2, 3)}
SHAPES |= {f"{kind}Pool1d": (2, 5, 24) for kind in ("Avg", "Max", "AdaptiveAvg", "AdaptiveMax", "LP")}


def ctc_loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x [2, 5, 6, 4] as ten frames of six items and four classes."""
    targets = torch.tensor([[1, 2, 2]]).expand(6, 3)
    return module(x.flatten(0, 1).log_softmax(-1), targets, (10, 9, 8, 7, 10, 5), (3, 3, 2, 1, 0, 3))


def max_unpool(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a pooling by two found in x, as many dimensions as the module has."""
    dims = int(type(module).__name__[-2])
    x = x.flatten(2) if dims == 1 else x
    y, indices = getattr(nn.functional, f"max_pool{dims}d")(x, 2, return_indices=True)
    return module(y, indices)


# modules that take more than one tensor
CALLS = {"CTCLoss": ctc_loss, **{f"MaxUnpool{dims}d": max_unpool for dims in (1, 2, 3)}}


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 10),
    )


def reason(report: pydl.accelerate, name: str = "") -> str:
    (row,) = [row for row in report if row.name == name]
    assert not row.replaced
    return row.reason


def test_replaces_in_place_and_reports() -> None:
    model = lenet()
    before = {id(m): type(m) for m in model.modules()}
    parameters = [id(p) for p in model.parameters()]
    x = torch.randn(3, 1, 8, 8)
    expected = model(x)
    report = pydl.accelerate(model)
    assert {row.name: row.kind for row in report.replaced} == {"1": "ReLU", "2": "MaxPool2d", "4": "LayerNorm"}
    assert {row.name: row.kind for row in report.kept} == {"0": "Conv2d", "5": "Linear"}
    assert all("no pydl kernel" in row.reason for row in report.kept)
    assert len(report) == 5 and "MaxPool2d" in str(report)
    assert parameters == [id(p) for p in model.parameters()]
    torch.testing.assert_close(model(x), expected)
    with pydl.trace() as t:
        model(x)
    assert [r.op for r in t] == ["relu", "max_pool2d", "layer_norm"]
    undone = pydl.restore(model)
    assert [row.name for row in undone] == ["1", "2", "4"]
    assert {id(m): type(m) for m in model.modules()} == before
    with pydl.trace() as t:
        model(x)
    assert not len(t)


def test_a_second_accelerate_changes_nothing_and_restore_leaves_the_user_s_own_modules() -> None:
    model = nn.Sequential(pydl.nn.LayerNorm(4), nn.LayerNorm(4))
    pydl.accelerate(model)
    assert not pydl.accelerate(model).replaced
    pydl.restore(model)
    assert [type(m) for m in model] == [pydl.nn.LayerNorm, nn.LayerNorm]


def test_the_model_itself_may_be_the_module() -> None:
    model = nn.LayerNorm(4)
    assert pydl.accelerate(model).replaced[0].name == ""
    assert type(model) is pydl.nn.LayerNorm


def test_hooks_keep_working() -> None:
    model = lenet()
    seen = []
    model[4].register_forward_hook(lambda m, args, out: seen.append("forward"))
    model[4].register_full_backward_hook(lambda m, gin, gout: seen.append("backward"))
    model[4].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    x = torch.randn(2, 1, 8, 8)
    expected = model(x)
    pydl.accelerate(model)
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert seen == ["forward", "forward", "forward", "backward"]


def test_weight_ties_and_shared_modules_stay_tied() -> None:
    norm = nn.LayerNorm(4)
    twin = nn.LayerNorm(4)
    twin.weight = norm.weight
    model = nn.Sequential(norm, nn.Linear(4, 4), norm, twin)
    report = pydl.accelerate(model)
    assert len(report.replaced) == 2  # the shared module is one module
    assert model[0] is model[2] and model[3].weight is model[0].weight
    model(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_optimizer_made_before_still_trains() -> None:
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pydl.accelerate(model)
    before = model[4].weight.detach().clone()
    model(torch.randn(2, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[4].weight)


def test_subclasses_are_left_alone() -> None:
    class Mine(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    assert "a subclass of torch.nn.LayerNorm" in reason(pydl.accelerate(Mine(4)))


def test_a_forward_set_on_the_instance_is_left_alone() -> None:
    module = nn.ReLU()
    module.forward = lambda x: x
    assert "overridden" in reason(pydl.accelerate(module))


def test_parametrised_modules_are_left_alone() -> None:
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    module = nn.LayerNorm(4)
    parametrize.register_parametrization(module, "weight", Double())
    assert "parametrised" in reason(pydl.accelerate(module))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_style_reparametrisations_keep_working() -> None:
    # weight_norm and pruning recompute .weight in a pre-hook: replaced, and the hook still runs
    for wrap in (
        lambda m: weight_norm(m, dim=0) if m.weight.dim() > 1 else m,
        lambda m: prune.l1_unstructured(m, "weight", 2),
    ):
        module = nn.LayerNorm((4, 4))
        nn.init.normal_(module.weight)
        wrap(module)
        x = torch.randn(2, 4, 4)
        expected = module(x)
        assert pydl.accelerate(module).replaced
        torch.testing.assert_close(module(x), expected)
        module(x).sum().backward()


def test_compiled_scripted_and_traced_models_are_left_alone() -> None:
    compiled = torch.compile(lenet(), backend="eager")
    report = pydl.accelerate(compiled)
    assert not report.replaced and all("compiled" in row.reason for row in report)
    inplace = lenet()
    inplace.compile(backend="eager")
    assert not pydl.accelerate(inplace).replaced
    traced = torch.fx.symbolic_trace(lenet())
    assert not pydl.accelerate(nn.Sequential(traced)).replaced


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_left_alone() -> None:
    scripted = torch.jit.script(lenet())
    report = pydl.accelerate(scripted)
    assert not report.replaced and "scripted" in report.kept[0].reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_are_left_alone() -> None:
    model = torch.ao.nn.quantized.LeakyReLU(scale=0.1, zero_point=0)
    assert not pydl.accelerate(nn.Sequential(model)).replaced


def test_compile_after_accelerate() -> None:
    model = lenet()
    x = torch.randn(2, 1, 8, 8)
    expected = model(x)
    pydl.accelerate(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_after_accelerate_holds_torch_s_operators() -> None:
    model, x = lenet(), torch.randn(2, 1, 8, 8)
    expected = model(x)
    pydl.accelerate(model)
    # the parameters want gradients, as in any model that is traced without no_grad
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected)
    assert "aten::layer_norm" in str(traced.inlined_graph) and "pydl::" not in str(traced.inlined_graph)
    traced(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_symbolic_trace_after_accelerate() -> None:
    model, x = lenet(), torch.randn(2, 1, 8, 8)
    expected = model(x)
    pydl.accelerate(model)
    graph = torch.fx.symbolic_trace(model)
    with pydl.trace() as seen:
        torch.testing.assert_close(graph(x), expected)
    assert [record.op for record in seen] == ["relu", "max_pool2d", "layer_norm"]


def test_nested_tensors_go_to_torch() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    with pydl.trace() as seen:
        assert pydl.nn.GELU()(nested).is_nested
    assert seen[0].backend == "torch" and "nested" in seen[0].reason


def test_copies_and_pickles_can_be_restored() -> None:
    model = lenet()
    pydl.accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[4]) is pydl.nn.LayerNorm
        assert len(pydl.restore(twin)) == 3
        assert type(twin[4]) is nn.LayerNorm
    assert type(model[4]) is pydl.nn.LayerNorm


@pytest.mark.parametrize("function", [pydl.accelerate, pydl.restore])
def test_only_modules(function) -> None:
    with pytest.raises(TypeError, match="'model' must be a torch.nn.Module, got int"):
        function(3)


@pytest.mark.parametrize("name", DROP_INS)
class TestDropIn:
    def test_signature_repr_and_state_are_torch_s(self, name: str) -> None:
        ours, theirs = getattr(pydl.nn, name), getattr(nn, name)
        assert issubclass(ours, theirs)
        # more keywords than torch's may follow, which leave everything as it is
        given, expected = (list(inspect.signature(cls).parameters.values()) for cls in (ours, theirs))
        assert given[: len(expected)] == expected
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in given[len(expected) :])
        args = ARGUMENTS.get(name, ())
        a, b = ours(*args), theirs(*args)
        assert repr(a) == repr(b)
        b.load_state_dict(a.state_dict(), strict=True)
        a.load_state_dict(b.state_dict(), strict=True)

    def test_forward_and_gradients_are_torch_s(self, name: str) -> None:
        args = ARGUMENTS.get(name, ())
        ours, theirs = getattr(pydl.nn, name)(*args), getattr(nn, name)(*args)
        x = torch.randn(SHAPES.get(name, (2, 5, 6, 4)), requires_grad=True)
        call = CALLS.get(name, lambda module, x: module(x))
        torch.testing.assert_close(call(ours, x), call(theirs, x))
        call(ours, x).square().sum().backward()
        (expected,) = torch.autograd.grad(call(theirs, x).square().sum(), x)
        torch.testing.assert_close(x.grad, expected)
        assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("name", [n for n in pydl.functional.__all__])
def test_functional_signatures_start_with_torch_s(name: str) -> None:
    ours = list(inspect.signature(getattr(pydl.functional, name)).parameters.values())
    theirs = getattr(nn.functional, name)
    try:
        expected = list(inspect.signature(theirs).parameters.values())
    except ValueError:  # a builtin: no signature to compare
        pytest.skip(f"{name} has no Python signature in torch")
    if any(p.kind is p.VAR_POSITIONAL for p in expected):  # max pooling dispatches on return_indices
        expected = list(inspect.signature(getattr(nn.functional, f"_{name}")).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(expected)]] == [(p.name, p.default) for p in expected]


def test_wgan_gradient_penalty_equals_torch_s() -> None:
    """Second derivatives through an accelerated critic, in float64 so that only the formulas count."""

    def critic() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.LayerNorm((4, 4, 4)),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 1),
        ).double()

    def penalty_gradients(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(1)
        x = torch.randn(5, 1, 8, 8, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    expected = penalty_gradients(critic())
    model = critic()
    assert len(pydl.accelerate(model).replaced) == 3
    ours = penalty_gradients(model)
    assert expected[0].abs().max() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
