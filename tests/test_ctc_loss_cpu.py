"""What is specific to the CPU kernels of ctc_loss: instruction sets, threads, range, long targets, raw calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pydl import _library, ops  # noqa: F401  (defines the schemas)

ROOT = Path(__file__).resolve().parents[1]
RAW = torch.ops.pydl
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
REDUCTIONS = ["none", "mean", "sum"]
# (T, N, C, S): 2 to 16 lanes of blanks and labels, one vector more, blocks of 16 frames and one frame more
SHAPES = [(1, 1, 2, 1), (2, 3, 3, 1), (16, 2, 5, 7), (17, 3, 67, 8), (40, 2, 16, 15), (33, 5, 20, 16), (100, 2, 33, 48)]
INF = float("inf")


@pytest.fixture(autouse=True, scope="module")
def library():
    if not _library.cpu_library().loaded:
        pytest.skip(_library.cpu_library().reason)


def problem(t, n, c, s, ragged=False, blank=0, spread=1.0):
    """Logits [T, N, C] in float32, targets [N, S], lengths."""
    logits = spread * torch.randn(t, n, c)
    targets = torch.randint(1, c, (n, s))
    targets = torch.where(targets == blank, 0, targets)
    frames, lengths = torch.full((n,), t), torch.full((n,), s)
    if ragged:
        frames, lengths = torch.randint(t // 2, t + 1, (n,)), torch.randint(0, s + 1, (n,))
    return logits, targets, frames, lengths


def most(targets):
    return targets.shape[-1]


def run(x, targets, frames, lengths, blank=0, logits=False, zero_infinity=False, reduction=0):
    """Loss and gradient by the raw operators, and what the forward kept."""
    args = (x, targets, frames, lengths)
    flags = (logits, zero_infinity, reduction)
    loss, *kept = RAW.ctc_loss_fwd(*args, blank, most(targets), *flags)
    assert torch.equal(RAW.ctc_loss_value(*args, blank, most(targets), *flags).nan_to_num(), loss.nan_to_num())
    dx = RAW.ctc_loss_bwd(torch.ones_like(loss), *args, *kept, blank, *flags)
    return loss, dx, kept


def exact(x, targets, frames, lengths, blank=0, logits=False, zero_infinity=False, reduction=0, dtype=torch.float64):
    """Torch's loss and gradient, in float64 unless told."""
    leaf = x.to(dtype).requires_grad_()
    log_probs = leaf.log_softmax(2) if logits else leaf
    loss = F.ctc_loss(log_probs, targets, frames, lengths, blank, REDUCTIONS[reduction], zero_infinity)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def agree(got, wanted, bound):
    assert got.shape == wanted.shape and torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())
    error = (got.double() - wanted).nan_to_num(0, 0, 0).abs().max().item() if got.numel() else 0.0
    assert error <= bound, f"error {error:.2e}, allowed {bound:.2e}"


def check(x, targets, frames, lengths, scale=1.0, **options):
    """Scale: of the logits, whose rounding differs by as much in log-probabilities of float32 and of float64."""
    loss, dx, kept = run(x, targets, frames, lengths, **options)
    wanted, wanted_dx = exact(x, targets, frames, lengths, **options)
    eps = torch.finfo(x.dtype).eps
    compute = (1e-12 if x.dtype == torch.float64 else 2e-6) * scale
    finite = wanted[wanted.isfinite()]
    agree(loss, wanted, compute * max(1.0, finite.abs().max().item() if finite.numel() else 1.0))
    agree(dx, wanted_dx, eps + compute)
    assert dx.dtype == x.dtype and loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    return loss, dx, kept


def check_posteriors(rows, nll, targets, frames, lengths):
    """In every frame of an item with a path the posteriors of its states add up to 1; the first knows two states."""
    s = targets.shape[1]
    table = rows.double().exp2().view(-1, len(frames), 2 * s + 1)
    for n, (t, length) in enumerate(zip(frames.tolist(), lengths.tolist())):
        if nll[n].isinf() or t == 0:
            continue
        states = table[:t, n, : 2 * length + 1]
        torch.testing.assert_close(states.sum(1), torch.ones(t, dtype=torch.float64), rtol=0, atol=2e-5)
        assert states[0, 2:].eq(0).all() and states[-1, :-2].eq(0).all()


def check_everything():
    """All kernels against torch at this process's level, in memory that is NaN before it is written."""
    torch.manual_seed(0)
    for shape in SHAPES:
        for ragged in (False, True):
            logits, targets, frames, lengths = problem(*shape, ragged=ragged)
            for dtype in DTYPES:
                for from_logits in (False, True):
                    x = (logits if from_logits else logits.log_softmax(2)).to(dtype)
                    _, _, kept = check(x, targets, frames, lengths, logits=from_logits)
                    check_posteriors(kept[1], kept[0], targets, frames, lengths)
    check_forms()
    check_range()


def check_forms():
    """The blank anywhere, reductions, concatenated targets, integer types, layouts."""
    for blank in (0, 4, 8):
        logits, targets, frames, lengths = problem(30, 4, 9, 6, ragged=True, blank=blank)
        x = logits.log_softmax(2)
        packed = torch.cat([row[:n] for row, n in zip(targets, lengths)])
        padded = torch.where(torch.arange(6) < lengths[:, None], targets, -(2**31))  # padding is not a label
        for reduction in (0, 1, 2):
            loss, dx, _ = check(x, targets, frames, lengths, blank=blank, reduction=reduction)
            for labels in (packed, packed.int(), padded, padded.int(), padded.t().contiguous().t()):
                other = run(x, labels, frames.int(), lengths.int(), blank=blank, reduction=reduction)
                assert torch.equal(other[0], loss) and torch.equal(other[1], dx)
            turned = x.transpose(0, 1).contiguous().transpose(0, 1)
            wide = torch.stack((x, x), -1)[..., 0]
            for layout in (turned, wide, torch.stack((x, x), 1)[:, 1], torch.cat((x, x), 2)[..., :9]):
                other = run(layout, targets, frames, lengths, blank=blank, reduction=reduction)
                assert torch.equal(other[0], loss) and torch.equal(other[1], dx)
            assert run(turned, targets, frames, lengths, blank=blank)[1].stride() == turned.stride()
    same, targets, frames, lengths = problem(20, 3, 5, 4)
    expanded = same[:1, :1].log_softmax(2).expand(20, 3, 5)
    check(expanded, targets, frames, lengths)


def check_range():
    """Probabilities of 0 and 1, and differences far beyond the range of a float: the answer is torch's in float64."""
    t, c = 60, 6
    targets = torch.tensor([[1, 2, 2, 3], [5, 4, 1, 5]])
    frames, lengths = torch.full((2,), t), torch.full((2,), 4)
    for spread in (30.0, 300.0, 3000.0):
        x = (spread * torch.randn(t, 2, c)).log_softmax(2)
        check(x, targets, frames, lengths)
        check(spread * torch.randn(t, 2, c), targets, frames, lengths, spread, logits=True)
        check(spread + torch.randn(t, 2, c), targets, frames, lengths, logits=True)
    # one class at a time has probability 1: a path or none
    path = torch.tensor([0, 1, 1, 0, 2, 0, 2, 3] + [0] * (t - 8))
    x = torch.full((t, 2, c), -INF)
    x[torch.arange(t), :, path] = 0.0
    loss, dx, _ = run(x, targets, frames, lengths)
    assert loss.tolist() == [0.0, INF] and dx[:, 0].eq(0).all() and dx[:, 1].isnan().all()
    # until frame 30 labels are all but impossible, from then on everything but label 3 is: the path that was 2^-4000
    # times less probable than the blanks is the only one left
    x = torch.full((t, 2, c), -2.0)
    x[:30, :, 1:] = -1000.0
    x[30:, 0] = -INF
    x[30:, 0, 3] = 0.0
    for dtype in (torch.float32, torch.float64):
        loss, dx, _ = run(x.to(dtype), targets, frames, lengths)
        # torch's gradient is NaN for classes of probability 0
        wanted, wanted_dx = exact(x.clamp_min(-1e20), targets, frames, lengths)
        agree(loss, wanted, 1e-7 * wanted.max().item())
        agree(dx, wanted_dx, 1e-6)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_level(level):
    """PYDL_CPU_CAPABILITY is read when the library is loaded: a process for each."""
    env = dict(os.environ, PYDL_CPU_CAPABILITY=level, PYDL_POISON_MEMORY="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    code = "import test_ctc_loss_cpu; test_ctc_loss_cpu.check_everything()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_results(dtype):
    """1 item of 300 frames, and 3 for 2 threads, go by halves; 8 items go one by one."""
    before = torch.get_num_threads()
    problems = [problem(300, n, 70, 40, ragged=n > 1) for n in (1, 3, 8)]
    runs = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results = []
            for logits, *rest in problems:
                for from_logits in (False, True):
                    x = (logits if from_logits else logits.log_softmax(2)).to(dtype)
                    loss, dx, kept = run(x, *rest, logits=from_logits)
                    results += [loss, dx, kept[0], kept[2]]
            runs.append(results)
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("length", [255, 256, 257, 1024, 2500])
def test_long_targets(length):
    """One alignment more than the fewest frames allow, and half as many again; 50 classes make labels repeat."""
    logits, targets, _, lengths = problem(3 * length // 2 if length < 1500 else 2600, 2, 50, length)
    repeats = (targets[:, 1:] == targets[:, :-1]).sum(1)
    frames = torch.tensor([len(logits), min(len(logits), length + int(repeats[1]))])
    x = logits.log_softmax(2)
    loss, dx, kept = run(x, targets, frames, lengths)
    wanted, wanted_dx = exact(x, targets, frames, lengths)
    agree(loss, wanted, 1e-6 * wanted.max().item())
    agree(dx, wanted_dx, 1e-5)
    check_posteriors(kept[1], kept[0], targets, frames, lengths)


@pytest.mark.parametrize("steps", [2600, 20000])
def test_no_drift_over_many_frames(steps):
    """The gradient's error in float32 stays at rounding's size, where torch's grows with T."""
    x, targets, frames, lengths = problem(steps, 1, 20, 100)
    x = x.log_softmax(2)
    _, wanted = exact(x, targets, frames, lengths)
    loss, dx, _ = run(x, targets, frames, lengths)
    _, torchs = exact(x, targets, frames, lengths, dtype=torch.float32)
    error, torchs_error = ((g.double() - wanted).abs().max().item() for g in (dx, torchs))
    assert error < 2e-5 and error <= torchs_error


def test_impossible_targets():
    logits, targets, frames, lengths = problem(6, 3, 4, 5)
    targets[:] = 2
    frames, lengths = torch.tensor([6, 6, 0]), torch.tensor([5, 3, 0])
    for zero_infinity in (False, True):
        for from_logits in (False, True):
            x = logits if from_logits else logits.log_softmax(2)
            loss, dx, _ = run(x, targets, frames, lengths, logits=from_logits, zero_infinity=zero_infinity)
            assert loss[0].item() == (0.0 if zero_infinity else INF) and loss[1].isfinite() and loss[2] == 0
            assert dx[:, 0].eq(0).all() if zero_infinity else dx[:, 0].isnan().all()
            assert dx[:, 1].isfinite().all() and dx[:, 1].any() and dx[:, 2].eq(0).all()


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("at", [(0, 1, 0), (29, 1, slice(None)), (14, 1, "label")])
def test_nan_reaches_its_item_alone(logits, at):
    """Of the blank, of all classes, of one label; zero_infinity is for infinite losses."""
    x, targets, frames, lengths = problem(30, 3, 8, 4)
    x = x if logits else x.log_softmax(2)
    x[at[0], at[1], targets[1, 2] if at[2] == "label" else at[2]] = float("nan")
    loss, dx, _ = run(x, targets, frames, lengths, logits=logits, zero_infinity=True)
    assert loss.isnan().tolist() == [False, True, False]
    assert dx[:, 1].isnan().all() and dx[:, ::2].isfinite().all()


def test_empty_batches():
    none = torch.zeros(0, dtype=torch.int64)
    for shape in ((5, 0, 3), (0, 0, 3)):
        x = torch.zeros(shape)
        assert run(x, torch.zeros(0, 2).long(), none, none)[0].shape == (0,)
        assert run(x, none, none, none, reduction=1)[0].isnan() and run(x, none, none, none, reduction=2)[0] == 0
    zeros = torch.zeros(2, dtype=torch.int64)
    loss, dx, _ = run(torch.zeros(0, 2, 3), torch.ones(2, 1).long(), zeros, torch.tensor([0, 1]))
    assert loss.tolist() == [0.0, INF] and dx.shape == (0, 2, 3)


def test_subnormals_survive_the_kernels():
    """The recursions flush them to zero while they run, and only then."""
    x, targets, frames, lengths = problem(300, 3, 70, 40)
    run(x.log_softmax(2), targets, frames, lengths)
    small = torch.full((1000,), 1e-30) * 1e-10
    assert small.gt(0).all()


GOOD = (torch.zeros(5, 2, 4), torch.ones(2, 3).long(), torch.tensor([5, 5]), torch.tensor([2, 3]))


def replaced(position, value):
    return tuple(value if i == position else arg for i, arg in enumerate(GOOD))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (replaced(0, torch.zeros(5, 4)), "x must have 3 dimensions"),
        (replaced(0, torch.zeros(5, 2, 4).int()), "x must have 3 dimensions and be float"),
        (replaced(0, torch.zeros(5, 2, 0)), "blank must be in"),
        (replaced(1, torch.ones(3, 3).long()), "targets must have shape"),
        (replaced(1, torch.ones(2, 3, 1).long()), "targets must have shape"),
        (replaced(1, torch.ones(2, 3)), "targets must be int32 or int64"),
        (replaced(1, torch.tensor([[1, 4, 1], [1, 1, 1]])), "item 0: label 4"),
        (replaced(1, torch.tensor([[1, 1, 9], [1, 1, 0]])), "item 1: label 0"),  # the 9 is padding
        (replaced(1, torch.tensor([[1, 1, 1], [-1, 1, 1]])), "item 1: label -1"),
        (replaced(1, torch.tensor([[1, 2**32 + 1, 1], [1, 1, 1]])), "item 0: label 4294967297"),
        (replaced(1, torch.ones(4).long()), "item 1: target length 3 does not fit"),
        (replaced(1, torch.ones(6).long()), "as many labels as target_lengths say, 5, got 6"),
        (replaced(2, torch.tensor([5, 6])), "item 1: input length 6"),
        (replaced(2, torch.tensor([-1, 5])), "item 0: input length -1"),
        (replaced(2, torch.tensor([5])), "must have N=2 elements"),
        (replaced(2, torch.tensor([5.0, 5.0])), "input_lengths must be int32 or int64"),
        (replaced(3, torch.tensor([2, 4])), "item 1: target length 4"),
        (replaced(3, torch.tensor([2, -(2**62)])), "item 1: target length -"),
        (replaced(3, torch.tensor([2**62, 2**62])), "item 0: target length 4611686018427387904"),
    ],
)
def test_raw_calls_are_checked(args, message):
    loss, *kept = RAW.ctc_loss_fwd(*GOOD, 0, 3, False, False, 0)
    with pytest.raises(RuntimeError, match=message):
        RAW.ctc_loss_value(*args, 0, 3, False, False, 0)
    with pytest.raises(RuntimeError, match=message):
        RAW.ctc_loss_fwd(*args, 0, 3, False, False, 0)
    with pytest.raises(RuntimeError, match=message):
        RAW.ctc_loss_bwd(loss, *args, *kept, 0, False, False, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3)}, "dloss must have 2 elements"),
        ({0: torch.zeros(())}, "dloss must have the loss's shape"),
        ({0: torch.zeros(2).double()}, "dloss must have 2 elements of float32"),
        ({5: torch.zeros(1)}, "nll must have 2 elements"),
        ({6: torch.zeros(69)}, "rows must have 70 elements"),
        ({6: torch.zeros(70).half()}, "rows must have 70 elements"),
        ({7: torch.zeros(10)}, "lse must have 0 elements"),
        ({9: 4}, "blank must be in"),
        ({10: True}, "lse must have 10 elements"),
        ({12: 3}, "reduction must be 0, 1 or 2"),
    ],
)
def test_raw_backward_is_checked(change, message):
    loss, *kept = RAW.ctc_loss_fwd(*GOOD, 0, 3, False, False, 0)
    args = [loss, *GOOD, *kept, 0, False, False, 0]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(RuntimeError, match=message):
        RAW.ctc_loss_bwd(*args)


def test_raw_forward_flags_are_checked():
    with pytest.raises(RuntimeError, match="max_length is 2 but a target has 3"):
        RAW.ctc_loss_value(*GOOD, 0, 2, False, False, 0)
    with pytest.raises(RuntimeError, match="reduction must be"):
        RAW.ctc_loss_fwd(*GOOD, 0, 3, False, False, 5)
