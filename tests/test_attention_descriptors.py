"""attention's forward in Triton: what tensor descriptors read is what pointers read, and the copy engine is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _attention import TORCH
from _backends import backends_for
from _checks import assert_same_bits

pytest.importorskip("triton")

from pydl.kernels._attention_loads import describable, tile_inputs  # noqa: E402
from pydl.kernels._attention_tiles import fwd_tiles  # noqa: E402
from pydl.kernels._launch import Device  # noqa: E402

from pydl.kernels import attention_fwd as launcher  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = backends_for("attention", torch.float32, without=(*TORCH, "cpu"))


def _inside_nan(b, h, s, d, dtype, device, seed):
    """[B, H, S, D] amid memory that is NaN, so that an element too many is seen."""
    around = torch.full((b, h, s + 16, d + 32), float("nan"), dtype=dtype, device=device)
    inside = around[:, :, 8 : 8 + s, 16 : 16 + d]
    return inside.copy_(torch.randn(b, h, s, d, generator=torch.Generator().manual_seed(seed)))


def _heads_inside(b, h, s, d, dtype, device, seed):
    return _inside_nan(b, s, h, d, dtype, device, seed).transpose(1, 2)


def _one_item(b, h, s, d, dtype, device, seed):
    """A dimension of size 1 whose stride no descriptor could have."""
    t = _inside_nan(1, h, s, d, dtype, device, seed)
    return t.as_strided(t.shape, (3, *t.stride()[1:]), t.storage_offset())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [_inside_nan, _heads_inside, _one_item])
def test_descriptors_give_the_bits_of_pointers(backend, dtype, make, monkeypatch):
    """Head dimensions of 80 and 72 in tiles of 128; 70 queries and keys: two tiles; two heads share one of k and v."""
    b = 1 if make is _one_item else 2
    q, k, v = (
        make(b, h, s, d, dtype, backend.device, seed)
        for seed, (h, s, d) in enumerate(((2, 70, 80), (1, 70, 80), (1, 70, 72)))
    )
    lengths = torch.tensor([61, 70][:b]).to(q.device)
    seen = []

    def run(described, **kinds):
        def inputs(tensors, rows, wanted):
            seen.append(tile_inputs(tensors, rows, wanted))
            return seen[-1]

        monkeypatch.setattr(launcher, "fwd_tiles", lambda *args: fwd_tiles(*args)._replace(described=described))
        monkeypatch.setattr(launcher, "tile_inputs", inputs)
        return backend(q, k, v, return_lse=True, **kinds)

    for kinds in ({"causal": "bottom_right", "window": (60, None)}, {"key_lengths": lengths}):
        pointers, descriptors = run(False, **kinds), run(True, **kinds)
        assert [used for _, used in seen[-2:]] == [False, True]
        assert pointers[0].isfinite().all()
        for got, want in zip(descriptors, pointers, strict=True):
            assert_same_bits(got, want)


def test_what_the_copy_engine_cannot_read_stays_with_pointers():
    """A base or a stride off 16 bytes, columns apart, expanded, empty."""
    x = torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)
    flat = torch.zeros(2 * 3 * 40 * 64 + 1, dtype=torch.bfloat16)
    refused = {
        "base": flat[1:].view(2, 3, 40, 64),
        "stride": torch.zeros(2, 3, 40, 59, dtype=torch.bfloat16),
        "columns": torch.zeros(2, 3, 40, 128, dtype=torch.bfloat16)[..., ::2],
        "expanded": torch.zeros(2, 1, 40, 64, dtype=torch.bfloat16).expand(2, 3, 40, 64),
        "empty": x[:, :, :0],
    }
    assert {name: describable(t) for name, t in refused.items()} == dict.fromkeys(refused, False)
    assert describable(x) and describable(x[:, :, 3:]) and describable(x.transpose(1, 2))
    assert tile_inputs((x, x, refused["stride"]), (64, 64, 64), True)[1] is False
    assert tile_inputs((x, x, x), (64, 64, 64), False)[0] == (x, x, x)


def test_the_choice_is_a_function_of_arch_dtype_and_head_dimension():
    def described(arch, itemsize, d, queries=4096):
        return {fwd_tiles(queries, d, itemsize, heavy, Device(arch, 132)).described for heavy in (False, True)}

    for d in (40, 64, 80, 128, 256):
        assert described(90, 2, d) == {True} and described(80, 2, d) == described(0, 2, d) == {False}
        assert described(90, 4, d) == {False}  # products of float32 wait for registers, not for memory
        assert described(90, 2, d, queries=1) == {False}  # a short call waits for its launch


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from pydl._aot_compile import _source
from pydl.kernels.attention_fwd import aot_cases
cases = [c for c in aot_cases(90) if c.quick]
assert [c.label.endswith("described") for c in cases] == [False, True]
for case in cases:
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    print(triton.compile(_source(case), target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"].count(
        "cp.async.bulk.tensor"))
"""


@pytest.mark.compile
def test_descriptors_reach_the_copy_engine(tmp_path):
    """At least one load of q, and of k and v in each of the two loops."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", _COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pointers, descriptors = map(int, done.stdout.split())
    assert pointers == 0 and descriptors >= 5
