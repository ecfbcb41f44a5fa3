"""SyncBatchNorm in two processes over gloo: the numbers of one process with the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from _sync_worker import SCENARIOS, STEPS, batches, parameters

import pydl

ROOT = Path(__file__).resolve().parents[1]
WORLD = 2
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("sync")
    files = [folder / f"{rank}.pt" for rank in range(WORLD)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests" / "_sync_worker.py"),
                str(rank),
                str(WORLD),
                str(folder / "meet"),
                file,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    texts = []
    for process in processes:
        try:
            texts.append(process.communicate(timeout=240)[0])
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
    assert all(process.returncode == 0 for process in processes), "\n".join(texts)
    return [torch.load(file, weights_only=False) for file in files]


def joined(name):
    """Steps of one process with all batches, in float64: (y and dx of each process, parameters' gradients, buffers)."""
    shapes, dtype, _, arguments = SCENARIOS[name]
    channels = shapes[0][1]
    weight, bias = parameters(channels, dtype)
    module = pydl.nn.BatchNorm1d(channels, **arguments).double()
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    for step in range(STEPS):
        pairs = [[t.double().movedim(1, -1).reshape(-1, channels) for t in pair] for pair in batches(name, step)]
        x = torch.cat([x for x, _ in pairs]).requires_grad_()
        y = module(x)
        dx, *rest = torch.autograd.grad(y, [x, *module.parameters()], torch.cat([dy for _, dy in pairs]))
        sizes = [len(x) for x, _ in pairs]
        yield y.detach().split(sizes), dx.split(sizes), rest, [b.clone() for b in module.buffers()]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_are_as_one(results, name):
    shapes, dtype, _, _ = SCENARIOS[name]
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    if name == "large mean":
        tolerance = 2e-3  # one unit in the last place of the mean, over a deviation of 1
    close = {"rtol": tolerance, "atol": tolerance}
    for step, (y, dx, rest, buffers) in enumerate(joined(name)):
        for rank in range(WORLD):
            found = results[rank][name]
            for key, expected in (("y", y[rank]), ("dx", dx[rank])):
                got = found[key][step]
                assert got.dtype == dtype and got.shape == torch.Size(shapes[rank])
                torch.testing.assert_close(got.double().movedim(1, -1).reshape(expected.shape), expected, **close)
            for got, expected in zip(found["buffers"][step], buffers, strict=True):
                torch.testing.assert_close(got.to(expected.dtype), expected, **close)
        # each process holds its share of the sums, as torch's does
        shares = [results[rank][name]["parameters"][step] for rank in range(WORLD)]
        for parts, expected in zip(zip(*shares, strict=True), rest, strict=True):
            torch.testing.assert_close(sum(p.double() for p in parts), expected, rtol=tolerance, atol=10 * tolerance)


def test_every_process_has_the_same_bits(results):
    for name in SCENARIOS:
        for first, second in zip(results[0][name]["buffers"], results[1][name]["buffers"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_kernels_ran(results):
    for found in results:
        assert ("sync_batch_norm", "cpu") in found["backends"]


def test_second_derivatives_are_refused_with_a_reason(results):
    for found in results:
        assert "cannot be differentiated again" in found["second derivative"]


def test_evaluation_is_local(results):
    assert all(found["evaluation"] for found in results)


# without a process group


def test_alone_it_is_batch_norm():
    module, plain = pydl.nn.SyncBatchNorm(3), torch.nn.BatchNorm1d(3)
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(module(x), plain(x))
    for a, b in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    (g,) = torch.autograd.grad(module(x.requires_grad_()).pow(3).sum(), x, create_graph=True)
    torch.autograd.grad(g.pow(2).sum(), x)  # nothing is shared: any derivative exists


def test_errors_are_torchs():
    for cls in (pydl.nn.SyncBatchNorm, torch.nn.SyncBatchNorm):
        with pytest.raises(ValueError, match="at least 2D input"):
            cls(3)(torch.randn(3))
        with pytest.raises(ValueError, match="non-zero"):
            cls(3)(torch.randn(2, 0))


def test_convert():
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3), torch.nn.Sequential(pydl.nn.BatchNorm1d(4, biased_running_var=True)), torch.nn.ReLU()
    )
    state = {name: t.clone() for name, t in model.state_dict().items()}
    converted = pydl.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is pydl.nn.SyncBatchNorm and type(converted[1][0]) is pydl.nn.SyncBatchNorm
    assert (converted[0].biased_running_var, converted[1][0].biased_running_var) == (False, True)
    assert all(torch.equal(t, state[name]) for name, t in converted.state_dict().items())
    assert type(pydl.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm2d(2))) is pydl.nn.SyncBatchNorm


def test_accelerate_takes_torch_s():
    model = torch.nn.Sequential(torch.nn.SyncBatchNorm(3))
    assert pydl.accelerate(model).replaced and type(model[0]) is pydl.nn.SyncBatchNorm
    x = torch.randn(4, 3)
    torch.testing.assert_close(model(x), torch.nn.BatchNorm1d(3)(x))
    pydl.restore(model)
    assert type(model[0]) is torch.nn.SyncBatchNorm
