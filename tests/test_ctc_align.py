"""ctc_forced_align on every backend: paths, scores, ties, gradients, items without a path, errors, compilation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from _backends import available, backends_and_dtypes, backends_for
from _checks import assert_same_bits, check_cases, check_compile, check_layouts, check_opcheck

from pydl import ops
from pydl.reference.ctc_align import align_item, cases, ctc_forced_align

OP = "ctc_forced_align"
CASES = {case.name: case for case in cases()}
TORCH = ("torch",)
INF, NAN = math.inf, math.nan
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}


def problem(frames, items, classes, labels, seed=0, ulp=1 / 16):
    """Log-probabilities whose sums are exact, so that every backend sees the same ties; labels with repeats."""
    rng = np.random.default_rng(seed)
    x = -np.round(rng.gamma(1.0, 2.0, (frames, items, classes)) / ulp) * ulp
    targets = rng.integers(1, classes, (items, labels))
    return torch.from_numpy(x).float(), torch.from_numpy(targets)


def brute_force(log_probs, labels, blank):
    """The best of all C^T paths by enumeration; (score, path), ties to the path that is further along at the end."""
    frames, classes = log_probs.shape
    best = (-INF, (), None)
    for path in itertools.product(range(classes), repeat=frames):
        merged = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
        if [c for c in merged if c != blank] != list(labels):
            continue
        score = sum(log_probs[t, c] for t, c in enumerate(path))
        # states along the path, from the last frame backwards: how far it is along
        seen, states = 0, []
        for t, c in enumerate(path):
            seen += c != blank and (t == 0 or c != path[t - 1])
            states.append(2 * seen - (c != blank))
        best = max(best, (score, tuple(states[::-1]), path))
    return best


# values against the oracle, and the oracle against enumeration


def test_the_oracle_is_the_best_of_all_paths():
    rng = np.random.default_rng(5)
    ties = 0
    for trial in range(60):
        frames, classes = int(rng.integers(1, 7)), int(rng.integers(2, 4))
        blank = int(rng.integers(0, classes))
        labels = [c for c in rng.integers(0, classes, rng.integers(0, 4)) if c != blank]
        # integers: sums are exact and often equal; every third trial without ties
        x = -rng.integers(1, 4, (frames, classes)).astype(float) if trial % 3 else -rng.gamma(1, 2, (frames, classes))
        score, _, path = brute_force(x, labels, blank)
        found = align_item(x, np.array(labels, dtype=np.int64), blank)
        if path is None:
            assert found is None
            continue
        assert found.tolist() == list(path)
        assert np.isclose(x[np.arange(frames), found].sum(), score)
        ties += 1
    assert ties > 30


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_values(backend, dtype):
    # on a GPU an item without a path is no error; nor is it one of the cases
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, CASES["ragged"], levels=("values",))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_edge_sizes(backend):
    # labels around the 16 of a word and the 24 that a warp answers for; frames around a word's 8 and a walk's 32
    for labels, frames in itertools.product((1, 2, 15, 16, 17, 23, 24, 25, 48), (1, 2, 8, 9, 10, 32, 33, 34, 66)):
        if labels > frames // 2 + 1:
            continue
        x, targets = problem(frames, 2, 5, labels, seed=labels * 100 + frames)
        need = labels + int((targets[:, 1:] == targets[:, :-1]).sum(1).max())
        if need > frames:
            continue
        lengths = [frames, max(need, frames - 3)]
        alignment, scores = backend(x.to(backend.device), targets.to(backend.device), lengths, [labels, labels])
        expected = ctc_forced_align(x.double().numpy(), targets.numpy(), lengths, [labels, labels])
        assert np.array_equal(alignment.cpu().numpy(), expected[0]), (labels, frames)
        assert np.array_equal(scores.double().cpu().numpy(), expected[1]), (labels, frames)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize(
    "longest", [383, 384, 767, 768]
)  # 16 and 32 warps of 24, the most of each kernel, and one more
def test_long_targets_and_short_items(backend, longest):
    # the kernel is chosen by the longest target that might come; the items themselves are short
    dtype = torch.float64 if longest < 400 else torch.float32
    x, _ = problem(longest, 2, 4, 1)
    targets = torch.full((2, longest), -7)
    targets[:, :30] = torch.arange(30) % 3 + 1
    x = x.to(backend.device, dtype)
    alignment, scores = backend(x, targets.to(backend.device), [75, 40], [30, 26])
    expected = ctc_forced_align(x.double().cpu().numpy(), targets.numpy(), [75, 40], [30, 26])
    assert np.array_equal(alignment.cpu().numpy(), expected[0])
    assert np.array_equal(scores.double().cpu().numpy(), expected[1])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("simt", *TORCH)))
def test_a_long_recording(backend):
    # 2,000 labels in 6,000 frames with sums near -2e4, where float32 has steps of 1/512
    generator = torch.Generator().manual_seed(3)
    x = (2 * torch.randn(6000, 1, 40, generator=generator, dtype=torch.float64)).log_softmax(-1)
    targets = torch.randint(1, 40, (1, 2000), generator=generator)
    exact, exact_scores = ops.ctc_forced_align(x, targets, [6000], [2000])
    alignment, scores = backend(x.float().to(backend.device), targets.to(backend.device), [6000], [2000])
    same = (alignment.cpu() == exact).double().mean()
    assert same > 0.99
    assert scores.sum().cpu().double() == pytest.approx(float(exact_scores.sum()), rel=1e-6)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_equal_paths(backend):
    # all paths are equal: as early as possible through the labels, a blank only where a repeat needs it
    x = torch.full((9, 1, 4), -1.25, device=backend.device)
    alignment, _ = backend(x, torch.tensor([[2, 2, 3]], device=backend.device), [9], [3])
    assert alignment.tolist() == [[2, 0, 2, 3, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_infinite_scores(backend):
    # +inf, -inf and NaN: the path goes where the sum is largest and never through NaN
    x = torch.full((4, 1, 3), -1.0)
    x[1, 0] = torch.tensor([NAN, -5.0, NAN])
    x[2, 0] = torch.tensor([-INF, -INF, -3.0])
    alignment, scores = backend(x.to(backend.device), torch.tensor([[1, 2]], device=backend.device), [4], [2])
    assert alignment.tolist() == [[1, 1, 2, 0]] or alignment.tolist() == [[0, 1, 2, 0]]
    assert scores.sum() == -10
    x[3, 0, 2] = INF
    alignment, scores = backend(x.to(backend.device), torch.tensor([[1, 2]], device=backend.device), [4], [2])
    assert alignment[0, 3] == 2 and scores[0, 3] == INF


def test_every_thread_count_gives_the_same_bits():
    x, targets = problem(90, 7, 11, 13)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.ctc_forced_align(x, targets, [90] * 7, [13] * 7))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


# gradients of the scores


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
def test_gradients(backend):
    case = CASES["ragged"]
    x = torch.from_numpy(case.args[0]).to(backend.device).requires_grad_()
    args = [torch.from_numpy(a).to(backend.device) for a in case.args[1:]]
    alignment, scores = backend(x, *args)
    assert not alignment.requires_grad
    weights = torch.arange(1.0, scores.numel() + 1, device=x.device, dtype=x.dtype).reshape(scores.shape)
    (dx,) = torch.autograd.grad(scores, x, weights, create_graph=True)
    expected = torch.zeros_like(x)
    for n, t in itertools.product(range(4), range(20)):
        if alignment[n, t] >= 0:
            expected[t, n, alignment[n, t]] = weights[n, t]
    assert torch.equal(dx, expected)
    assert dx.dtype == x.dtype


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
def test_gradcheck(backend):
    x, targets = problem(7, 2, 4, 3)
    # distinct sums: no tie that a small change would break
    x = (x.double() - torch.rand(x.shape, dtype=torch.float64)).to(backend.device).requires_grad_()
    targets = targets.to(backend.device)
    assert torch.autograd.gradcheck(lambda t: backend(t, targets, [7, 6], [3, 2])[1], (x,))
    assert torch.autograd.gradgradcheck(lambda t: backend(t, targets, [7, 6], [3, 2])[1] ** 2, (x,))


@pytest.mark.parametrize("backend", backends_for(OP, torch.bfloat16))
def test_gradient_of_low_precision_has_its_dtype(backend):
    x, targets = problem(7, 1, 4, 3)
    x = x.to(backend.device, torch.bfloat16).requires_grad_()
    _, scores = backend(x, targets.to(backend.device), [7], [3])
    assert scores.dtype == torch.float32
    (dx,) = torch.autograd.grad(scores.sum(), x)
    assert dx.dtype == torch.bfloat16 and dx.sum() == 7


# items without a path, bad labels and lengths


def no_path():
    x, _ = problem(6, 3, 4, 1)
    x[2, 1] = -INF
    targets = torch.tensor([[1, 2, 3], [1, 2, 3], [2, 2, 2]])
    return x, targets


HOST = [b for b in available(OP) if b.name in ("cpu", "torch")]
DEVICE = [b for b in available(OP) if b.name in ("simt", "cuda")]


@pytest.mark.parametrize("backend", HOST, ids=str)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(), "item 1: every alignment with its 3 labels has probability zero"),
        (
            dict(input_lengths=[6, 2, 4]),
            "item 1: 3 labels, 0 of them repeats, need at least 3 frames, got input length 2",
        ),
        (
            dict(input_lengths=[6, 2, 4], target_lengths=[3, 2, 3]),
            "item 2: 3 labels, 2 of them repeats, need at least 5",
        ),
        (dict(input_lengths=[6, 0, 6]), "item 1: 3 labels"),
        (dict(input_lengths=[6, 7, 6]), "item 1: input length 7 must be in [0, T=6]"),
        (dict(input_lengths=[-1, 6, 6]), "item 0: input length -1"),
        (dict(target_lengths=[3, 3, 4]), "item 2: target length 4 must be in [0, S=3]"),
        (dict(target_lengths=torch.tensor([3, -2, 3])), "item 1: target length -2"),
        (dict(blank=3), "item 0: label 3 at position 2 must be in [0, C=4) and not the blank 3"),
        (
            dict(targets=torch.tensor([[1, 2, 3], [1, 4, 3], [2, 2, 2]])),
            "item 1: label 4 at position 1 must be in [0, C=4)",
        ),
        (dict(targets=torch.tensor([[1, 2, 3], [1, 3, -1], [2, 2, 2]]).int()), "item 1: label -1 at position 2"),
        (dict(targets=torch.arange(8) % 3 + 1), "as many labels as target_lengths say, 9, got 8"),
        (dict(targets=torch.arange(10) % 3 + 1), "as many labels as target_lengths say, 9, got 10"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_values_are_named_on_the_host(backend, change, says):
    x, targets = no_path()
    args = dict(log_probs=x, targets=targets, input_lengths=[6, 6, 6], target_lengths=[3, 3, 3]) | change
    with pytest.raises(ValueError) as raised:
        backend(**args)
    assert says in str(raised.value) and str(raised.value).startswith("ctc_forced_align: ")
    # torch's ctc_loss raises RuntimeError for lengths: code that expects one keeps working
    assert isinstance(raised.value, RuntimeError)


@pytest.mark.parametrize("backend", DEVICE, ids=str)
def test_items_without_a_path_on_a_device(backend):
    x, targets = no_path()
    alignment, scores = backend(x.to(backend.device), targets.to(backend.device), [6, 6, 4], [3, 3, 3])
    assert (alignment[0] >= 0).all() and scores[0].isfinite().all()
    assert (alignment[1:] == -1).all()
    assert (scores[1] == -INF).all() and scores[2].tolist() == [-INF] * 4 + [0, 0]
    alignment, scores = backend(x.to(backend.device), targets.to(backend.device), [0, 2, 6], [0, 3, 0])
    assert (alignment[0] == -1).all() and (scores[0] == 0).all()
    assert scores[1].tolist() == [-INF] * 2 + [0] * 4
    assert (alignment[2] == 0).all()


@pytest.mark.parametrize("backend", DEVICE, ids=str)
@pytest.mark.parametrize("wild", [-1, 4, 2**31, -(2**40), 2**62])
def test_wild_values_on_a_device_stay_in_memory(backend, wild):
    x, targets = problem(9, 4, 4, 3)
    x, device = x.to(backend.device), backend.device
    good, good_scores = backend(x, targets.to(device), [9] * 4, [3] * 4)
    for name in ("targets", "input_lengths", "target_lengths"):
        if wild == 4 and name == "input_lengths":
            continue
        args = dict(targets=targets.clone(), input_lengths=torch.full((4,), 9), target_lengths=torch.full((4,), 3))
        args[name].view(4, -1)[1, -1] = wild
        alignment, scores = backend(x, **{k: v.to(device) for k, v in args.items()})
        assert (alignment[1] == -1).all() and scores[1].isnan().all()
        for n in (0, 2, 3):
            assert_same_bits(alignment[n], good[n])
            assert_same_bits(scores[n], good_scores[n])
    # one after the other: a bad length counts as none, so that others keep their labels or are bad themselves
    flat, lengths = targets.flatten().to(device), torch.tensor([3, wild, 3, 3], device=device)
    alignment, scores = backend(x, flat, [9] * 4, lengths)
    assert_same_bits(alignment[0], good[0])
    assert wild == 4 or (alignment[1] == -1).all()
    assert ((alignment >= -1) & (alignment < 4)).all()


# arguments


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_forms_of_the_arguments(backend):
    x, targets = problem(12, 3, 5, 4)
    x, targets = x.to(backend.device), targets.to(backend.device)
    expected = backend(x, targets, [12, 11, 12], [4, 3, 2])
    flat = torch.cat([targets[n, :v] for n, v in enumerate((4, 3, 2))])
    inputs, lengths = torch.tensor([12, 11, 12]), torch.tensor([4, 3, 2])
    for args in (
        (targets, (12, 11, 12), (4, 3, 2)),
        (targets.int(), inputs.int(), lengths.short()),
        (targets.float(), inputs[:, None], [np.int64(4), lengths[1], 2]),
        (targets.t().contiguous().t(), inputs.to(backend.device), lengths),
        (flat, inputs, [4, 3, 2]),
        (flat.int(), [12, 11, 12], lengths.to(backend.device)),
        (torch.stack((flat, flat), 1)[:, 0], inputs, lengths.repeat_interleave(2)[::2]),
    ):
        for a, b in zip(backend(x, *args), expected, strict=True):
            assert_same_bits(a, b)
    alone = backend(x[:, 0], targets[0], torch.tensor(12), torch.tensor(4))
    for a, b in zip(alone, expected, strict=True):
        assert_same_bits(a, b[0])
    by_keyword = backend(log_probs=x[:, 0], targets=targets[:1], input_lengths=[12], target_lengths=[4], blank=0)
    assert_same_bits(by_keyword[0], expected[0][0])
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(backend(transposed, targets, [12, 11, 12], [4, 3, 2])[1], expected[1])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(log_probs=[1.0]), TypeError, ["log_probs", "list"]),
        (dict(log_probs=torch.zeros(4)), RuntimeError, ["log_probs", "[4]"]),
        (dict(log_probs=torch.zeros(1, 4, 2, 3)), RuntimeError, ["log_probs", "[1, 4, 2, 3]"]),
        (dict(log_probs=torch.zeros(4, 2, 3, dtype=torch.int64)), RuntimeError, ["log_probs", "int64"]),
        (dict(targets=[1, 2]), TypeError, ["targets", "list"]),
        (dict(targets=torch.tensor(1)), RuntimeError, ["targets", "[]"]),
        (dict(targets=torch.ones(3, 1).long()), RuntimeError, ["targets", "2 items", "[3, 1]"]),
        (dict(input_lengths=4), TypeError, ["input_lengths", "4"]),
        (dict(input_lengths=[4.0, 4.0]), TypeError, ["input_lengths", "4.0"]),
        (dict(input_lengths=[True, True]), TypeError, ["input_lengths", "True"]),
        (
            dict(input_lengths=torch.ones(2), target_lengths=torch.ones(2).int()),
            RuntimeError,
            ["input_lengths", "float32"],
        ),
        (dict(target_lengths=[1]), RuntimeError, ["target_lengths", "2 items", "1"]),
        (dict(target_lengths=None), TypeError, ["target_lengths", "None"]),
        (dict(blank=3), RuntimeError, ["blank", "C=3", "3"]),
        (dict(blank=-1), RuntimeError, ["blank", "-1"]),
        (dict(blank=0.0), TypeError, ["blank", "0.0"]),
        (dict(blank=True), TypeError, ["blank", "True"]),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, list) else "",
)
def test_errors(change, error, says):
    args = dict(log_probs=torch.zeros(4, 2, 3), targets=torch.ones(2, 1).long(), input_lengths=[4, 4])
    args |= dict(target_lengths=[1, 1]) | change
    with pytest.raises(error) as raised:
        ops.ctc_forced_align(**args)
    for part in ("ctc_forced_align", *says):
        assert part in str(raised.value)
    # torch's own CTC op refuses all of them with the same class
    with pytest.raises(error):
        torch.nn.functional.ctc_loss(**args)


@pytest.mark.parametrize("backend", [b for b in available(OP) if b.name in NAMESPACES], ids=str)
def test_raw_operators_refuse_what_they_cannot_read(backend):
    op = NAMESPACES[backend.name].ctc_align
    x = torch.zeros(4, 2, 3, device=backend.device)
    targets, two = torch.ones(2, 1, dtype=torch.int64, device=backend.device), torch.tensor([1, 1]).to(backend.device)
    calls = [
        (x[0], targets, two, two, 0, 1),
        (x.long(), targets, two, two, 0, 1),
        (x, targets[:1], two, two, 0, 1),
        (x, targets[None], two, two, 0, 1),
        (x, targets.float(), two, two, 0, 1),
        (x, targets, two[:1], two, 0, 1),
        (x, targets, two, two.float(), 0, 1),
        (x, targets, two, two, 3, 1),
        (x, targets, two, two, -1, 1),
        (x[..., :0], targets, two, two, 0, 1),
    ]
    with backend.use():
        for args in calls:
            with pytest.raises(RuntimeError):
                op(*args)
        # a wrong hint of the longest target is no way out of memory
        for longest in (-5, 0, 2**62):
            _, alignment = op(x, targets, two, two, 0, longest)
            assert ((alignment >= -1) & (alignment < 3)).all()


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available(OP) if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend):
    op = NAMESPACES[backend.name].ctc_align.default
    x, targets = problem(9, 2, 4, 3)
    lengths = torch.tensor([9, 8]), torch.tensor([3, 2], dtype=torch.int32)
    with backend.use():
        check_opcheck(op, x, targets, *lengths, 0, 3)
        check_opcheck(op, x.double().requires_grad_(), targets[0], lengths[0][:1].repeat(2), torch.tensor([2, 1]), 0, 3)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("simt", *TORCH)))
def test_compile(backend):
    shapes = []
    for frames, items, labels in ((9, 2, 3), (11, 3, 4)):
        x, _ = problem(frames, items, 5, labels)
        shapes.append([x.to(backend.device)])

    def scores(x):
        frames, items = x.shape[:2]
        targets = torch.arange(items * 3, device=x.device).reshape(items, 3) % 4 + 1
        lengths = torch.full((items,), frames), torch.full((items,), 3)
        with torch.no_grad():
            alignment, _ = ops.ctc_forced_align(x, targets, *lengths)
        return ops.ctc_forced_align(x, targets, *lengths)[1] + alignment

    check_compile(scores, shapes)


def test_compile_with_lengths_of_the_host():
    x, targets = problem(9, 2, 5, 3)
    compiled = torch.compile(
        lambda t: ops.ctc_forced_align(t, targets, [9, 8], (3, 2)), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(compiled(x), ops.ctc_forced_align(x, targets, [9, 8], (3, 2)), strict=True):
        assert_same_bits(a, b)


def test_transforms_and_no_item():
    x, targets = problem(9, 2, 5, 3)
    dx = torch.func.grad(lambda t: ops.ctc_forced_align(t, targets, [9, 8], [3, 2])[1].sum())(x)
    assert dx.sum() == 17
    batch = torch.stack((x, x.flip(0)))
    mapped = torch.func.vmap(lambda t: ops.ctc_forced_align(t, targets, [9, 8], [3, 2])[1])(batch)
    assert_same_bits(mapped[1], ops.ctc_forced_align(batch[1], targets, [9, 8], [3, 2])[1])
    leaf = torch.zeros(4, 0, 3, requires_grad=True)
    _, scores = ops.ctc_forced_align(leaf, torch.zeros(0, 2, dtype=torch.int64), [], [])
    assert scores.shape == (0, 4)
    assert torch.autograd.grad(scores.sum(), leaf)[0].shape == leaf.shape
