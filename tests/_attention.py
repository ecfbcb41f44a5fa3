"""What the tests of attention share: inputs, masks of every kind, and results beside the oracle and torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pydl._grading import grade
from pydl.ops._attention_composed import naive_attention
from pydl.reference.attention import allowed, attention, attention_grad

OPS = ("attention", "scaled_dot_product_attention")
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
    theirs = (worse(theirs[0], torch_form(q, k, v, arrays), exact[0]), *theirs[1:])
    for i, (got, oracle, naive) in enumerate(zip(ours, (*exact, *grads), theirs, strict=True)):
        graded = grade(got, oracle, naive, gradient=i > 1, reduction=longest if i > 1 else 1)
        assert graded.ok, f"result {i}: {graded}"


def torch_form(q, k, v, kinds):
    """torch's own attention with all masks as one tensor; None where it has no such form."""
    kinds = dict(kinds)
    if kinds.pop("softcap", None):
        return None
    bias = kinds.pop("bias", 0.0)
    ok = allowed(*q.shape[:3], k.shape[2], **kinds)
    additive = torch.from_numpy(np.where(ok, bias, -INF)).to(q)
    return F.scaled_dot_product_attention(q, k, v, additive, enable_gqa=True)


def worse(naive, own, exact):
    """Of torch's two forms the one further from the truth, element by element: small sizes make either lucky."""
    if own is None:
        return naive
    near = torch.from_numpy(exact).to(naive.device)
    return torch.where((own - near).abs() > (naive - near).abs(), own, naive)


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
