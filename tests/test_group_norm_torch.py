"""group_norm and instance_norm beside torch's: sample inputs, errors, modules, opcheck, compile, export, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _backends import available, backends_for
from _checks import check_autocast, check_compile, check_opcheck, check_same_error, ops_called
from _opinfo import samples

import pydl
from pydl import ops

OP, INSTANCE = "group_norm", "instance_norm"
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
LAST = torch.channels_last
NATIVE = [b for b in available(OP) if b.name != "torch"]


# torch's own sample inputs


@pytest.mark.parametrize("name", [OP, INSTANCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_torch_s_sample_inputs(name, dtype):
    count = 0
    for x, args, kwargs in samples(name, dtype):
        results = []
        # torch in float32 beside half precision: where it rounds in between is its affair
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        for op, kind in ((getattr(ops, name), dtype), (getattr(F, name), wide)):
            leaf = x.detach().to(kind, copy=True).requires_grad_()
            given = {k: v.detach().to(kind, copy=True) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            leaves = [leaf, *(given[k].requires_grad_() for k in ("weight", "bias") if given.get(k) is not None)]
            y = op(leaf, *args, **given)
            dy = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(kind)
            running = [given[k] for k in ("running_mean", "running_var") if given.get(k) is not None]
            results.append([y, *torch.autograd.grad(y, leaves, dy), *running])
        for ours, theirs in zip(*results, strict=True):
            close = {} if dtype.itemsize > 2 else dict(rtol=2e-2, atol=2e-2)
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs, equal_nan=True, check_dtype=False, **close)
        count += 1
    assert count >= 9


# errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(input=torch.zeros(4)), [OP, "input", "[4]"]),
        (dict(input=torch.zeros(1, 4), num_groups=4), [OP, "input", "[1, 4]"]),
        (dict(input=torch.zeros(1, 4), num_groups=3), [OP, "input", "[1, 4]"]),
        (dict(input=torch.ones(2, 4, 3, dtype=torch.long)), [OP, "input", "int64"]),
        (dict(input=torch.ones(2, 4, 3, dtype=torch.complex64)), [OP, "input", "complex64"]),
        (dict(num_groups=0), [OP, "num_groups", "0"]),
        (dict(num_groups=-2), [OP, "num_groups", "-2"]),
        (dict(num_groups=3), [OP, "num_groups", "3"]),
        (dict(num_groups=2.0), [OP, "num_groups", "2.0"]),
        (dict(num_groups=True), [OP, "num_groups", "True"]),
        (dict(num_groups="2"), [OP, "num_groups", "'2'"]),
        (dict(weight=torch.zeros(3)), [OP, "weight", "[4]", "[3]"]),
        (dict(weight=torch.zeros(1, 4)), [OP, "weight", "[1, 4]"]),
        (dict(bias=torch.zeros(5)), [OP, "bias", "[5]"]),
        (dict(weight=[1.0] * 4), [OP, "weight", "list"]),
        (dict(weight=torch.zeros(4).double()), [OP, "weight", "float64"]),
        (dict(weight=torch.zeros(4).half(), bias=torch.zeros(4).half()), [OP, "weight", "float16"]),
        (dict(weight=torch.zeros(4, device="meta")), [OP, "weight", "meta"]),
        (dict(input=torch.zeros(2, 4, 3).half(), weight=torch.zeros(4).half(), bias=torch.zeros(4)), [OP, "dtype"]),
        (dict(eps="a"), [OP, "eps", "'a'"]),
        (dict(eps=None), [OP, "eps", "None"]),
    ],
    ids=lambda v: ",".join(v),
)
def test_errors_are_torchs(arguments, says):
    check_same_error(
        ops.group_norm, F.group_norm, says=says, **{"input": torch.zeros(2, 4, 3), "num_groups": 2, **arguments}
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(input=torch.zeros(4)), [INSTANCE, "input", "[4]"]),
        (dict(input=torch.zeros(4, 3)), [INSTANCE, "input", "[4, 3]"]),
        (dict(input=torch.zeros(2, 4, 1, 1)), [INSTANCE, "input", "[2, 4, 1, 1]"]),
        (dict(input=torch.zeros(4), use_input_stats=False, running_mean=torch.zeros(4), running_var=torch.ones(4)), []),
        (dict(input=torch.ones(2, 4, 3, dtype=torch.long)), [INSTANCE, "input", "int64"]),
        (dict(use_input_stats=False), [INSTANCE, "running_mean"]),
        (dict(use_input_stats=False, running_mean=torch.zeros(4)), [INSTANCE, "running_var"]),
        (dict(running_mean=torch.zeros(4)), [INSTANCE, "running_var"]),
        (dict(running_var=torch.zeros(4)), [INSTANCE, "running_mean"]),
        (dict(running_mean=torch.zeros(3), running_var=torch.zeros(3)), [INSTANCE, "running_mean", "[3]"]),
        (dict(running_mean=torch.zeros(1, 4), running_var=torch.zeros(4)), [INSTANCE, "running_mean", "[1, 4]"]),
        (dict(running_mean=torch.zeros(4, requires_grad=True), running_var=torch.zeros(4)), ["derivative"]),
        (dict(weight=torch.zeros(3)), [INSTANCE, "weight", "[3]"]),
        (dict(weight=torch.zeros(4).double()), [INSTANCE, "weight", "float64"]),
        (dict(use_input_stats=1), [INSTANCE, "use_input_stats", "1"]),
        (dict(momentum=None), [INSTANCE, "momentum", "None"]),
        (dict(eps="a"), [INSTANCE, "eps", "'a'"]),
    ],
    ids=lambda v: ",".join(v),
)
def test_errors_of_instance_norm_are_torchs(arguments, says):
    check_same_error(ops.instance_norm, F.instance_norm, says=says, **{"input": torch.zeros(2, 4, 3), **arguments})


def test_what_only_pydl_has_to_refuse():
    with pytest.raises(TypeError, match=r"group_norm.*input.*list"):
        ops.group_norm([1.0], 2)
    with pytest.raises(TypeError, match=r"instance_norm.*input.*list"):
        ops.instance_norm([1.0])
    with pytest.raises(ValueError, match=r"group_norm.*activation.*'gelu'"):
        ops.group_norm(torch.zeros(2, 4, 3), 2, activation="gelu")


def test_arguments_as_torch_takes_them():
    x = torch.randn(2, 4, 3)
    for groups in (2, torch.tensor(2)):
        for eps in (1, 0, torch.tensor(0.5)):
            torch.testing.assert_close(ops.group_norm(x, groups, eps=eps), F.group_norm(x, 2, eps=float(eps)))
    assert ops.group_norm(torch.empty(2, 4, 3, dtype=torch.float16, device="meta"), 2).shape == (2, 4, 3)
    deep = torch.randn(2, 4, *[1] * 14, 3)  # 17 dimensions
    torch.testing.assert_close(ops.group_norm(deep, 2), F.group_norm(deep, 2))


@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_raw_operators_refuse_what_they_cannot_read(backend):
    raw = NAMESPACES[backend.name]
    x, v = torch.zeros(2, 4, 3, device=backend.device), torch.zeros(4, device=backend.device)
    s, every = torch.zeros(2, 2, device=backend.device), [True] * 3
    with backend.use():
        for call in (
            lambda: raw.group_norm_fwd(x, 0, None, None, 0, 1e-5),
            lambda: raw.group_norm_fwd(x, -2, None, None, 0, 1e-5),
            lambda: raw.group_norm_fwd(x, 3, None, None, 0, 1e-5),
            lambda: raw.group_norm_fwd(x, 2, None, None, 3, 1e-5),
            lambda: raw.group_norm_fwd(x.long(), 2, None, None, 0, 1e-5),
            lambda: raw.group_norm_fwd(x[0, 0], 1, None, None, 0, 1e-5),
            lambda: raw.group_norm_fwd(x, 2, v[:3], None, 0, 1e-5),
            lambda: raw.group_norm_fwd(x, 2, None, v.long(), 0, 1e-5),
            lambda: raw.group_norm_bwd(x[:1], x, s, s, None, None, 2, 0, 1e-5, every),
            lambda: raw.group_norm_bwd(x.double(), x, s, s, None, None, 2, 0, 1e-5, every),
            lambda: raw.group_norm_bwd(x, x, s[:1], s, None, None, 2, 0, 1e-5, every),
            lambda: raw.group_norm_bwd(x, x, s, s.double(), None, None, 2, 0, 1e-5, every),
            lambda: raw.group_norm_bwd(x, x, s, s, v[:2], None, 2, 0, 1e-5, every),
            lambda: raw.group_norm_bwd(x, x, s, s, None, None, 2, 7, 1e-5, every),
            lambda: raw.group_norm_bwd(x, x, s, s, None, None, 2, 0, 1e-5, [True]),
        ):
            with pytest.raises(RuntimeError):
                call()


# modules


def test_the_modules_are_drop_ins():
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.GroupNorm(2, 8),
        torch.nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    )
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    statistics = model[2].running_mean.clone(), model[2].running_var.clone()
    model[2].reset_running_stats()
    report = pydl.accelerate(model)
    assert [row.kind for row in report.replaced] == ["GroupNorm", "InstanceNorm2d"]
    with pydl.trace() as trace:
        torch.testing.assert_close(model(x), expected)
    assert [(r.op, r.backend) for r in trace if r.op in (OP, INSTANCE)] == [(OP, "cpu"), (INSTANCE, "cpu")]
    torch.testing.assert_close((model[2].running_mean, model[2].running_var), statistics)
    model.eval()
    ours = model(x)
    pydl.restore(model)
    assert type(model[1]) is torch.nn.GroupNorm and type(model[2]) is torch.nn.InstanceNorm2d
    torch.testing.assert_close(ours, model(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("tracked", [False, True])
def test_instance_modules_take_what_torchs_take(dims, tracked):
    name = f"InstanceNorm{dims}d"
    ours, theirs = (getattr(m, name)(4, affine=True, track_running_stats=tracked) for m in (pydl.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    for training in (True, False):
        for batch in ((3,), ()):
            x = torch.randn(*batch, 4, *[5] * dims)
            torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))
    assert repr(ours) == repr(theirs)
    for bad in (torch.randn(2, 3, *[5] * dims), torch.randn(2)):
        check_same_error(ours, theirs, bad)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(ours))
    torch.testing.assert_close(traced(torch.ones(2, 4, *[5] * dims)), ours(torch.ones(2, 4, *[5] * dims)))


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in NATIVE if b.device == "cpu"], ids=str)
@pytest.mark.parametrize("activation", [0, 2])
def test_opcheck(backend, activation):
    raw = NAMESPACES[backend.name]
    with backend.use():
        for memory_format in (torch.contiguous_format, LAST):
            x = torch.randn(2, 4, 3, 3).contiguous(memory_format=memory_format).requires_grad_()
            weight, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
            check_opcheck(raw.group_norm_fwd.default, x, 2, weight, bias, activation, 1e-5)
            dy, (mean, var) = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(2, 2, 2)
            arguments = (dy, x, mean, var, weight, bias if activation else None, 2, activation, 1e-5)
            check_opcheck(raw.group_norm_bwd.default, *arguments, [True, False, True])


@pytest.mark.compile
def test_compile():
    def group(x, weight, bias):
        return ops.group_norm(x, 2, weight, bias, activation="silu") * 2

    def instance(x, weight, bias):
        return ops.instance_norm(x, None, None, weight, bias) * 2

    for fn in (group, instance):
        for memory_format in (torch.contiguous_format, LAST):
            shapes = [(2, 4, 8, 8), (3, 4, 5, 6)]
            given = [torch.randn(s).contiguous(memory_format=memory_format) for s in shapes]
            check_compile(fn, [[x, torch.randn(4), torch.randn(4)] for x in given])


@pytest.mark.compile
def test_export():
    model = torch.nn.Sequential(pydl.nn.GroupNorm(2, 4), pydl.nn.InstanceNorm2d(4, affine=True))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (torch.randn(3, 4, 5, 6),), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "pydl.group_norm_fwd.default" in targets
    x = torch.randn(7, 4, 5, 6)
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.compile
def test_compile_updates_running_statistics():
    def fn(x, mean, var):
        return ops.instance_norm(x, mean, var)

    x = torch.randn(3, 4, 5)
    results = []
    for f in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
        mean, var = torch.zeros(4), torch.ones(4)
        results.append((f(x, mean, var), mean, var))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_autocast(backend):
    x, weight, bias = (torch.randn(s, device=backend.device) for s in ((2, 4, 5), 4, 4))
    for given in (x, x.bfloat16()):
        check_autocast(backend, F.group_norm, given, 2, weight, bias, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_operators_that_a_call_needs(backend):
    x = torch.randn(2, 4, 3, device=backend.device)
    mean, var = torch.zeros(4, device=backend.device), torch.ones(4, device=backend.device)
    with ops_called() as called:
        backend(x, 2, activation="silu")
    assert called.pydl() == ["group_norm_fwd"]
    with backend.use(), ops_called() as called:
        ops.instance_norm(x, mean, var)
        ops.instance_norm(x, mean, var, use_input_stats=False)
    assert called.pydl() == ["group_norm_fwd", "batch_norm_update", "batch_norm_eval"]
