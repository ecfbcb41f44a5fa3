"""ctc_greedy_decode and ctc_beam_search on every backend: values, enumeration, ties, lengths, errors, compilation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from _backends import available, backends_and_dtypes, backends_for
from _checks import assert_same_bits, check_cases, check_layouts, check_opcheck

from pydl import ops
from pydl.reference.ctc_decode import beam_cases, beam_item, ctc_beam_search, ctc_greedy_decode, greedy_cases

GREEDY, BEAM = "ctc_greedy_decode", "ctc_beam_search"
GREEDY_CASES, BEAM_CASES = ({c.name: c for c in cases()} for cases in (greedy_cases, beam_cases))
TORCH = ("torch",)
INF, NAN = math.inf, math.nan
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}


def log_probs(*shape, seed=0, scale=3.0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return x.to(device, dtype)


def enumerated(x, blank):
    """log of the summed probability of all paths, by the label sequence they stand for."""
    total: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(x.shape[1]), repeat=x.shape[0]):
        labels = tuple(c for i, c in enumerate(path) if c != blank and (i == 0 or c != path[i - 1]))
        score = sum(x[t, c] for t, c in enumerate(path))
        total[labels] = np.logaddexp(total.get(labels, -INF), score)
    return total


# values against the oracle, and the oracle against enumeration


@pytest.mark.parametrize(("frames", "classes", "blank"), [(1, 3, 0), (3, 2, 1), (4, 3, 2), (5, 3, 0), (4, 4, 1)])
def test_a_beam_that_loses_nothing_sums_all_paths(frames, classes, blank):
    x = log_probs(frames, classes, seed=frames * classes, dtype=torch.float64)
    exact = enumerated(x.numpy(), blank)
    oracle = beam_item(x.numpy(), 10_000, blank, -INF)
    assert len(oracle) == len(exact)
    for prefix, score in oracle:
        assert score == pytest.approx(exact[prefix], abs=1e-12)
    labels, lengths, scores = ops.ctc_beam_search(x, None, 1000, blank, 1000)
    ranked = sorted(exact.items(), key=lambda item: -item[1])
    assert (scores[len(ranked) :] == -INF).all() and (lengths[len(ranked) :] == 0).all()
    for k, (prefix, score) in enumerate(ranked):
        assert labels[k, : lengths[k]].tolist() == list(prefix)
        assert (labels[k, lengths[k] :] == -1).all()
        assert float(scores[k]) == pytest.approx(score, abs=1e-12)
    assert float(scores.logsumexp(0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(GREEDY))
def test_greedy_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(BEAM))
def test_beam_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(GREEDY, without=TORCH))
def test_greedy_layouts(backend, dtype):
    check_layouts(backend, dtype, GREEDY_CASES["ragged"], levels=("values",))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(BEAM, without=TORCH))
def test_beam_layouts(backend, dtype):
    check_layouts(backend, dtype, BEAM_CASES["ragged"], levels=("values",))


@pytest.mark.parametrize("backend", backends_for(GREEDY, torch.float32))
def test_greedy_edge_sizes(backend):
    # classes around vectors of 4, 8 and 16 and their fours; frames around a block of 256
    for classes in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66):
        x = log_probs(5, 2, classes, seed=classes)
        found = backend(x.to(backend.device), [5, 4], classes - 1)
        for a, b in zip(found[:2], ctc_greedy_decode(x.double().numpy(), [5, 4], classes - 1)[:2], strict=True):
            assert np.array_equal(a.cpu().numpy(), b), classes
    for frames in (1, 2, 255, 256, 257, 513):
        x = log_probs(frames, 1, 3, seed=frames)
        found = backend(x.to(backend.device))
        for a, b in zip(found[:2], ctc_greedy_decode(x.double().numpy())[:2], strict=True):
            assert np.array_equal(a.cpu().numpy(), b), frames


@pytest.mark.parametrize("backend", backends_for(GREEDY, torch.float32))
def test_greedy_takes_what_argmax_takes(backend):
    # ties, NaN and infinities at every distance: in one lane, in one vector, in different ones, in the tail
    generator = torch.Generator().manual_seed(1)
    for classes in (6, 70):
        x = torch.randint(-2, 2, (200, 1, classes), generator=generator).float()
        draw = torch.rand(x.shape, generator=generator)
        x[draw < 0.02] = NAN
        x[draw > 0.98] = INF
        x[:9] = -INF
        x[4] = -0.0
        x[4, 0, 1] = 0.0
        best = x[:, 0].argmax(1)
        kept = [c for t, c in enumerate(best.tolist()) if c != 3 and (t == 0 or c != best[t - 1])]
        labels, lengths, scores = backend(x.to(backend.device), None, 3)
        assert labels[0, : lengths[0]].tolist() == kept
        assert scores.isnan().all()


@pytest.mark.parametrize("backend", backends_for(GREEDY, torch.float32))
def test_greedy_of_a_confident_model(backend):
    # the path of a known target is recovered, repeats only with a blank between them
    path = torch.tensor([0, 4, 4, 0, 4, 0, 0, 2, 1, 1, 1, 2, 0, 2])
    x = torch.full((14, 1, 5), -20.0)
    x[torch.arange(14), 0, path] = -1e-3
    labels, lengths, scores = backend(x.to(backend.device))
    assert labels[0, : lengths[0]].tolist() == [4, 4, 2, 1, 2, 2]
    assert (labels[0, lengths[0] :] == -1).all()
    assert scores.tolist() == pytest.approx([-0.014])


def test_both_decoders_agree_where_the_model_is_sure():
    x = log_probs(50, 4, 12, scale=40.0, seed=9)
    labels, lengths, _ = ops.ctc_greedy_decode(x)
    beams, beam_lengths, scores = ops.ctc_beam_search(x, beam_width=200)
    assert torch.equal(beams[:, 0], labels) and torch.equal(beam_lengths[:, 0], lengths)
    # the probability of the labels, summed over all of their alignments but those that left the beam
    flat = torch.cat([row[:n] for row, n in zip(labels, lengths, strict=True)])
    nll = torch.nn.functional.ctc_loss(x.double(), flat, torch.full((4,), 50), lengths, reduction="none")
    torch.testing.assert_close(scores[:, 0].double(), -nll, rtol=1e-4, atol=0)
    assert (scores[:, 0] <= -nll + 1e-6).all()


@pytest.mark.parametrize("backend", backends_for(BEAM, torch.float64))
def test_beam_against_the_oracle_at_random(backend):
    # widths around the 2 W + 1 classes that are looked at, prefixes that leave the beam and come back, repeats
    rng = np.random.default_rng(8)
    for trial in range(60 if backend.name == "cpu" else 6):
        frames, classes, width = (int(rng.integers(1, n)) for n in (25, 30, 9))
        x = log_probs(frames, 1, classes, seed=trial, dtype=torch.float64, scale=float(rng.choice([0.3, 1, 4])))
        blank, paths = int(rng.integers(0, classes)), int(rng.integers(1, width + 1))
        prune = float(rng.choice([-INF, -3.0]))
        found = backend(x, None, width, blank, paths, prune)
        expected = ctc_beam_search(x.numpy(), None, width, blank, paths, prune)
        for a, b in zip(found[:2], expected[:2], strict=True):
            assert np.array_equal(a.numpy(), b), trial
        np.testing.assert_allclose(found[2].numpy(), expected[2], rtol=1e-12)


def test_beam_of_a_large_vocabulary():
    # more classes than one block of them is long, and most of them possible; half precision: many equal values
    x = log_probs(6, 2, 1000, scale=0.5, dtype=torch.float64)
    for values in (x, x.half(), x.transpose(0, 2).contiguous().transpose(0, 2)):
        found = ops.ctc_beam_search(values, None, 5, 999, 3)
        expected = ctc_beam_search(values.double().numpy(), None, 5, 999, 3)
        np.testing.assert_allclose(found[2].double().numpy(), expected[2], rtol=1e-6)
    assert np.array_equal(
        ops.ctc_beam_search(x, None, 5, 999, 3)[0].numpy(), ctc_beam_search(x.numpy(), None, 5, 999, 3)[0]
    )


def test_beam_keeps_many_prefixes():
    # more nodes than the table of prefixes begins with
    x = log_probs(60, 1, 6, scale=0.2, dtype=torch.float64)
    found, expected = ops.ctc_beam_search(x, None, 60, 0, 4), ctc_beam_search(x.numpy(), None, 60, 0, 4)
    assert np.array_equal(found[0].numpy(), expected[0])
    np.testing.assert_allclose(found[2].numpy(), expected[2], rtol=1e-12)


def test_equal_prefixes_are_ranked_the_same_on_every_run():
    x = torch.full((6, 1, 4), -math.log(4))
    first = ops.ctc_beam_search(x, None, 7, 0, 7)
    assert len({tuple(row) for row in first[0][0].tolist()}) == 7
    for _ in range(3):
        for a, b in zip(ops.ctc_beam_search(x, None, 7, 0, 7), first, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("name", [GREEDY, BEAM])
def test_every_thread_count_gives_the_same_bits(name):
    x = log_probs(40, 9, 30)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(getattr(ops, name)(x, [40] * 5 + [3, 0, 40, 17]))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("backend", backends_for(BEAM, torch.float32))
def test_beam_with_nothing_possible(backend):
    x = torch.full((3, 2, 3), -INF)
    x[0, 1] = torch.tensor([NAN, -1.0, NAN])
    x[1, 1] = torch.tensor([NAN, NAN, -0.5])
    x[2, 1] = torch.tensor([-0.25, NAN, -INF])
    labels, lengths, scores = backend(x, None, 3, 0, 2)
    assert labels.tolist() == [[[-1] * 3] * 2, [[1, 2, -1], [-1] * 3]]
    assert lengths.tolist() == [[0, 0], [2, 0]]
    assert scores.tolist() == [[-INF, -INF], [-1.75, -INF]]


# arguments


@pytest.mark.parametrize("name", [GREEDY, BEAM])
def test_forms_of_the_arguments(name):
    op, x = getattr(ops, name), log_probs(12, 3, 5)
    expected = op(x, [12, 11, 3])
    for lengths in ((12, 11, 3), torch.tensor([12, 11, 3]), torch.tensor([[12], [11], [3]], dtype=torch.int16)):
        for a, b in zip(op(x, lengths), expected, strict=True):
            assert_same_bits(a, b)
    for alone, n in ((op(x[:, 0]), 0), (op(log_probs=x[:, 1], input_lengths=torch.tensor(11), blank=0), 1)):
        for a, b in zip(alone, expected, strict=True):
            assert a.shape == b[n].shape
            assert_same_bits(a.reshape(-1), b[n].reshape(-1))
    for a, b in zip(op(x.transpose(0, 1).contiguous().transpose(0, 1), [12, 11, 3]), expected, strict=True):
        assert_same_bits(a, b)
    leaf = x.clone().requires_grad_()
    assert not any(t.requires_grad for t in op(leaf))


HOST = [*[(GREEDY, b) for b in available(GREEDY) if b.name in ("cpu", "torch")], *[(BEAM, b) for b in available(BEAM)]]


@pytest.mark.parametrize(("name", "backend"), HOST, ids=str)
@pytest.mark.parametrize(
    ("lengths", "says"), [([4, 5], "item 1: input length 5 must be in [0, T=4]"), ([-1, 4], "item 0")]
)
def test_bad_lengths_are_named_on_the_host(name, backend, lengths, says):
    with pytest.raises(ValueError) as raised:
        backend(torch.zeros(4, 2, 3), lengths)
    assert says in str(raised.value) and str(raised.value).startswith(name)
    assert isinstance(raised.value, RuntimeError)


@pytest.mark.parametrize("backend", [b for b in available(GREEDY) if b.name in ("simt", "cuda")], ids=str)
@pytest.mark.parametrize("wild", [-1, 10, 2**31, -(2**40), 2**62])
def test_wild_lengths_on_a_device_stay_in_memory(backend, wild):
    x = log_probs(9, 3, 5, device=backend.device)
    good = backend(x)
    labels, lengths, scores = backend(x, torch.tensor([9, wild, 9], device=backend.device))
    assert (labels[1] == -1).all() and lengths[1] == 0 and scores[1].isnan()
    for a, b in zip((labels, lengths, scores), good, strict=True):
        assert_same_bits(a[::2], b[::2])


@pytest.mark.parametrize("name", [GREEDY, BEAM])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(log_probs=[1.0]), TypeError, ["log_probs", "list"]),
        (dict(log_probs=torch.zeros(4)), RuntimeError, ["log_probs", "[4]"]),
        (dict(log_probs=torch.zeros(4, 2, 3, dtype=torch.int32)), RuntimeError, ["log_probs", "int32"]),
        (dict(log_probs=torch.zeros(4, 2, 0)), RuntimeError, ["blank", "C=0"]),
        (dict(input_lengths=4), TypeError, ["input_lengths", "4"]),
        (dict(input_lengths=[4]), RuntimeError, ["input_lengths", "2 items", "1"]),
        (dict(input_lengths=torch.ones(2)), RuntimeError, ["input_lengths", "float32"]),
        (dict(blank=3), RuntimeError, ["blank", "3"]),
        (dict(blank="0"), TypeError, ["blank", "'0'"]),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, list) else "",
)
def test_errors(name, change, error, says):
    with pytest.raises(error) as raised:
        getattr(ops, name)(**(dict(log_probs=torch.zeros(4, 2, 3)) | change))
    for part in (name, *says):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(beam_width=0), ValueError, ["beam_width", "0"]),
        (dict(beam_width=2.0), TypeError, ["beam_width", "2.0"]),
        (dict(beam_width=2**31), ValueError, ["beam_width", str(2**31)]),
        (dict(top_paths=0), ValueError, ["top_paths", "0"]),
        (dict(top_paths=17), ValueError, ["top_paths", "beam_width=16", "17"]),
        (dict(top_paths=True), TypeError, ["top_paths", "True"]),
        (dict(prune_log_prob=NAN), ValueError, ["prune_log_prob", "nan"]),
        (dict(prune_log_prob="0"), TypeError, ["prune_log_prob", "'0'"]),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, list) else "",
)
def test_errors_of_the_beam(change, error, says):
    with pytest.raises(error) as raised:
        ops.ctc_beam_search(torch.zeros(4, 2, 3), **change)
    for part in (BEAM, *says):
        assert part in str(raised.value)


@pytest.mark.parametrize("backend", [b for b in available(GREEDY) if b.name in NAMESPACES], ids=str)
def test_raw_greedy_refuses_what_it_cannot_read(backend):
    op, x = NAMESPACES[backend.name].ctc_greedy, torch.zeros(4, 2, 3, device=backend.device)
    two = torch.tensor([1, 1], device=backend.device)
    with backend.use():
        for args in (
            (x[0], two, 0),
            (x.long(), two, 0),
            (x, two[:1], 0),
            (x, two.float(), 0),
            (x, two, 3),
            (x, two, -1),
            (x[..., :0], two, 0),
        ):
            with pytest.raises(RuntimeError):
                op(*args)


def test_raw_beam_refuses_what_it_cannot_read():
    op, x, two = torch.ops.pydl.ctc_beam, torch.zeros(4, 2, 3), torch.tensor([1, 1])
    for args in (
        (x[0], two, 4, 0, 1, -INF),
        (x.long(), two, 4, 0, 1, -INF),
        (x, two[:1], 4, 0, 1, -INF),
        (x, two + 4, 4, 0, 1, -INF),
        (x, two, 0, 0, 1, -INF),
        (x, two, 4, 3, 1, -INF),
        (x, two, 4, 0, 5, -INF),
        (x, two, 4, 0, 0, -INF),
    ):
        with pytest.raises(RuntimeError):
            op(*args)
    # scores beyond all sense: no crash, and nothing outside of the classes
    labels = op(torch.full((4, 2, 3), INF), two, 4, 0, 2, NAN)[1]
    assert ((labels >= -1) & (labels < 3)).all()


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available(GREEDY) if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend):
    x, lengths = log_probs(9, 2, 4), torch.tensor([9, 8])
    with backend.use():
        check_opcheck(NAMESPACES[backend.name].ctc_greedy.default, x, lengths, 0)
        check_opcheck(NAMESPACES[backend.name].ctc_greedy.default, x.double(), None, 3)
    if backend.name == "cpu":
        check_opcheck(torch.ops.pydl.ctc_beam.default, x, lengths.int(), 4, 0, 3, -INF)


def test_vmap_of_greedy():
    x = log_probs(3, 7, 2, 5)
    mapped = torch.func.vmap(lambda t: ops.ctc_greedy_decode(t, [7, 4])[0])(x)
    for one, many in zip(x, mapped, strict=True):
        assert_same_bits(ops.ctc_greedy_decode(one, [7, 4])[0], many)


@pytest.mark.parametrize("name", [GREEDY, BEAM])
def test_compile(name):
    op = getattr(ops, name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, lengths: op(x, lengths, blank=1), fullgraph=True, backend="aot_eager")
    for frames, items in ((9, 2), (12, 3)):
        x, lengths = log_probs(frames, items, 6, seed=items), torch.tensor([frames - n for n in range(items)])
        for a, b in zip(compiled(x, lengths), op(x, lengths, blank=1), strict=True):
            assert_same_bits(a, b)
            assert a.stride() == b.stride()
