"""attention on every backend: every mask alone and together, gradients of the bias, empty rows, what runs, errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _backends import backends_and_dtypes, backends_for
from _checks import (
    assert_same_bits,
    check_cases,
    check_compile,
    check_deterministic,
    check_gradcheck,
    check_layouts,
    check_opcheck,
    check_same_error,
)

import pydl
from pydl import ops
from pydl._grading import grade
from pydl.ops._attention_composed import naive_attention
from pydl.ops.attention import AttentionMap, attention_mask_map
from pydl.reference.attention import allowed, attention, attention_grad, cases, sdpa_cases

OPS = ("attention", "scaled_dot_product_attention")
CASES = {case.name: case for case in cases()}
TORCH = ("torch",)
NAN, INF = float("nan"), float("inf")
NAMESPACES = {"cpu": torch.ops.pydl, "triton": torch.ops.pydl_triton}


def every_op(parameters):
    """(backend, ...) of both functions; the backend knows its op."""
    return [pytest.param(*p.values, id=f"{op}-{p.id}", marks=p.marks) for op in OPS for p in parameters(op)]


def tensors(b=1, h=2, hk=2, sq=65, sk=65, d=16, dv=16, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, sq, d), (b, hk, sk, d), (b, hk, sk, dv))
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def plain(value):
    """NumPy of tensors, also in tuples."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()
    return tuple(plain(v) for v in value) if isinstance(value, tuple) else value


def moved(value, device):
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def check(backend, q, k, v, **kinds):
    """Output, logsumexp and every gradient by the oracle, beside the naive form in the same dtype."""
    kinds = {name: moved(value, q.device) for name, value in kinds.items()}
    bias = kinds.get("bias")
    leaves = [q, k, v, *([] if bias is None else [bias.requires_grad_()])]
    generator = torch.Generator().manual_seed(1)

    def run(function):
        out, lse = function(q, k, v, return_lse=True, **kinds)
        seen = torch.where(lse.isinf(), 0.0, lse)
        dout, dlse = (torch.randn(t.shape, generator=generator.manual_seed(1)).to(t) for t in (out, lse))
        return (out, lse, *torch.autograd.grad([out, seen], leaves, [dout, dlse])), dout, dlse

    ours, dout, dlse = run(backend)
    theirs, _, _ = run(naive_attention)
    arrays = {name: plain(value) for name, value in kinds.items()}
    exact = attention(*map(plain, (q, k, v)), return_lse=True, **arrays)
    grads = attention_grad(plain(dout), *map(plain, (q, k, v)), dlse=plain(dlse), **arrays)
    longest = max(q.shape[2], k.shape[2]) * q.shape[1] * q.shape[0]
    theirs = (_worse(theirs[0], _torchs(q, k, v, arrays), exact[0]), *theirs[1:])
    for i, (got, oracle, naive) in enumerate(zip(ours, (*exact, *grads), theirs, strict=True)):
        graded = grade(got, oracle, naive, gradient=i > 1, reduction=longest if i > 1 else 1)
        assert graded.ok, f"result {i}: {graded}"


def _torchs(q, k, v, kinds):
    """torch's own attention with all masks as one tensor; None where it has no such form."""
    kinds = dict(kinds)
    if kinds.pop("softcap", None):
        return None
    bias = kinds.pop("bias", 0.0)
    ok = allowed(*q.shape[:3], k.shape[2], **kinds)
    additive = torch.from_numpy(np.where(ok, bias, -INF)).to(q)
    return F.scaled_dot_product_attention(q, k, v, additive, enable_gqa=True)


def _worse(naive, own, exact):
    """Of torch's two forms the one further from the truth, element by element: small sizes make either lucky."""
    if own is None:
        return naive
    near = torch.from_numpy(exact).to(naive.device)
    return torch.where((own - near).abs() > (naive - near).abs(), own, naive)


# values and gradients


@pytest.mark.parametrize(("backend", "dtype"), every_op(backends_and_dtypes))
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), every_op(backends_and_dtypes))
def test_gradients(backend, dtype):
    check_cases(backend, dtype, "gradients")


@pytest.mark.parametrize(("backend", "dtype"), every_op(lambda op: backends_and_dtypes(op, without=TORCH)))
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


@pytest.mark.parametrize(("backend", "dtype"), every_op(lambda op: backends_and_dtypes(op, without=TORCH)))
def test_layouts(backend, dtype):
    case = next(c for c in (cases() if backend.op == "attention" else sdpa_cases()) if c.layouts)
    check_layouts(backend, dtype, case)


@pytest.mark.parametrize("backend", backends_for("attention", torch.float64, without=("triton",)))
def test_gradcheck(backend):
    """Output and logsumexp, with a bias and an empty row; two heads share one of k and v."""
    q, k, v = tensors(1, 2, 1, 3, 4, 2, 3, torch.float64)
    bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)

    def function(q, k, v, bias):
        out, lse = backend(q, k, v, bias=bias, mask=mask, softcap=2.0, return_lse=True)
        return out, lse[:, :, ::2]

    check_gradcheck(function, [q, k, v, bias])


KINDS = {
    "mask": lambda b, h, sq, sk, g: torch.rand(b, 1, sq, sk, generator=g) < 0.7,
    "bias": lambda b, h, sq, sk, g: torch.randn(1, h, sq, sk, generator=g),
    "causal": lambda *_: "bottom_right",
    "window": lambda *_: (9, 4),
    "key_lengths": lambda b, h, sq, sk, g: torch.randint(0, sk + 1, (b,), generator=g),
    "key_padding": lambda b, h, sq, sk, g: torch.rand(b, sk, generator=g) < 0.6,
    "segment_ids": lambda b, h, sq, sk, g: tuple(torch.randint(0, 3, (b, n), generator=g).sort()[0] for n in (sq, sk)),
    "prefix_length": lambda b, h, sq, sk, g: torch.randint(0, sk + 1, (b,), generator=g),
}


def kinds_of(names, b, h, sq, sk):
    """Arguments of these names; a prefix brings its causal mask along."""
    generator = torch.Generator().manual_seed(sq + sk)
    names = [*names, *(["causal"] if "prefix_length" in names and "causal" not in names else [])]
    return {name: KINDS[name](b, h, sq, sk, generator) for name in names}


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_lengths_around_a_tile(backend, kind):
    """1, 3: less than any tile; 63 to 65: one tile of keys; 127 to 129: one tile of queries; Sq != Sk both ways."""
    lengths = [(1, 1), (3, 65), (64, 63), (65, 127), (129, 64), (127, 129)]
    for sq, sk in lengths if not backend.slow else lengths[:: 1 if kind in ("mask", "bias") else 2]:
        q, k, v = tensors(2, 2, 1, sq, sk, 8, 8, device=backend.device)
        check(backend, q, k, v, **kinds_of([kind], 2, 2, sq, sk))


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("pair", list(itertools.combinations(KINDS, 2)), ids="+".join)
def test_every_pair_of_kinds(backend, pair):
    q, k, v = tensors(2, 2, 2, 65, 70, 8, 8, device=backend.device)
    check(backend, q, k, v, **kinds_of(pair, 2, 2, 65, 70))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("attention", without=TORCH))
@pytest.mark.parametrize("d", [1, 16, 40, 64, 80, 128, 256])
def test_head_dimensions(backend, dtype, d):
    if backend.slow and (d in (40, 80) or dtype in (torch.float64, torch.float16)):
        pytest.skip("padding and dtypes are covered by the other sizes")
    q, k, v = tensors(1, 2, 1, 70, 67, d, max(1, d - 3), dtype, backend.device)
    check(backend, q, k, v, causal="bottom_right", mask=torch.rand(70, 67) < 0.8)


NAMED = {
    "causal 705": (705, 705, {"causal": "top_left"}),
    "window 1025": (1025, 1025, {"window": (100, 0)}),
    "documents 768": (768, 768, {"segment_ids": torch.arange(768).unsqueeze(0) // 200, "causal": "top_left"}),
    "lengths 704": (100, 704, {"key_lengths": torch.tensor([650])}),
    "prefix 720": (720, 720, {"causal": "bottom_right", "prefix_length": 300}),
    "tiles of a mask 832": (832, 832, {"mask": torch.ones(13, 13).tril().bool().kron(torch.ones(64, 64).bool())}),
}  # fmt: skip


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("name", NAMED)
def test_several_tiles(backend, name):
    sq, sk, kinds = NAMED[name]
    q, k, v = tensors(1, 1, 1, sq, sk, 16, 16, device=backend.device)
    check(backend, q, k, v, **kinds)


# the bias and its gradient


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 66), (1, 67))), ids=str)
def test_gradient_of_every_broadcast_shape(backend, shape):
    q, k, v = tensors(2, 4, 2, 66, 67, 8, 8, device=backend.device)
    check(backend, q, k, v, bias=torch.randn(shape), causal="bottom_right")


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 66), (1, 67))), ids=str)
def test_masks_of_every_broadcast_shape(backend, shape):
    q, k, v = tensors(2, 4, 2, 66, 67, 8, 8, device=backend.device)
    mask = torch.rand(shape) < 0.6
    expected = backend(q, k, v, mask=mask.expand(2, 4, 66, 67).to(q.device))
    torch.testing.assert_close(backend(q, k, v, mask=mask.to(q.device)), expected, rtol=1e-5, atol=1e-5)


# what is defined where a softmax is not


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("attention", without=TORCH))
def test_rows_without_a_key(backend, dtype):
    """Output 0, logsumexp -inf, every gradient 0; the row's own query may be NaN."""
    q, k, v = tensors(1, 2, 2, 67, 66, 8, 8, dtype, backend.device)
    mask = torch.ones(67, 66, dtype=torch.bool)
    mask[5], mask[64:] = False, False
    q.data[:, :, 5] = NAN
    bias = torch.zeros(67, 66).to(q).requires_grad_()
    out, lse = backend(q, k, v, mask=mask.to(q.device), bias=bias, return_lse=True)
    empty = [5, 64, 65, 66]
    assert out[:, :, empty].eq(0).all() and lse[:, :, empty].eq(-INF).all()
    assert out.isfinite().all() and lse[:, :, :5].isfinite().all()
    grads = torch.autograd.grad([out.sum() + torch.where(lse.isinf(), 0.0, lse).sum()], [q, k, v, bias])
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][:, :, empty].eq(0).all() and grads[3][empty].eq(0).all()


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("kind", ["key_lengths", "key_padding", "segment_ids", "mask"])
def test_what_no_query_sees_may_hold_anything(backend, kind):
    q, k, v = tensors(2, 2, 1, 50, 70, 8, 8, device=backend.device)
    hidden = torch.zeros(2, 70, dtype=torch.bool)
    hidden[0, 61:], hidden[1, 33:] = True, True
    kinds = {
        "key_lengths": torch.tensor([61, 33]),
        "key_padding": ~hidden,
        "segment_ids": (torch.zeros(2, 50, dtype=torch.int64), hidden.long()),
        "mask": ~hidden[:, None, None],
    }
    given = {kind: moved(kinds[kind], q.device)}
    clean = backend(q, k, v, **given)
    expected = torch.autograd.grad(clean.sum(), [q, k, v])
    spoiled = []
    for t, value in ((k, NAN), (v, INF)):
        t = t.detach().clone()
        t[hidden.to(t.device).unsqueeze(1)] = value
        spoiled.append(t.requires_grad_())
    out = backend(q, *spoiled, **given)
    torch.testing.assert_close(out, clean)
    for got, want in zip(torch.autograd.grad(out.sum(), [q, *spoiled]), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("attention", without=TORCH))
@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_scores_far_from_zero(backend, dtype, shift):
    """Every score shifted alike leaves the output; where exp(-lse) would be inf or 0 the backward must not use it."""
    q, k, v = tensors(1, 1, 1, 40, 66, 8, 8, dtype, backend.device)
    bias = torch.full((1, 1, 1, 66), shift, dtype=dtype, device=q.device)
    moved_, still = backend(q, k, v, bias=bias), backend(q, k, v)
    scale = 2e-2 if dtype.itemsize < 4 else 1e-2
    torch.testing.assert_close(moved_, still, rtol=scale, atol=scale)
    for got, want in zip(*(torch.autograd.grad(o.sum(), [q, k, v]) for o in (moved_, still)), strict=True):
        torch.testing.assert_close(got, want, rtol=4 * scale, atol=4 * scale)


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
def test_one_pattern_in_five_ways(backend):
    """Documents under a causal mask: as ids, bool mask, bias of -inf, window and mask, and a shared tile map."""
    q, k, v = tensors(1, 2, 2, 130, 130, 16, 16, device=backend.device)
    ids = (torch.arange(130, device=q.device) // 45).unsqueeze(0)
    mask = torch.from_numpy(allowed(1, 1, 130, 130, causal="top_left", segment_ids=ids.cpu().numpy())).to(q.device)
    bias = torch.zeros(130, 130, device=q.device).masked_fill(~mask[0, 0], -INF)
    shared = attention_mask_map(1, 130, 130, mask=mask) if backend.name != "triton" or q.is_cuda else None
    ways = [
        {"segment_ids": ids, "causal": "top_left"},
        {"mask": mask},
        {"bias": bias},
        {"mask": mask, "window": (None, 0)},
        {"mask": mask, "mask_map": shared},
    ]
    expected = attention(*map(plain, (q, k, v)), mask=mask.cpu().numpy())
    results = [backend(q, k, v, **way) for way in ways]
    for got in results:
        torch.testing.assert_close(got.double().cpu(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert_same_bits(results[1], results[4])


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
def test_the_tile_map_is_right(backend):
    """Classes, lists and bits, against the oracle's predicate; lists skip what is empty and know what is full."""
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 1, 300, 200, generator=g) < 0.9
    mask[:, :, :128, :64], mask[:, :, 128:256, 64:128], mask[0, :, :, 128:] = False, True, False
    kinds = {"mask": mask, "causal": "bottom_right", "key_lengths": torch.tensor([200, 190])}
    kinds = {name: moved(value, backend.device) for name, value in kinds.items()}
    with backend.use():
        words, classes, q_count, q_list, k_count, k_list = (
            t.cpu() for t in attention_mask_map(2, 300, 200, **kinds).tensors
        )
    ok = allowed(2, 1, 300, 200, **{name: plain(value) for name, value in kinds.items()})
    for b, i, j in np.ndindex(2, 3, 4):
        tile = ok[b, 0, 128 * i : 128 * (i + 1), 64 * j : 64 * (j + 1)]
        kind = 0 if not tile.any() else 2 if tile.all() and tile.shape[1] == 64 else 1
        assert classes[b, 0, i, j] == kind, (b, i, j)
    for lists, counts, table in ((q_list, q_count, classes), (k_list, k_count, classes.transpose(2, 3))):
        for at in np.ndindex(*counts.shape[:3]):
            kinds_here = table[at].tolist()
            entries = [2 * i for i, kind in enumerate(kinds_here) if kind == 1]
            partial = len(entries)
            entries += [2 * i + 1 for i, kind in enumerate(kinds_here) if kind == 2]
            assert counts[at].tolist() == [len(entries), partial] and lists[at][: len(entries)].tolist() == entries
    bits = (words.unsqueeze(-1) >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(-2)[..., :200].bool(), mask) and bits.flatten(-2)[..., 200:].eq(0).all()


def test_a_map_of_other_masks_is_refused():
    q, k, v = tensors(1, 1, 1, 40, 40)
    mask = torch.ones(40, 40, dtype=torch.bool)
    shared = attention_mask_map(1, 40, 40, mask=mask)
    with pytest.raises(RuntimeError, match="'mask_map' was built for"):
        ops.attention(q, k, v, mask=mask, causal="top_left", mask_map=shared)
    with pytest.raises(TypeError, match="must come from attention_mask_map"):
        ops.attention(q, k, v, mask=mask, mask_map=[])
    with pytest.raises(ValueError, match="must be given"):
        attention_mask_map(1, 40, 40, causal="top_left")
    assert isinstance(shared, AttentionMap)


# what runs


def test_plain_calls_go_to_torch_and_the_trace_says_so(monkeypatch):
    q, k, v = tensors()
    with pydl.trace() as seen:
        ops.attention(q, k, v, causal="top_left")
        ops.scaled_dot_product_attention(q, k, v, is_causal=True)
        ops.attention(q, k, v, causal="top_left", window=(4, None))
    assert [r.backend for r in seen] == ["torch", "torch", "cpu"] and "torch's own attention" in seen[0].reason


@pytest.mark.parametrize(("backend",), every_op(lambda op: backends_for(op, torch.float32, without=TORCH)))
def test_the_same_bits_on_every_run(backend):
    q, k, v = tensors(2, 2, 1, 70, 66, device=backend.device)
    mask = (torch.rand(70, 66) < 0.5).to(q.device)
    name = "mask" if backend.op == "attention" else "attn_mask"
    extra = {} if backend.op == "attention" else {"enable_gqa": True}
    check_deterministic(lambda q, k, v: backend(q, k, v, **{name: mask}, **extra), q, k, v)


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
def test_heads_behind_positions_keep_their_layout(backend):
    """[B, S, H, D] transposed, as models hold it: no copy, and results and gradients of that layout."""
    swapped = [t.detach().transpose(1, 2).contiguous() for t in tensors(2, 2, 2, device=backend.device)]
    views = [t.transpose(1, 2).requires_grad_() for t in swapped]
    out = backend(*views, window=(9, 0))
    grads = torch.autograd.grad(out.sum(), views)
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, *grads))


@pytest.mark.gpu
def test_no_sync_and_cuda_graph():
    q, k, v = tensors(2, 4, 2, 300, 300, 64, 64, torch.bfloat16, "cuda")
    mask = torch.rand(2, 1, 300, 300, device="cuda") < 0.5

    def step():
        return torch.autograd.grad(ops.attention(q, k, v, mask=mask).sum(), [q, k, v])

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        assert_same_bits(got, want)


# errors


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (dict(q=torch.zeros(2, 65, 16)), RuntimeError, ("'q'", "[2, 65, 16]")),
        (dict(k=torch.zeros(1, 2, 65, 17)), RuntimeError, ("must agree", "[1, 2, 65, 17]")),
        (dict(k=torch.zeros(1, 3, 65, 16), v=torch.zeros(1, 3, 65, 16)), RuntimeError, ("2 heads", "3 heads")),
        (dict(v=torch.zeros(1, 2, 65, 16).double()), RuntimeError, ("one dtype", "float64")),
        (dict(mask=torch.zeros(65, 65)), RuntimeError, ("'mask'", "bool", "float32")),
        (dict(mask=torch.zeros(65, 64).bool()), RuntimeError, ("'mask'", "[65, 64]")),
        (dict(bias=torch.zeros(65, 65).bool()), RuntimeError, ("'bias'", "floating point")),
        (dict(causal=True), ValueError, ("'causal'", "True")),
        (dict(window=4), TypeError, ("'window'", "4")),
        (dict(window=(-2, 0)), ValueError, ("'window'", "-2")),
        (dict(key_lengths=torch.tensor([1.0])), RuntimeError, ("'key_lengths'", "float32")),
        (dict(key_padding=torch.ones(1, 64).bool()), RuntimeError, ("'key_padding'", "[1, 64]")),
        (dict(segment_ids=torch.zeros(1, 64).long()), RuntimeError, ("'segment_ids'", "[1, 64]")),
        (dict(prefix_length=3), ValueError, ("'prefix_length'", "'causal'")),
        (dict(prefix_length=3.0, causal="top_left"), TypeError, ("'prefix_length'", "3.0")),
        (dict(mask=[[True]]), TypeError, ("'mask'", "list")),
    ],
)
def test_errors(change, kind, says):
    arguments = dict(zip("qkv", (t.detach() for t in tensors()), strict=True)) | change
    with pytest.raises(kind) as raised:
        ops.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert all(part in str(raised.value) for part in ("attention", *says)), raised.value


@pytest.mark.parametrize(
    "change",
    [
        dict(attn_mask=torch.ones(65, 64)),
        dict(attn_mask=torch.ones(65, 65).double()),
        dict(key=torch.zeros(1, 2, 65, 15)),
        dict(dropout_p=2.0),
    ],
)
def test_what_torch_refuses_is_refused(change):
    q, k, v = (t.detach() for t in tensors())
    arguments = {"query": q, "key": k, "value": v} | change
    check_same_error(ops.scaled_dot_product_attention, F.scaled_dot_product_attention, **arguments)


def test_dropout_goes_to_torch():
    q, k, v = tensors()
    with pydl.trace() as seen:
        torch.manual_seed(0)
        got = ops.scaled_dot_product_attention(q, k, v, torch.ones(65, 65, dtype=torch.bool), 0.5)
        torch.manual_seed(0)
        expected = F.scaled_dot_product_attention(q, k, v, torch.ones(65, 65, dtype=torch.bool), 0.5)
    assert [r.backend for r in seen] == ["torch"] and "dropout" in seen[0].reason
    torch.testing.assert_close(got, expected)


# torch's machinery


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
def test_opcheck(backend):
    q, k, v = tensors(1, 2, 1, 9, 7, 4, 4, device=backend.device)
    mask = (torch.rand(1, 1, 9, 7) < 0.7).to(q.device)
    bias = torch.randn(2, 1, 7).to(q.device).reshape(1, 2, 1, 7).requires_grad_()
    namespace = NAMESPACES[backend.name]
    with backend.use():
        check_opcheck(namespace.attention_map.default, mask, *(None,) * 5, 1, 9, 7, 2, -1, -1)
        tiles = list(namespace.attention_map.default(mask, *(None,) * 5, 1, 9, 7, 2, -1, -1))
        masks = (mask, bias, *(None,) * 5, tiles, 2, -1, -1, 0.5, 0.0, 0)
        check_opcheck(namespace.attention_fwd.default, q, k, v, *masks)
        with torch.no_grad():
            out, lse = namespace.attention_fwd.default(q, k, v, *masks)
        check_opcheck(namespace.attention_bias_bwd.default, torch.ones_like(out), None, q, k, v, out, lse, *masks)


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
def test_compile(backend):
    with backend.use():
        check_compile(
            lambda q, k, v: ops.attention(q, k, v, causal="bottom_right", window=(20, None)),
            [tensors(1, 2, 1, n, n + 3, 8, 8, device=backend.device) for n in (33, 40)],
        )
