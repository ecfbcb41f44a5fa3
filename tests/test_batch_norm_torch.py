"""batch_norm in torch's machinery: its own sample inputs, opcheck, compile, export, autocast, torch.func."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from _backends import available, backends_for
from _checks import check_autocast, check_compile, check_opcheck
from _opinfo import internal

import pydl
from pydl import ops
from pydl.ops.batch_norm import torch_batch_norm_act

OP, ACT = "batch_norm", "batch_norm_act"
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
LAST, LAST3D = torch.channels_last, torch.channels_last_3d
NATIVE = [b for b in available(OP) if b.name != "torch"]


def buffers(channels, **kind):
    return torch.zeros(channels, **kind), torch.ones(channels, **kind)


# torch's own sample inputs


@pytest.fixture(scope="module")
def torch_databases():
    """torch's op_db and module_db."""
    return internal("common_methods_invocations").op_db, internal("common_modules").module_db


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_torch_s_sample_inputs(torch_databases, dtype):
    (info,) = (o for o in torch_databases[0] if o.name == "nn.functional.batch_norm" and not o.variant_test_name)
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        results = []
        for op in (ops.batch_norm, F.batch_norm):
            x = sample.input.detach().clone().requires_grad_()
            args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in sample.args]
            parameters = [a.requires_grad_() for a in args[2:] if isinstance(a, torch.Tensor)]
            y = op(x, *args, **sample.kwargs)
            dy = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype)
            gradients = torch.autograd.grad(y, [x, *parameters], dy)
            results.append([y, *gradients, *(a for a in args[:2] if a is not None)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, **({} if dtype.itemsize > 2 else dict(rtol=2e-2, atol=2e-2)))
        count += 1
    assert count >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_torch_s_module_inputs_and_errors(torch_databases, name):
    theirs, ours = getattr(torch.nn, name), getattr(pydl.nn, name)
    (info,) = (m for m in torch_databases[1] if m.module_cls is theirs)
    count = 0
    for training in (True, False):
        for sample in info.module_inputs_func(info, "cpu", torch.float32, True, training):
            if sample.forward_input is None:
                continue
            arguments, given = sample.constructor_input, sample.forward_input
            pair = [cls(*arguments.args, **arguments.kwargs).train(training) for cls in (ours, theirs)]
            pair[0].load_state_dict(pair[1].state_dict())
            a, b = (module(*given.args, **given.kwargs) for module in pair)
            torch.testing.assert_close(a, b)
            for x, y in zip(pair[0].state_dict().values(), pair[1].state_dict().values(), strict=True):
                torch.testing.assert_close(x, y)
            count += 1
        for error in info.module_error_inputs_func(info, "cpu", torch.float32, True, training):
            arguments, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
            with pytest.raises(error.error_type):
                theirs(*arguments.args, **arguments.kwargs)(*given.args, **given.kwargs)
            with pytest.raises(error.error_type):
                ours(*arguments.args, **arguments.kwargs)(*given.args, **given.kwargs)
            count += 1
    assert count >= 8


# operators


@pytest.mark.parametrize("backend", [b for b in NATIVE if b.device == "cpu"], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=str)
def test_opcheck(backend, memory_format):
    raw = NAMESPACES[backend.name]
    x = torch.randn(2, 3, 3, 5).contiguous(memory_format=memory_format)
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    weight, bias, (mean, var) = torch.randn(3), torch.randn(3), buffers(3)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    with backend.use():
        check_opcheck(raw.batch_norm_train.default, *leaves, True, 1e-5)
        check_opcheck(raw.batch_norm_train.default, leaves[0], None, None, None, False, 1e-5)
        for keep in (True, False):
            check_opcheck(raw.batch_norm_eval.default, leaves[0], mean, var, *leaves[1:], True, 1e-5, keep)
        _, mean, var, mask = raw.batch_norm_train(x, weight, bias, residual, True, 1e-5)
        for training, output_mask in ((True, [True] * 4), (False, [True, False, True, False])):
            arguments = (dy, x, mean, var, weight, mask, training, 1e-5, output_mask)
            check_opcheck(raw.batch_norm_bwd.default, *arguments)
        check_opcheck(raw.batch_norm_update.default, *buffers(3), mean, var, 0.1, 1.5)
        check_opcheck(raw.batch_norm_stats.default, x)
        check_opcheck(raw.batch_norm_dx.default, dy, x, mean, var, weight, bias, bias, 1e-5)


# compile and export


@pytest.mark.compile
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_compile(memory_format, training):
    mean, var = buffers(3)

    def fn(x, weight, bias, residual):
        tail = {"residual": residual, "activation": "relu"}
        return ops.batch_norm_act(x, mean, var, weight, bias, training, 0.0, **tail) * 2

    def arguments(*shape):
        x, residual = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
        return x, torch.randn(3), torch.randn(3), residual

    check_compile(fn, [arguments(2, 3, 4, 5), arguments(3, 3, 2, 7)])


@pytest.mark.compile
def test_a_compiled_module_updates_its_running_statistics():
    torch._dynamo.reset()
    eager = pydl.nn.BatchNorm2d(3)
    module = pydl.nn.BatchNorm2d(3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 4, 4), (3, 3, 2, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), eager(x))
    for ours, wanted in zip(module.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert int(module.num_batches_tracked) == 2


@pytest.mark.compile
def test_export():
    module = pydl.nn.BatchNorm2d(3)
    module(torch.randn(2, 3, 4, 4))
    module.eval()
    x = torch.randn(2, 3, 4, 4)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize("training", [True, False])
def test_autocast(backend, training):
    parameters = [torch.rand(3, device=backend.device) for _ in range(4)]
    x = torch.randn(4, 3, 5, device=backend.device)
    for given in (x, x.bfloat16()):
        # equal running statistics on both sides: each call has its own
        def theirs(x, mean, var, *rest):
            return F.batch_norm(x, mean.clone(), var.clone(), *rest)

        def ours(x, mean, var, *rest):
            return backend(x, mean.clone(), var.clone(), *rest)

        check_autocast(ours, theirs, given, *parameters, training, device=backend.device, low=torch.bfloat16)


# torch.func, and what goes to torch


def test_func_grad_and_jacobian():
    x, (mean, var) = torch.randn(4, 3, dtype=torch.float64), buffers(3, dtype=torch.float64)
    for training in (True, False):

        def loss(op, x, training=training):
            return op(x, None if training else mean, None if training else var, training=training).pow(3).sum()

        for transform in (torch.func.grad, lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).pow(2).sum())):
            ours, theirs = (transform(lambda x, op=op: loss(op, x))(x) for op in (ops.batch_norm, F.batch_norm))
            torch.testing.assert_close(ours, theirs)


def test_functional_call_updates_buffers():
    module = pydl.nn.BatchNorm1d(3)
    state = {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}
    x = torch.randn(4, 3)
    torch.func.functional_call(module, state, (x,))
    module(x)
    for name, t in module.named_buffers():
        assert torch.equal(state[name], t)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_and_vmap_go_to_torch():
    module, x = pydl.nn.BatchNorm1d(3).eval(), torch.randn(4, 3)
    traced = torch.jit.trace(module, x)
    assert "pydl::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), module(x))
    mapped = torch.vmap(module)(torch.stack([x, x + 1]))
    torch.testing.assert_close(mapped, torch.stack([module(x), module(x + 1)]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_composition_that_stands_in_is_right(training, biased):
    # what runs where no kernel does, against the kernels
    x, residual = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    results = []
    for op in (ops.batch_norm_act, torch_batch_norm_act):
        mean, var = buffers(3)
        tail = {"residual": residual, "activation": "relu", "biased_running_var": biased}
        y = op(x, mean, var, None, None, training, 0.3, **tail)
        results.append((y, mean, var))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_more_than_sixteen_dimensions_go_to_torch():
    x = torch.randn(2, 3, *([1] * 15))
    with pydl.trace() as seen:
        y = ops.batch_norm(x, None, None, training=True)
    assert seen[0].backend == "torch" and "dimensions" in seen[0].reason
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(
        ops.batch_norm(x[..., 0], None, None, training=True), F.batch_norm(x[..., 0], None, None, training=True)
    )


@pytest.mark.parametrize("backend", [b for b in NATIVE if not b.slow], ids=str)
def test_large_offsets_of_chunks(backend):
    # more chunks than one, of planes and of rows, and a batch that is no multiple of a chunk
    for shape, memory_format in (((3, 2, 130, 131), None), ((3, 2, 130, 131), LAST), ((2, 5, 3, 60, 61), LAST3D)):
        x = torch.randn(shape, device=backend.device)
        x = x.contiguous(memory_format=memory_format) if memory_format else x
        leaf = x.clone().requires_grad_()
        y = replace(backend, op=ACT)(leaf, None, None, training=True, activation="relu")
        expected = torch_batch_norm_act(x.double(), None, None, training=True, activation="relu")
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
