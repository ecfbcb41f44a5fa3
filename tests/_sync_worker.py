"""One of several processes that train a SyncBatchNorm over gloo; test_batch_norm_sync.py starts it and reads its file.

python _sync_worker.py RANK WORLD RENDEZVOUS RESULT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

# name: (shapes of the batches, dtype, memory format, arguments of the module)
SCENARIOS = {
    "even": ([(4, 5, 3, 4), (4, 5, 3, 4)], torch.float32, None, {}),
    "uneven": ([(6, 5, 3, 4), (1, 5, 3, 4)], torch.float32, None, {}),
    "other positions": ([(2, 3, 7), (5, 3, 2)], torch.float32, None, {}),
    "one is empty": ([(0, 5, 3, 4), (3, 5, 3, 4)], torch.float32, None, {}),
    "one value each": ([(1, 4), (1, 4)], torch.float32, None, {}),
    "channels_last": ([(2, 33, 3, 4), (3, 33, 3, 4)], torch.float32, torch.channels_last, {}),
    "float64": ([(3, 6), (5, 6)], torch.float64, None, {}),
    "bfloat16": ([(4, 8, 5), (3, 8, 5)], torch.bfloat16, None, {}),
    "large mean": ([(8, 4, 9), (5, 4, 9)], torch.float32, None, {}),
    "cumulative": ([(4, 5, 3), (2, 5, 3)], torch.float32, None, {"momentum": None}),
    "biased": ([(4, 5, 3), (2, 5, 3)], torch.float32, None, {"biased_running_var": True}),
    "no affine": ([(4, 5, 3), (2, 5, 3)], torch.float32, None, {"affine": False}),
    "nothing tracked": ([(4, 5, 3), (2, 5, 3)], torch.float32, None, {"track_running_stats": False}),
}
STEPS = 2


def batches(name: str, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x, dy) of each process, the same wherever it is asked for."""
    shapes, dtype, memory_format, _ = SCENARIOS[name]
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    found = []
    for rank, shape in enumerate(shapes):
        x = (1 + rank) * torch.randn(shape, generator=generator) + rank
        x = x + 1e4 if name == "large mean" else x
        pair = [t.to(dtype) for t in (x, torch.randn(shape, generator=generator))]
        found.append(tuple(t.contiguous(memory_format=memory_format) if memory_format else t for t in pair))
    return found


def parameters(channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    return tuple((1 + 0.3 * torch.randn(channels, generator=generator)).to(wide) for _ in range(2))


def run(name: str, rank: int) -> dict[str, list[torch.Tensor]]:
    """What a process sees of one scenario: outputs, gradients and buffers after each step."""
    import pydl

    shapes, dtype, _, arguments = SCENARIOS[name]
    channels = shapes[0][1]
    weight, bias = parameters(channels, dtype)
    module = pydl.nn.SyncBatchNorm(channels, **arguments).to(weight.dtype)
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    seen: dict[str, list[torch.Tensor]] = {"y": [], "dx": [], "parameters": [], "buffers": []}
    for step in range(STEPS):
        x, dy = batches(name, step)[rank]
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = module(x)
        dx, *rest = torch.autograd.grad(y, [x, *module.parameters()], dy)
        assert dx.stride() == x.stride() and y.stride() == x.stride()
        seen["y"].append(y.detach())
        seen["dx"].append(dx)
        seen["parameters"].append(rest)
        seen["buffers"].append([b.clone() for b in module.buffers()])
    return seen


def second_derivative() -> str:
    """The error of a gradient penalty."""
    import pydl

    module = pydl.nn.SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).pow(2).sum(), x, create_graph=True)
    try:
        slope.pow(2).sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def main(rank: int, world: int, rendezvous: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    import pydl

    with pydl.trace() as trace:
        found = {name: run(name, rank) for name in SCENARIOS}
    found["backends"] = sorted({(r.op, r.backend) for r in trace})
    found["second derivative"] = second_derivative()
    module = pydl.nn.SyncBatchNorm(3).eval()
    x = torch.randn(1 + rank, 3)  # evaluation joins nothing: no process waits for another
    found["evaluation"] = torch.equal(module(x), pydl.ops.batch_norm(x, module.running_mean, module.running_var))
    torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
