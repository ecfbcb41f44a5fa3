"""BatchNorm1d, 2d and 3d: torch's behaviour in every mode, tracing, copies, and a critic with second derivatives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pydl

CLASSES = {
    "BatchNorm1d": [(4, 5), (4, 5, 6)],
    "BatchNorm2d": [(4, 5, 3, 2)],
    "BatchNorm3d": [(3, 5, 2, 3, 2)],
}
MODES = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"track_running_stats": False, "affine": False},
]


def twins(name, **arguments):
    return getattr(pydl.nn, name)(5, **arguments), getattr(nn, name)(5, **arguments)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_training_then_evaluation_are_torch_s(name, arguments):
    ours, theirs = twins(name, **arguments)
    for shape in CLASSES[name]:
        for step in range(4):
            if step == 3:
                ours.eval(), theirs.eval()
            x = (2 + torch.randn(shape)).requires_grad_()
            y, expected = ours(x), theirs(x)
            torch.testing.assert_close(y, expected)
            for a, b in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
                assert a[0] == b[0]
                torch.testing.assert_close(a[1], b[1])
            dy = torch.randn(shape)
            for a, b in zip(*(torch.autograd.grad(t, x, dy) for t in (y, expected)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        ours.train(), theirs.train()


@pytest.mark.parametrize("name", CLASSES)
def test_errors_are_torchs(name):
    ours, theirs = twins(name)
    one = torch.randn([1, 5, *(1 for _ in CLASSES[name][-1][2:])])
    for x in (torch.randn(5), torch.randn(2, 5, 1, 1, 1, 1), one):
        with pytest.raises(ValueError):
            theirs(x)
        with pytest.raises(ValueError):
            ours(x)


def test_the_biased_running_variance_is_the_course_s():
    x = torch.randn(4, 5, 3)
    module = pydl.nn.BatchNorm1d(5, momentum=1.0, biased_running_var=True)
    module(x)
    torch.testing.assert_close(module.running_var, x.var((0, 2), correction=0))
    assert "biased_running_var" not in module.state_dict()
    twin = pickle.loads(pickle.dumps(module))
    assert twin.biased_running_var and copy.deepcopy(module).biased_running_var
    # after one step with momentum 1, evaluation of the same batch is training
    torch.testing.assert_close(module.eval()(x), pydl.ops.batch_norm(x, None, None, training=True))


def test_a_traced_module_asks_for_its_mode_when_the_graph_runs():
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    pydl.accelerate(model)
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1"]
    x = torch.randn(2, 1, 6, 6)
    for training in (True, False):
        graph.train(training), model.train(training)
        before = model[1].running_mean.clone()
        torch.testing.assert_close(graph(x), model(x))
        assert torch.equal(before, model[1].running_mean) is not training


def test_half_precision_models():
    # .half() turns everything, torch.autocast only the input
    for module in (nn.BatchNorm2d(5).bfloat16(), nn.BatchNorm2d(5)):
        x = torch.randn(4, 5, 3, 2).bfloat16()
        expected = copy.deepcopy(module)(x)
        pydl.accelerate(module)
        torch.testing.assert_close(module(x), expected, rtol=2e-2, atol=2e-2)


def test_wgan_gradient_penalty_equals_torch_s():
    """Gulrajani and others, 2017: second derivatives through batch norms; float64, so that only the formulas count."""

    def critic():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()

    def penalty_gradients(model):
        torch.manual_seed(1)
        x = torch.randn(5, 1, 8, 8, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    expected = penalty_gradients(critic())
    assert expected[0].abs().max() > 0
    for fuse in (False, True):
        model = critic()
        assert len(pydl.accelerate(model, fuse=fuse).replaced) == 4 + fuse
        torch.testing.assert_close(penalty_gradients(model), expected, rtol=1e-9, atol=1e-12)
