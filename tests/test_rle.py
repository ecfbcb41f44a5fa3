"""Run-length encoding: oracle, round trips, beside pycocotools, texts, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pydl
from pydl import ops
from pydl._problems import problems
from pydl._verify import verify_problem
from pydl.ops.rle import rle_from_string, rle_to_string
from pydl.reference import specs

SPECS = specs("rle")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", SPECS)
def test_values_in_every_layout(backend, name):
    """Decoding is torch's repeat_interleave whatever the backend."""

    def run(*args):
        with pydl.backend(backend):
            return getattr(ops, name)(*args)

    for problem in problems(SPECS[name], torch.float32):
        rows = list(verify_problem(run, problem, torch.device("cpu"), "values", reruns=2))
        assert rows and all(grade.ok for _, _, grade in rows), [f"{case}: {grade}" for _, case, grade in rows]


def random_masks(n, h, w, seed=0):
    """Smooth blobs, noise, and masks that begin with a one."""
    g = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.randn(n, 1, 5, 5, generator=g), (h, w), mode="bicubic")[:, 0] > 0
    noise = torch.rand(n, h, w, generator=g) < 0.5
    return torch.cat([smooth, noise, ~smooth])


# 8, 9: the step over equal bytes and one more; 1: single rows and columns
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 17), (17, 1), (8, 9), (63, 64), (130, 77)])
def test_round_trip(h, w):
    masks = random_masks(5, h, w)
    counts, lengths = ops.rle_encode(masks)
    assert torch.equal(ops.rle_decode(counts, lengths, (h, w)), masks)
    labels = masks.long() * torch.arange(15).view(-1, 1, 1)
    assert torch.equal(ops.rle_decode_labels(*ops.rle_encode_labels(labels), (h, w)), labels)
    for per_mask, own in zip(masks, counts.split(lengths.tolist()), strict=True):
        assert torch.equal(rle_from_string(rle_to_string(own)), own)
        assert torch.equal(ops.rle_encode(per_mask)[0], own)


def test_equal_to_pycocotools():
    api = pytest.importorskip("pycocotools.mask")
    for h, w in ((23, 31), (64, 64), (200, 3)):
        masks = random_masks(4, h, w, seed=h)
        counts, lengths = ops.rle_encode(masks)
        encoded = api.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
        for theirs, own in zip(encoded, counts.split(lengths.tolist()), strict=True):
            assert rle_to_string(own).encode() == theirs["counts"]
            assert torch.equal(rle_from_string(theirs["counts"]), own)
            assert api.frPyObjects({"size": [h, w], "counts": own.tolist()}, h, w)["counts"] == theirs["counts"]


def test_uint8_masks_are_masks():
    masks = torch.tensor([[0, 1], [7, 0]], dtype=torch.uint8)
    assert [t.tolist() for t in ops.rle_encode(masks)] == [[1, 2, 1], 3]


def test_which_backend_runs():
    with pydl.trace() as seen:
        ops.rle_encode(torch.zeros(2, 3, dtype=torch.bool))
        ops.rle_encode_labels(torch.zeros(2, 3, dtype=torch.int16))
    assert [(r.op, r.backend) for r in seen] == [("rle_encode", "cpu"), ("rle_encode_labels", "cpu")]


def test_opcheck():
    for x in (torch.randint(0, 2, (3, 20), dtype=torch.uint8), torch.randint(0, 2, (3, 20))):
        for zero_first in (False, True):
            torch.library.opcheck(torch.ops.pydl.rle_encode.default, (x, zero_first))


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: ops.rle_encode([[True]]), TypeError, "rle_encode: the first argument must be a Tensor, got list"),
        (
            lambda: ops.rle_encode(torch.zeros(2, 2)),
            RuntimeError,
            "bool, uint8 of shape [..., H, W], got torch.float32",
        ),
        (lambda: ops.rle_encode(torch.zeros(4, dtype=torch.bool)), RuntimeError, "[4]"),
        (lambda: ops.rle_encode_labels(torch.zeros(2, 2, dtype=torch.bool)), RuntimeError, "torch.bool"),
        (lambda: ops.rle_decode(torch.tensor([4, 1]), torch.tensor([2]), (2, 2)), ValueError, "2 x 2 = 4"),
        (lambda: ops.rle_decode(torch.tensor([5, -1]), torch.tensor([2]), (2, 2)), ValueError, "negative"),
        (lambda: ops.rle_decode(torch.tensor([4]), torch.tensor([2]), (2, 2)), ValueError, "all 1 counts"),
        (lambda: ops.rle_decode([4], torch.tensor([1]), (2, 2)), TypeError, "'counts'"),
        (
            lambda: ops.rle_decode_labels(torch.tensor([1, 2]), torch.tensor([4]), torch.tensor([1]), (2, 2)),
            ValueError,
            "'values'",
        ),
        (lambda: rle_from_string("\x01"), ValueError, "cannot occur"),
        (lambda: rle_from_string("P"), ValueError, "ends within a number"),
        (lambda: rle_to_string(torch.zeros(2, 2)), RuntimeError, "those of one mask"),
    ],
)
def test_errors(call, kind, says):
    with pytest.raises(kind) as raised:
        call()
    assert says in str(raised.value)


@pytest.mark.parametrize("x", [torch.zeros(4, dtype=torch.uint8), torch.zeros(2, 2)])
def test_the_raw_operator_refuses_other_shapes_and_dtypes(x):
    with pytest.raises(RuntimeError, match="rle_encode: x must"):
        torch.ops.pydl.rle_encode(x, True)
