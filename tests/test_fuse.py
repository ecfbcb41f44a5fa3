"""accelerate(fuse=True): what becomes one call, what does not and why, and that nothing changes but the time."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydl


class Block(nn.Module):
    """The basic block of a residual network."""

    def __init__(self, downsample: bool = False, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=inplace)
        self.add = operator.iadd if inplace else operator.add
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if downsample else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        return self.relu(self.add(out, identity))


def ops_of(model, x):
    """What a call runs; a copy is called, since a training step moves the running statistics."""
    model = copy.deepcopy(model)
    with pydl.trace() as seen:
        model(x)
    return [r.op for r in seen if r.phase == "forward"]


def check_same(model, plain, shape=(3, 4, 6, 6), steps=3, backward=True):
    """Outputs, gradients and buffers of a training, an evaluation and another training step are the plain model's.

    In float64: the gradient of a bias before a batch norm is zero but for rounding.
    """
    model.double(), plain.double()
    for step in range(steps):
        for m in (model, plain):
            m.train(step != 1)
            m.zero_grad()
        x = torch.randn(shape, dtype=torch.float64)
        results = []
        for m in (model, plain):
            leaf = x.clone().requires_grad_()
            y = m(leaf * 1)
            if backward:
                (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
            gradients = [t.grad for t in (leaf, *m.parameters()) if backward]
            results.append([y, *gradients, *m.buffers()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def accelerated(model):
    """(accelerated copy, plain copy, report)."""
    plain = copy.deepcopy(model)
    return model, plain, pydl.accelerate(model, fuse=True)


@pytest.mark.parametrize("downsample", [False, True])
def test_a_residual_block(downsample):
    model, plain, report = accelerated(Block(downsample))
    (row,) = [row for row in report.replaced if row.name == ""]
    assert row.reason.startswith("2 x batch norm")
    names = ops_of(model, torch.randn(3, 4, 6, 6))
    assert names.count("batch_norm_act") == 2 and "relu" not in names
    check_same(copy.deepcopy(model), plain)
    rows = pydl.restore(model)
    assert "its own forward again" in {row.reason for row in rows} and "forward" not in model.__dict__
    assert ops_of(model, torch.randn(3, 4, 6, 6)) == []


def test_without_being_asked_nothing_is_fused():
    model = Block()
    pydl.accelerate(model)
    assert "forward" not in model.__dict__ and "batch_norm_act" not in ops_of(model, torch.randn(3, 4, 6, 6))


def test_a_sequential_in_a_network_and_the_state_it_keeps():
    stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(stem, Block(), Block(True), nn.Flatten(), nn.Linear(144, 3), nn.BatchNorm1d(3))
    state = list(model.state_dict())
    model, plain, report = accelerated(model)
    assert {row.name for row in report.replaced if "x batch norm" in row.reason} == {"0", "1", "2"}
    assert list(model.state_dict()) == state
    check_same(model, plain, (3, 1, 6, 6))


class Forms(nn.Module):
    """BN -> (add) -> relu in one of the forms that people write."""

    def __init__(self, form):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.form = form

    def forward(self, x):
        return self.form(self, x)


FUSED = {
    "module": lambda m, x: m.act(m.bn(x)),
    "F.relu": lambda m, x: F.relu(m.bn(x)),
    "F.relu in place": lambda m, x: F.relu(m.bn(x), inplace=True),
    "torch.relu": lambda m, x: torch.relu(m.bn(x)),
    "method": lambda m, x: m.bn(x).relu(),
    "method in place": lambda m, x: m.bn(x).relu_(),
    "add": lambda m, x: m.act(m.bn(x) + x),
    "add on the left": lambda m, x: m.act(x + m.bn(x)),
    "torch.add": lambda m, x: F.relu(torch.add(m.bn(x), x)),
    "add_": lambda m, x: F.relu(m.bn(x).add_(x)),
    "iadd": lambda m, x: F.relu(operator.iadd(m.bn(x), x)),
    "pydl's relu": lambda m, x: pydl.functional.relu(m.bn(x)),
    "used twice behind": lambda m, x: (lambda y: y * y)(F.relu(m.bn(x))),
}
KEPT = {
    "the batch norm has another user": lambda m, x: (lambda y: F.relu(y) + y)(m.bn(x)),
    "the sum has another user": lambda m, x: (lambda y: F.relu(y) * y)(m.bn(x) + x),
    "no relu": lambda m, x: m.bn(x) + x,
    "another activation": lambda m, x: torch.sigmoid(m.bn(x)),
    "a number is added": lambda m, x: F.relu(m.bn(x) + 1),
    "added with a factor": lambda m, x: F.relu(torch.add(m.bn(x), x, alpha=2)),
    "added to itself": lambda m, x: (lambda y: F.relu(y + y))(m.bn(x)),
    "the other operand changes in place": lambda m, x: F.relu(operator.iadd(x * 1, m.bn(x))),
    "subtraction": lambda m, x: F.relu(m.bn(x) - x),
    "the module runs twice": lambda m, x: F.relu(m.bn(F.relu(m.bn(x)))),
    "its input changes meanwhile": lambda m, x: (lambda z: F.relu(m.bn(z) + z.mul_(2)))(x * 1),
}


@pytest.mark.parametrize("name", FUSED)
def test_forms_that_are_fused(name):
    model, plain, report = accelerated(Forms(FUSED[name]))
    assert any("1 x batch norm" in row.reason for row in report.replaced), str(report)
    assert "batch_norm_act" in ops_of(model, torch.randn(3, 4, 6, 6))
    check_same(model, plain)


@pytest.mark.parametrize("name", KEPT)
def test_forms_that_are_left_alone(name):
    model, plain, _ = accelerated(Forms(KEPT[name]))
    assert "batch_norm_act" not in ops_of(model, torch.randn(3, 4, 6, 6))
    # autograd refuses to go back through an input that changed
    check_same(model, plain, backward=name != "its input changes meanwhile")


def test_changes_in_place_stay_in_place():
    # torch.fx alone would trace z += y as z = z + y, and the other name for z would miss it
    class Aliased(Forms):
        def forward(self, x):
            z = x * 1
            alias = z
            rows = all_rows = x.size(0)
            y = self.act(self.bn(x))
            z += y
            rows += 1
            return z * alias * (rows - all_rows)

    model, plain, report = accelerated(Aliased(None))
    assert any("1 x batch norm" in row.reason for row in report.replaced)
    with torch.no_grad():
        check_same(model, plain, backward=False)


# what is asked on every call


def block():
    model = Block(inplace=False)  # torch refuses backward hooks of what is changed in place
    pydl.accelerate(model, fuse=True)
    return model, torch.randn(3, 4, 6, 6)


@pytest.mark.parametrize("child", ["bn2", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_see_what_they_saw(child, kind):
    model, x = block()
    seen = []
    module = getattr(model, child)
    handle = getattr(module, f"register_{kind}_hook")(lambda *args: seen.append(args[1]))
    model(x.requires_grad_()).sum().backward()
    assert seen
    handle.remove()
    assert ops_of(model, x).count("batch_norm_act") == 2


def test_global_hooks_see_what_they_saw():
    model, x = block()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    model(x)
    handle.remove()
    assert model.bn1 in seen and model.relu in seen


def test_children_that_are_exchanged_are_used():
    model, x = block()
    model.bn2 = nn.Identity()
    plain = Block()
    plain.bn2 = nn.Identity()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x))


def test_children_that_come_and_go_are_noticed():
    model, x = block()
    plain = Block()
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        m.downsample = nn.Conv2d(4, 4, 1)
    plain.load_state_dict(model.state_dict())
    check_same(model, plain)
    model.downsample = plain.downsample = None
    check_same(model, plain)


def test_another_shape_of_the_residual_is_broadcast_as_before():
    class Broadcast(Forms):
        def forward(self, x):
            return self.act(self.bn(x) + x.mean((2, 3), keepdim=True))

    model, plain, report = accelerated(Broadcast(None))
    assert "batch_norm_act" not in ops_of(model, torch.randn(3, 4, 6, 6))
    check_same(model, plain)


@pytest.mark.parametrize("add", [operator.add, operator.iadd], ids=["add", "iadd"])
def test_another_dtype_of_the_residual_is_promoted_as_before(add):
    # a block under autocast: its convolutions give bfloat16, what goes round them is float32
    model, plain, report = accelerated(Forms(lambda m, x: m.act(add(m.bn(x.bfloat16()), x))))
    assert any("1 x batch norm" in row.reason for row in report.replaced)
    x = torch.randn(3, 4, 6, 6)
    y, expected = model(x), plain(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_an_attribute_that_a_branch_read_is_noticed():
    class Switch(Forms):
        def __init__(self):
            super().__init__(None)
            self.scale = 1.0

        def forward(self, x):
            y = self.act(self.bn(x))
            if self.training:
                y = y * 2
            return y * self.scale

    model, plain, report = accelerated(Switch())
    assert any("1 x batch norm" in row.reason for row in report.replaced)
    check_same(model, plain)
    model.scale = plain.scale = 3.0
    check_same(model, plain)


def test_what_cannot_be_traced_says_so():
    class Data(Forms):
        def forward(self, x):
            return self.act(self.bn(x)) if x.sum() > 0 else x

    class Optional(Forms):
        def forward(self, x, skip=None):
            return self.act(self.bn(x)) if skip is None else skip

    for cls, reason in ((Data, "cannot be traced"), (Optional, "optional arguments")):
        model, plain, report = accelerated(cls(None))
        assert any(reason in row.reason for row in report.kept), str(report)
        check_same(model, plain)


def test_copies_stay_fused_and_pickles_are_right():
    model, x = block()
    model.eval()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert twin.forward.__self__ is twin and ops_of(twin, x).count("batch_norm_act") == 2
    twin.bn1.weight.data.zero_()
    assert torch.equal(model(x), expected)  # the copy has children of its own
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(x), expected)
    assert pydl.restore(loaded) and pydl.restore(twin)
    torch.testing.assert_close(loaded(x), expected)


def test_a_second_accelerate_changes_nothing():
    model, x = block()
    forward = model.forward
    assert not pydl.accelerate(model, fuse=True).replaced
    assert model.forward == forward


def test_fused_models_compile_and_trace():
    model, x = block()
    model.eval()
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_fuse_must_be_a_bool():
    with pytest.raises(TypeError, match="'fuse' must be a bool, got 1"):
        pydl.accelerate(nn.ReLU(), fuse=1)
