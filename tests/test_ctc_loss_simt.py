"""The CUDA sources of the CTC loss, run by the SIMT host runner: every kernel variant against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from _simt import UNDER_ASAN, check_sanitized, load_simt_library

from pydl import ops  # noqa: F401  (defines the schemas of pydl_simt)

INF, NAN = float("inf"), float("nan")
# Labels at the ends of the kernels' ranges: one warp for each direction holds 31, four hold 127 with one label per
# thread, eight hold 511 with two. 100 and 300 leave threads and warps idle; 5 and 0 most of them.
COUNTS = (0, 1, 5, 31, 32, 100, 127, 128, 300, 511, 512)
if UNDER_ASAN:  # about ten times slower
    COUNTS = (0, 5, 31, 32, 128)
# In float64 255 labels take two per thread, 1,023 eight; 1,024 are more than registers hold.
WIDE_COUNTS = (31, 128, 255, 256, 1024) if not UNDER_ASAN else (128, 1024)


@pytest.fixture(scope="module", autouse=True)
def simt():
    load_simt_library()
    return torch.ops.pydl_simt


def problem(frames, lengths, classes, dtype=torch.float32, seed=0, spread=1.0):
    """Log-probabilities [T, N, C] of the dtype, and targets [N, S] without neighbours that are equal."""
    generator = torch.Generator().manual_seed(seed)
    n, most = len(lengths), max(lengths)
    x = spread * torch.randn(max(frames), n, classes, generator=generator, dtype=torch.float64)
    steps = torch.randint(1, classes - 1, (n, most), generator=generator)  # from one label to the next, modulo C - 1
    targets = 1 + steps.cumsum(1) % (classes - 1)
    return x.log_softmax(-1).to(dtype), targets, torch.tensor(frames), torch.tensor(lengths)


def torchs(x, targets, frames, lengths, reduction, zero_infinity):
    leaf = x.detach().requires_grad_()
    loss = F.ctc_loss(leaf, targets.long(), frames, lengths, 0, reduction, zero_infinity)
    return loss.detach().double(), torch.autograd.grad(loss.sum(), leaf)[0].double()


def expected(x, targets, frames, lengths, reduction="none", zero_infinity=False):
    """Torch's (loss, gradient) in float64, and how far its float32 is from them."""
    wanted = torchs(x.double(), targets, frames, lengths, reduction, zero_infinity)
    single = torchs(x.float(), targets, frames, lengths, reduction, zero_infinity)
    errors = [(a - b)[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0 for a, b in zip(single, wanted)]
    return (*wanted, *errors)


def run(simt, x, targets, frames, lengths, *, most=None, logits=False, zero_infinity=False, reduction=0, dloss=None):
    """(loss, gradient) of the raw operators; the loss-only operator must agree."""
    most = targets.shape[-1] if most is None else most
    arguments = (x, targets, frames, lengths)
    loss, *kept = simt.ctc_loss_fwd(*arguments, 0, most, logits, zero_infinity, reduction)
    value = simt.ctc_loss_value(*arguments, 0, most, logits, zero_infinity, reduction)
    assert torch.equal(loss.nan_to_num(nan=123.0), value.nan_to_num(nan=123.0))
    dloss = torch.ones_like(loss) if dloss is None else dloss
    return loss, simt.ctc_loss_bwd(dloss, *arguments, *kept, 0, logits, zero_infinity, reduction)


def assert_right(result, wanted, dtype=torch.float32):
    """At most twice torch's error in float32 (three times in the gradient), and the last bits of the dtype."""
    (loss, dx), (wanted_loss, wanted_dx, loss_error, dx_error) = result, wanted
    bits = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=5e-7, atol=2 * loss_error, equal_nan=True)
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=2 * bits, atol=3 * dx_error + 2 * bits, equal_nan=True)


# every kernel


@pytest.mark.parametrize("labels", COUNTS)
def test_values_at_the_ends_of_the_kernels_ranges(simt, labels):
    arguments = problem((labels + 9, labels + 3, labels), (labels, labels, max(labels - 1, 0)), 7)
    assert_right(run(simt, *arguments), expected(*arguments))


@pytest.mark.parametrize("labels", WIDE_COUNTS)
def test_values_in_float64(simt, labels):
    arguments = problem((labels + 5,), (labels,), 5, torch.float64)
    loss, dx = run(simt, *arguments)
    wanted_loss, wanted_dx, *_ = expected(*arguments)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(dx, wanted_dx, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.skipif(UNDER_ASAN, reason="the kernels of test_values_in_float64 with more threads")
@pytest.mark.parametrize("labels", [2047, 2048])
def test_values_of_the_longest_targets_in_registers_and_one_more(simt, labels):
    arguments = problem((labels + 4,), (labels,), 5)
    assert_right(run(simt, *arguments), expected(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_in_half_precision(simt, dtype):
    for labels in (5, 40, 130):
        arguments = problem((labels + 20, labels + 4), (labels, labels), 9, dtype)
        loss, dx = run(simt, *arguments)
        assert loss.dtype == torch.float32 and dx.dtype == dtype
        assert_right((loss, dx), expected(*arguments), dtype)


def test_values_of_short_and_long_items_in_one_launch(simt):
    """The longest decides the launch: its neighbours leave most threads idle, or take the other of its two variants."""
    lengths = (3, 0, 520, 40) if not UNDER_ASAN else (3, 0, 70, 40)
    x, targets, frames, lengths = problem((530, 80, 525, 90), lengths, 6)
    wanted = expected(x, targets, frames, lengths)
    assert_right(run(simt, x, targets, frames, lengths), wanted)
    flat = torch.cat([row[:length] for row, length in zip(targets, lengths.tolist(), strict=True)])
    # nobody knows the longest: the number of all labels bounds it, here with room for states in global memory
    most = 3000 if UNDER_ASAN else flat.numel()
    padded = torch.cat([flat, flat.new_full((3000 - flat.numel(),), -1)])
    for given in (flat, padded):
        assert_right(run(simt, x, given, frames, lengths, most=most), wanted)


@pytest.mark.parametrize("classes", [2, 31, 511, 512, 513, 1024, 1025])
def test_values_of_many_classes(simt, classes):
    """Chunks of 512 in the backward; up to 1,024 a warp adds up a frame's logits, beyond that a block."""
    x, _, frames, lengths = problem((9, 7), (3, 2), max(classes, 3))
    x = x[..., :classes]
    targets = torch.tensor([[1, classes - 1, 1], [classes - 1, classes // 2 or 1, 7]])
    frames = frames + 2
    x = torch.cat([x, x[:2]])
    assert_right(run(simt, x, targets, frames, lengths), expected(x, targets, frames, lengths))
    logits = x * 3 + 5
    wanted = expected(logits.double().log_softmax(-1), targets, frames, lengths)
    # their logsumexp, below 32, is kept in float32: 2^-20 in each of eleven frames
    wanted = (*wanted[:2], wanted[2] + 11 * 2**-20, wanted[3] + 2**-19)
    assert_right(run(simt, logits, targets, frames, lengths, logits=True), wanted)


@pytest.mark.parametrize("frames", [1, 2, 3, 15, 16, 17, 31, 32, 33, 34, 63, 64, 65, 66, 97])
def test_values_at_the_ends_of_periods(simt, frames):
    """Sixteen frames have one shift, counted from both ends; one frame has no front half."""
    for labels in (1, 40):
        arguments = problem((frames, max(frames - 1, 0)), (min(labels, frames), 1), 5, seed=frames)
        x, targets, lengths, counts = arguments
        targets = torch.cat([targets, targets.new_zeros(2, 40)], 1)[:, :labels]
        arguments = (x, targets.clamp(min=1), lengths, counts.clamp(max=labels))
        assert_right(run(simt, *arguments), expected(*arguments))


# numerics


@pytest.mark.parametrize("mean", [-1000.0, -30.0, 0.0, 50.0])
def test_values_far_from_normalised(simt, mean):
    """x need not be log-probabilities: every frame drifts by `mean`, which the shifts follow."""
    x, targets, frames, lengths = problem((120, 77), (20, 33), 6)
    x = x + mean
    loss, dx = run(simt, x, targets, frames, lengths)
    wanted_loss, wanted_dx, loss_error, _ = expected(x, targets, frames, lengths)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=5e-7, atol=2 * loss_error)
    if mean <= 0:  # e^50 would leave no digit of the posterior
        single = torchs(x, targets, frames, lengths, "none", False)[1]
        p = x.double().exp()
        error, torchs_error = ((p - g.double() - (p - wanted_dx)).abs().max() for g in (dx, single))
        assert error <= 3 * torchs_error, (error, torchs_error)


def test_values_with_probabilities_of_exactly_zero_and_one(simt):
    x = torch.full((8, 3, 4), -INF)
    path = torch.tensor([0, 1, 1, 0, 1, 2, 2, 0])
    x[torch.arange(8), :, path] = 0.0
    targets = torch.tensor([[1, 1, 2], [1, 2, 3], [2, 1, 0]])
    loss, dx = run(simt, x, targets, torch.tensor([8, 8, 8]), torch.tensor([3, 3, 2]))
    assert loss.tolist() == [0.0, INF, INF]
    assert dx[:, 0].eq(0).all() and dx[:, 1:].isnan().all()
    loss, dx = run(simt, x, targets, torch.tensor([8, 8, 8]), torch.tensor([3, 3, 2]), zero_infinity=True)
    assert loss.tolist() == [0.0, 0.0, 0.0] and dx.eq(0).all()


@pytest.mark.parametrize("labels", [4, 40, 140])
def test_values_of_one_alignment(simt, labels):
    """Equal labels need a blank between them: 2 L - 1 frames have one path, one frame fewer has none."""
    x = torch.randn(2 * labels - 1, 2, 3).log_softmax(-1)
    targets, lengths = torch.full((2, labels), 2, dtype=torch.int32), torch.tensor([labels, labels])
    frames = torch.tensor([2 * labels - 1, 2 * labels - 2])
    loss, dx = run(simt, x, targets, frames, lengths)
    path = torch.tensor([2, 0]).repeat(labels)[:-1]
    torch.testing.assert_close(loss[0], -x[torch.arange(2 * labels - 1), 0, path].sum())
    assert loss[1] == INF and dx[:-1, 1].isnan().all() and dx[-1, 1].eq(0).all()
    wanted = x[:, 0].exp()
    wanted[torch.arange(2 * labels - 1), path] -= 1
    torch.testing.assert_close(dx[:, 0], wanted, rtol=1e-5, atol=1e-4)


def test_values_without_frames_or_labels(simt):
    x, targets, _, _ = problem((6, 6, 6, 6), (2, 2, 2, 2), 4)
    frames, lengths = torch.tensor([0, 0, 6, 1]), torch.tensor([0, 1, 0, 0])
    loss, dx = run(simt, x, targets, frames, lengths)
    torch.testing.assert_close(loss, torch.tensor([0.0, INF, -x[:, 2, 0].sum(), -x[0, 3, 0]]))
    assert dx[:, :2].eq(0).all() and dx[1:, 3].eq(0).all() and dx[:, 2].ne(0).all()
    for shape in ((0, 2, 3), (5, 0, 3)):
        empty = torch.zeros(shape)
        arguments = (torch.ones(shape[1], 0, dtype=torch.int64), *torch.zeros(2, shape[1], dtype=torch.int64))
        assert run(simt, empty, *arguments)[1].shape == shape
        mean, total = (run(simt, empty, *arguments, reduction=r)[0] for r in (1, 2))
        assert total == 0 and (mean.isnan() if shape[1] == 0 else mean == 0)


def test_values_of_reductions_over_more_items_than_threads(simt):
    x, targets, frames, lengths = problem((4,) * 150, (1, 2, 3, 0, 3) * 30, 5)
    targets[7, 1:] = targets[7, 0]  # two equal labels and frames for one: infinite
    frames[7] = 3
    lengths[7] = 3
    for reduction, name in enumerate(("none", "mean", "sum")):
        for zero in (True, False):
            loss, dx = run(simt, x, targets, frames, lengths, reduction=reduction, zero_infinity=zero)
            assert_right((loss, dx), expected(x, targets, frames, lengths, name, zero))


# layouts


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_values_of_strided_inputs(simt, order):
    x, targets, frames, lengths = problem((40, 33, 40), (9, 4, 12), 11)
    wanted = expected(x, targets, frames, lengths)
    inverse = [order.index(d) for d in range(3)]
    spaced = torch.full([2 * x.shape[d] for d in order], NAN)[::2, ::2, ::2].copy_(x.permute(order))
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    for given in (x.permute(order).contiguous().permute(inverse), spaced.permute(inverse)):
        for labels in (targets, targets.t().contiguous().t(), targets.int().repeat_interleave(2, 1)[:, ::2]):
            result = run(simt, given, labels, frames.int(), lengths)
            assert_right(result, wanted)
            dense_by_item = given.stride() == swapped.stride()
            assert result[1].stride() == (swapped if dense_by_item else x).stride()
    expanded = x[:, :1].expand(-1, 3, -1)
    wanted = expected(expanded, targets, frames, lengths)
    dloss = torch.ones(()).expand(3)
    assert_right(run(simt, expanded, targets, frames, lengths.int(), dloss=dloss), wanted)


@pytest.mark.no_poison
@pytest.mark.skipif(UNDER_ASAN, reason="8 GiB of address space would need 1 GiB of shadow memory")
def test_values_of_classes_2_to_31_elements_apart(simt):
    """Offsets of classes need 64 bits: the states are in global memory. Of the tensor only a few pages are touched."""
    x, targets, frames, lengths = problem((30, 50), (6, 40), 4, torch.float16)
    far = torch.empty(4 * 2**30, dtype=torch.float16).as_strided(x.shape, (2, 1, 2**30)).copy_(x)
    assert_right(run(simt, far, targets, frames, lengths), expected(x, targets, frames, lengths), torch.float16)
    result = run(simt, far, targets, frames, lengths, logits=True)
    assert_right(result, expected(x.double().log_softmax(-1), targets, frames, lengths), torch.float16)


# the order of threads, and garbage


@pytest.mark.parametrize("labels", [20, 100, 300])
def test_values_do_not_depend_on_the_order_of_threads(simt, labels, monkeypatch):
    """A missing barrier shows as another result for some order; 35 frames are two periods for each half."""
    arguments = problem((labels + 35, labels + 3), (labels, labels - 7), 5)
    results = []
    for seed in range(2 if UNDER_ASAN else 4):
        monkeypatch.setenv("PYDL_SIMT_SEED", str(seed))
        results.append(run(simt, *arguments, reduction=1))
    for loss, dx in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(dx, results[0][1])
    assert_right(results[0], expected(*arguments, "mean"))


BAD = {
    "label below": lambda t, f, s: t[1].__setitem__(2, -1),
    "label above": lambda t, f, s: t[1].__setitem__(0, 9),
    "label far above": lambda t, f, s: t[1].__setitem__(4, 2**40 + 1),
    "blank": lambda t, f, s: t[1].__setitem__(4, 0),
    "frames above": lambda t, f, s: f.__setitem__(1, 41),
    "frames far above": lambda t, f, s: f.__setitem__(1, 2**62),
    "frames below": lambda t, f, s: f.__setitem__(1, -(2**62)),
    "length above": lambda t, f, s: s.__setitem__(1, 6),
    "length far above": lambda t, f, s: s.__setitem__(1, 2**62),
    "length below": lambda t, f, s: s.__setitem__(1, -1),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("reduction", [0, 1])
def test_values_of_bad_items_are_nan_and_the_others_untouched(simt, what, reduction):
    x, targets, frames, lengths = problem((40, 31, 40), (5, 5, 5), 9)
    good = run(simt, x, targets, frames, lengths)
    dx = good[1] / 15 if reduction else good[1]
    BAD[what](targets, frames, lengths)
    for zero_infinity in (False, True):
        result = run(simt, x, targets, frames, lengths, reduction=reduction, zero_infinity=zero_infinity)
        assert result[0].isnan().tolist() == ([False, True, False] if reduction == 0 else True)
        torch.testing.assert_close(result[1][:, [0, 2]], dx[:, [0, 2]])
        steps = min(max(int(frames[1]), 0), 40)
        assert result[1][:steps, 1].isnan().all() and result[1][steps:, 1].eq(0).all()


def test_values_of_packed_targets_with_bad_lengths(simt):
    """A bad length counts as none, so that the items after it keep their labels."""
    x, _, frames, _ = problem((20,) * 5, (3,) * 5, 9)
    targets, rows = torch.arange(1, 9), torch.tensor([[1, 2, 3], [4, 5, 0], [6, 7, 8]])
    wanted = expected(x[:, [0, 2, 4]], rows, frames[:3], torch.tensor([3, 2, 3]))
    for bad in ((-1, 9), (2**62, 2**62), (9, -5), (-(2**62), 6)):
        lengths = torch.tensor([3, bad[0], 2, bad[1], 3])
        loss, dx = run(simt, x, targets, frames, lengths)
        assert loss.isnan().tolist() == [False, True, False, True, False]
        assert_right((loss[[0, 2, 4]], dx[:, [0, 2, 4]]), wanted)


def test_values_of_a_target_longer_than_promised(simt):
    x, targets, frames, lengths = problem((20, 20), (3, 7), 9)
    loss, _ = run(simt, x, targets, frames, lengths, most=5)
    assert loss.isnan().tolist() == [False, True]


def test_values_with_wild_intermediates_stay_in_memory(simt):
    """Under ASan this is the proof: what the backward is given need not come from the forward."""
    x, targets, frames, lengths = problem((20, 13), (9, 40), 600)
    arguments = (x, targets, frames, lengths)
    loss, nll, rows, lse, chain = simt.ctc_loss_fwd(*arguments, 0, 40, False, False, 0)
    for value in (-1, -(2**31), 2**31 - 1, 9, 40):
        wild = torch.full_like(chain, value)
        simt.ctc_loss_bwd(torch.ones(2), *arguments, torch.ones(2), rows, lse, wild, 0, False, False, 0)
    for label in (-1, 2**40, 600, 0):
        wild = torch.full_like(targets, label)
        dx = simt.ctc_loss_bwd(
            torch.ones(2), x, wild, *arguments[2:], torch.ones(2), rows, lse, chain, 0, False, False, 0
        )
        assert dx.shape == x.shape
    for bad in (-1, 2**62, 41):
        wild = torch.full_like(lengths, bad)
        for pair in ((frames, wild), (wild, lengths)):
            simt.ctc_loss_bwd(torch.ones(2), x, targets, *pair, torch.ones(2), rows, lse, chain, 0, False, False, 0)


def test_errors_of_raw_calls(simt):
    x, targets, frames, lengths = problem((6, 6), (2, 2), 4)
    flags = (False, False, 0)

    def refused(match, *arguments, blank=0, most=2, flags=flags):
        with pytest.raises(RuntimeError, match=match):
            simt.ctc_loss_fwd(*arguments, blank, most, *flags)

    refused("3 dimensions", x[0], targets, frames, lengths)
    refused("float32, float64", x.long(), targets, frames, lengths)
    refused("blank must be", x, targets, frames, lengths, blank=4)
    refused("blank must be", x, targets, frames, lengths, blank=-1)
    refused("int32 or int64", x, targets.double(), frames, lengths)
    refused("int32 or int64", x, targets, frames.double(), lengths)
    refused("1-D or 2 rows", x, targets[:1], frames, lengths)
    refused("lengths must be", x, targets, frames[:1], lengths)
    refused("lengths must be", x, targets, frames, torch.ones(4, dtype=torch.int64)[::2])
    refused("reduction must be", x, targets, frames, lengths, flags=(False, False, 3))
    refused("max_length must not", x, targets, frames, lengths, most=-1)
    _, *kept = simt.ctc_loss_fwd(x, targets, frames, lengths, 0, 2, *flags)

    def refused_backward(match, dloss=None, flags=flags, **changes):
        given = dict(zip(("nll", "rows", "lse", "chain"), kept, strict=True)) | changes
        dloss = torch.ones(2) if dloss is None else dloss
        with pytest.raises(RuntimeError, match=match):
            simt.ctc_loss_bwd(dloss, x, targets, frames, lengths, *given.values(), 0, *flags)

    refused_backward("shape of the loss", torch.ones(3))
    refused_backward("shape of the loss", torch.ones(2), flags=(False, False, 1))
    refused_backward("dloss must be of dtype", torch.ones(2, dtype=torch.float64))
    refused_backward("lse must be", flags=(True, False, 0))
    for name, tensor in zip(("nll", "rows", "chain"), (kept[0], kept[1], kept[3]), strict=True):
        refused_backward(f"{name} must be", **{name: tensor[1:]})
        refused_backward(f"{name} must be", **{name: tensor.double()})


@pytest.mark.slow
@pytest.mark.skipif(UNDER_ASAN, reason="starts the sanitized process itself")
def test_all_of_the_above_under_the_sanitizers():
    check_sanitized(__file__)
