"""attention: empty rows, hidden keys, the tile map, what runs, errors, torch's machinery."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _attention import INF, NAMESPACES, NAN, TORCH, every_op, moved, plain, tensors
from _backends import backends_and_dtypes, backends_for
from _checks import (
    assert_same_bits,
    check_compile,
    check_deterministic,
    check_opcheck,
    check_same_error,
)

import pydl
from pydl import ops
from pydl.ops.attention import AttentionMap, attention_mask_map
from pydl.reference.attention import allowed, attention

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
            assert counts[at][:2].tolist() == [len(entries), partial] and lists[at][: len(entries)].tolist() == entries
    bits = (words.unsqueeze(-1) >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(-2)[..., :200].bool(), mask) and bits.flatten(-2)[..., 200:].eq(0).all()


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("size", [(8330, 70), (200, 4200), (300, 0), (0, 130)])
def test_rows_of_tiles_are_ordered_by_how_many_they_have(backend, size):
    """The most first; of equal rows the last, of equal columns the first. 66 rows or columns: more than one program."""
    g = torch.Generator().manual_seed(5)
    ids = tuple(torch.randint(0, 12, (2, n), generator=g).sort()[0].to(backend.device) for n in size)
    with backend.use():
        tensors_ = attention_mask_map(2, *size, segment_ids=ids).tensors
    for count, n, last_first in ((tensors_[2], -(-size[0] // 128), True), (tensors_[4], -(-size[1] // 64), False)):
        assert count.shape == (2, 1, n, 3)
        for rows in count.flatten(0, 1).tolist():
            expected = sorted(range(len(rows)), key=lambda i: (-rows[i][0], -i if last_first else i))
            assert [row[2] for row in rows] == expected


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
def test_the_order_of_blocks_changes_no_bit(backend):
    """300 queries, 200 keys: some blocks of the last tiles lie outside; a mask for each of four heads, two of k."""
    q, k, v = (t.detach() for t in tensors(2, 4, 2, 300, 200, device=backend.device))
    g = torch.Generator().manual_seed(4)
    mask = torch.rand(2, 4, 3, 4, generator=g).lt(0.5).repeat_interleave(128, 2).repeat_interleave(64, 3)
    mask = mask[:, :, :300, :200].to(q.device)
    namespace = NAMESPACES[backend.name]
    with backend.use(), torch.no_grad():
        found = namespace.attention_map.default(mask, *(None,) * 5, 2, 300, 200, 2, -1, -1)

        def run(tiles):
            masks = (mask, *(None,) * 6, list(tiles), 2, -1, -1, 0.25, 0.0, 0)
            out, lse = namespace.attention_fwd.default(q, k, v, *masks)
            return out, lse, *namespace.attention_bwd.default(torch.ones_like(out), None, q, k, v, out, lse, *masks)

        shuffled = [t.clone() for t in found]
        for count in (shuffled[2], shuffled[4]):
            assert not torch.equal(count[..., 2].sort()[0], count[..., 2])
            count[..., 2] = torch.arange(count.shape[2])
        for got, want in zip(run(shuffled), run(found), strict=True):
            assert_same_bits(got, want)


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


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
def test_lengths_beyond_either_end_count_as_the_end(backend):
    q, k, v = tensors(2, 1, 1, 5, 7, 4, 4, device=backend.device)

    def run(lengths, prefixes):
        given = {"key_lengths": torch.tensor(lengths), "prefix_length": torch.tensor(prefixes)}
        return backend(q, k, v, causal="bottom_right", **{name: t.to(q.device) for name, t in given.items()})

    far = 2**63 - 1
    assert_same_bits(run([-far, far], [far, -far]), run([0, 7], [7, 0]))


# parts of the keys


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32))
def test_parts_of_the_keys_merge_into_the_whole(backend):
    """Three parts, one of which some queries see nothing of, and one query that sees nothing at all."""
    q, k, v = tensors(2, 4, 2, 20, 90, 8, 8, device=backend.device)
    mask = (torch.rand(2, 1, 20, 90) < 0.7).to(q.device)
    mask[:, :, :5, 30:70], mask[:, :, 7] = False, False
    whole = backend(q, k, v, mask=mask, return_lse=True)
    cuts = [slice(0, 30), slice(30, 70), slice(70, 90)]
    parts = [backend(q, k[:, :, c], v[:, :, c], mask=mask[..., c], return_lse=True) for c in cuts]
    merged = ops.merge_attention(*zip(*parts, strict=True))
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weights = torch.randn(whole[1].shape, generator=torch.Generator().manual_seed(2)).to(q.device)

    def gradients(out, lse):
        return torch.autograd.grad(out.sin().sum() + torch.where(lse.isinf(), 0.0, lse * weights).sum(), [q, k, v])

    for got, want in zip(gradients(*merged), gradients(*whole), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_merging_refuses_what_does_not_agree():
    out = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="one entry for each"):
        ops.merge_attention([out], [])
    with pytest.raises(RuntimeError, match=r"merge_attention: .*\[1, 2, 4\]"):
        ops.merge_attention([out], [torch.zeros(1, 2, 4)])


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
        dict(query=None),
        dict(value=[1.0]),
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


@pytest.mark.parametrize(
    ("size", "heads", "expected"), [((16, 16), 2, "torch"), ((128, 128), 64, "torch"), ((1, 2048), 64, "cpu")]
)
def test_small_masked_calls_on_the_cpu_are_torchs(size: tuple[int, int], heads: int, expected: str) -> None:
    q, k, mask = torch.zeros(1, heads, size[0], 64), torch.zeros(1, heads, size[1], 64), torch.ones(size).bool()
    with pydl.trace() as seen:
        ops.scaled_dot_product_attention(q, k, k, mask)
        ops.scaled_dot_product_attention(q, k, k, torch.zeros(size, requires_grad=True))  # torch composes its gradient
        with pydl.backend("cpu"):
            ops.scaled_dot_product_attention(q, k, k, mask)
    assert [r.backend for r in seen] == [expected, "cpu", "cpu"]
