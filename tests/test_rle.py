"""Run-length encoding: oracle, round trips, beside pycocotools, texts, errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from _checks import assert_same_bits, check_opcheck

import pydl
from pydl import ops
from pydl._problems import problems
from pydl._verify import verify_problem
from pydl.ops.rle import rle_from_string, rle_to_string
from pydl.reference import specs

SPECS = specs("rle")


BACKENDS = ["cpu", "torch"]
RAW = torch.ops.pydl


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECS)
def test_values_in_every_layout(backend, name):
    def run(*args):
        with pydl.backend(backend):
            return getattr(ops, name)(*args)

    for problem in problems(SPECS[name], torch.float32):
        rows = list(verify_problem(run, problem, torch.device("cpu"), "values", reruns=2))
        assert rows and all(grade.ok for _, _, grade in rows), [f"{case}: {grade}" for _, case, grade in rows]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mask_of_six_pixels_and_every_map_of_four(backend):
    masks = torch.tensor(list(itertools.product((0, 1), repeat=6))).bool().reshape(-1, 2, 3)
    maps = torch.tensor(list(itertools.product((0, 5, -7), repeat=4))).reshape(-1, 2, 2)
    with pydl.backend(backend):
        counts, lengths = ops.rle_encode(masks)
        assert torch.equal(ops.rle_decode(counts, lengths, (2, 3)), masks)
        assert torch.equal(ops.rle_decode_labels(*ops.rle_encode_labels(maps), (2, 2)), maps)
        for own in counts.split(lengths.tolist()):
            assert torch.equal(rle_from_string(rle_to_string(own)), own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 127, 129])  # around the block of 64 columns
def test_widths(backend, width):
    for height in (1, 2, 255, 257):
        masks = torch.rand(2, height, width) < 0.5
        labels = masks * 7 + torch.arange(width)
        with pydl.backend(backend):
            assert torch.equal(ops.rle_decode(*ops.rle_encode(masks), (height, width)), masks)
            assert torch.equal(ops.rle_decode_labels(*ops.rle_encode_labels(labels), (height, width)), labels)


def random_masks(n, h, w, seed=0):
    """Smooth blobs, noise, and masks that begin with a one."""
    g = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.randn(n, 1, 5, 5, generator=g), (h, w), mode="bicubic")[:, 0] > 0
    noise = torch.rand(n, h, w, generator=g) < 0.5
    return torch.cat([smooth, noise, ~smooth])


# 1: single rows and columns; 63, 64, 77: columns around a block of 64
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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_keep_their_dtype(dtype):
    info = torch.iinfo(dtype)
    labels = torch.tensor([[info.min, info.max], [info.max, 0]], dtype=dtype)
    values, counts, lengths = ops.rle_encode_labels(labels)
    assert values.dtype == dtype and values.tolist() == [info.min, info.max, 0] and counts.tolist() == [1, 2, 1]
    assert_same_bits(ops.rle_decode_labels(values, counts.int(), lengths.int(), (2, 2)), labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_of_far_counts(backend):
    # groups of all lengths, differences of both signs, the ends of 64 bits
    counts = torch.tensor([0, 2**62, 31, 2**63 - 1, 15, 16, 0, 1023, 1024, 2**63 - 1, 0])
    with pydl.backend(backend):
        assert torch.equal(rle_from_string(rle_to_string(counts)), counts)
        # 40 - 3 = 37 = 5 + 32 * 1; 0 - 1 = -1
        expected = bytes([48 + 2, 48 + 3, 48 + 1, 48 + 32 + 5, 48 + 1, 48 + 31])
        assert rle_to_string(torch.tensor([2, 3, 1, 40, 0])).encode() == expected
        assert rle_to_string(torch.zeros(0, dtype=torch.int64)) == "" and rle_from_string("").tolist() == []


def test_which_backend_runs():
    masks, labels = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int16)
    with pydl.trace() as seen:
        runs, values = ops.rle_encode(masks), ops.rle_encode_labels(labels)
        ops.rle_decode(*runs, (2, 3))
        ops.rle_decode_labels(*values, (2, 3))
        rle_from_string(rle_to_string(runs[0]))
    assert [(r.op, r.backend) for r in seen] == [
        (name, "cpu")
        for name in (
            "rle_encode",
            "rle_encode_labels",
            "rle_decode",
            "rle_decode_labels",
            "rle_to_string",
            "rle_from_string",
        )
    ]


def samples():
    """Arguments of each raw operator, which are also those of a compiled call."""
    masks, labels = torch.rand(3, 7, 70) < 0.4, torch.randint(0, 3, (3, 7, 70))
    runs, coded = RAW.rle_encode(masks), RAW.rle_encode_labels(labels)
    return {
        "rle_encode": (masks,),
        "rle_encode_labels": (labels,),
        "rle_decode": (*runs, 7, 70),
        "rle_decode_labels": (*coded, 7, 70),
        "rle_to_text": (runs[0],),
        "rle_from_text": (RAW.rle_to_text(runs[0]),),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    check_opcheck(getattr(RAW, name).default, *samples()[name])


@pytest.mark.compile
@pytest.mark.parametrize("function", [ops.rle_encode, ops.rle_encode_labels], ids=lambda f: f.__name__)
def test_compile(function):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for _ in range(2):  # another number of runs, too
        (planes,) = samples()[function.__name__]
        for ours, theirs in zip(compiled(planes), function(planes), strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    masks = torch.rand(5, 203, 301) < 0.2
    expected = ops.rle_encode(masks)
    try:
        torch.set_num_threads(threads)
        for ours, theirs in zip(ops.rle_encode(masks), expected, strict=True):
            assert_same_bits(ours, theirs)
        assert torch.equal(ops.rle_decode(*expected, (203, 301)), masks)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("counts", "lengths", "size"),
    [
        ([2, 4, 1, 4], [2, 2], (2, 3)),  # too few pixels
        ([2, 5, 1, 5], [2, 2], (2, 3)),  # too many
        ([-1, 7, 1, 5], [2, 2], (2, 3)),
        ([2**62, 2**62, 2**62, 2**62, 6, 1, 5], [5, 2], (2, 3)),  # a sum that wraps around
        ([2**63 - 1, -(2**63) + 7, 1, 5], [2, 2], (2, 3)),
        ([2, 4, 1, 5], [2, 1], (2, 3)),
        ([2, 4, 1, 5], [2, 3], (2, 3)),
        ([2, 4, 1, 5], [5, -1], (2, 3)),
        ([2, 4, 1, 5], [], (2, 3)),
        ([2, 4, 1, 5], [2, 2], (3, 3)),
        ([2, 4, 1, 5], [2, 2], (-2, -3)),
        ([2, 4, 1, 5], [2, 2], (6,)),
        ([2, 4, 1, 5], [2, 2], 6),
    ],
    ids=str,
)
def test_bad_runs(backend, counts, lengths, size):
    counts, lengths = torch.tensor(counts), torch.tensor(lengths, dtype=torch.int64)
    with pydl.backend(backend):
        with pytest.raises(ValueError, match="rle_decode: "):
            ops.rle_decode(counts, lengths, size)
        with pytest.raises(ValueError, match="rle_decode_labels: "):
            ops.rle_decode_labels(torch.arange(len(counts)), counts, lengths, size)


@pytest.mark.parametrize("backend", BACKENDS)
# a negative count, one that comes of a difference, and a sum past 2^63
@pytest.mark.parametrize("text", ["O", "103O", rle_to_string(torch.tensor([0, 2**63 - 1, 0, 0]))[:-13] + "1"], ids=repr)
def test_negative_counts(backend, text):
    with pydl.backend(backend), pytest.raises(ValueError, match="negative"):
        rle_from_string(text)


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
        (lambda: rle_from_string("p"), ValueError, "cannot occur"),
        (lambda: rle_from_string("P"), ValueError, "ends within a number"),
        (lambda: rle_from_string("P" * 13 + "0"), ValueError, "13 characters"),
        (lambda: rle_from_string(7), TypeError, "must be a str or bytes, got int"),
        (lambda: rle_to_string(torch.zeros(2, 2).long()), RuntimeError, "those of one mask"),
        (lambda: rle_to_string(torch.zeros(2)), TypeError, "torch.float32"),
        (lambda: rle_to_string(torch.tensor([3, -4])), ValueError, "-4"),
    ],
)
def test_errors(call, kind, says):
    with pytest.raises(kind) as raised:
        call()
    assert says in str(raised.value)


def test_raw_operators_refuse_what_they_cannot_read():
    counts, lengths, text = torch.tensor([6]), torch.tensor([1]), torch.zeros(2, dtype=torch.uint8)
    for call in (
        lambda: RAW.rle_encode(torch.zeros(2, 3)),
        lambda: RAW.rle_encode(torch.zeros(3).bool()),
        lambda: RAW.rle_encode_labels(torch.zeros(2, 3).bool()),
        lambda: RAW.rle_encode_labels(torch.zeros(2, 3, dtype=torch.int16)),
        lambda: RAW.rle_decode(counts.int(), lengths, 2, 3),
        lambda: RAW.rle_decode(counts, lengths.int(), 2, 3),
        lambda: RAW.rle_decode(counts[None], lengths, 2, 3),
        lambda: RAW.rle_decode(counts, lengths * 2, 2, 3),
        lambda: RAW.rle_decode(counts, lengths - 1, 2, 3),
        lambda: RAW.rle_decode(counts + 1, lengths, 2, 3),
        lambda: RAW.rle_decode(counts - 1, lengths, 2, 3),
        lambda: RAW.rle_decode(-counts, lengths, 2, 3),
        lambda: RAW.rle_decode(counts, lengths, -2, -3),
        lambda: RAW.rle_decode(counts, lengths, 2**40, 2**40),
        lambda: RAW.rle_decode(torch.tensor([2**62] * 4 + [6]), lengths * 5, 2, 3),
        lambda: RAW.rle_decode_labels(counts[:0], counts, lengths, 2, 3),
        lambda: RAW.rle_decode_labels(counts.float(), counts, lengths, 2, 3),
        lambda: RAW.rle_to_text(counts.int()),
        lambda: RAW.rle_to_text(counts[None]),
        lambda: RAW.rle_from_text(text.long()),
        lambda: RAW.rle_from_text(text),
        lambda: RAW.rle_from_text(text + 80),
        lambda: RAW.rle_from_text((text[:1] + 80).repeat(20)),
    ):
        with pytest.raises(RuntimeError):
            call()
    assert len(RAW.rle_to_text(torch.tensor([-(2**63), 0, 2**63 - 1, 2**63 - 1, -(2**63)]))) <= 5 * 13
