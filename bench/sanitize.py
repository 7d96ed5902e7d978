"""Launches every CUDA kernel of the package on a few odd shapes, for compute-sanitizer.

compute-sanitizer --tool memcheck python3 bench/sanitize.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from taylor_kernels.ops.filter_moments import filter_moments
from taylor_kernels.ops.gate_gradients import gate_gradients

#: shape, groups: rows by threads, warps, blocks and segments; grids of one and many blocks.
PARAMETERS = (
    ((5,), 1),
    ((70, 9), 1),
    ((33, 147), 1),
    ((3, 20011), 1),
    ((131, 24, 3, 3), 1),
    ((9, 300, 1, 1), 1),
    ((24, 1, 3, 3), 24),
    ((12, 5, 3, 3), 3),
    ((70, 3, 16, 16), 1),
)
#: shape, the channels' dim
ACTIVATIONS = (
    ((3, 5, 7, 9), 1),
    ((1, 2, 141, 129), 1),
    ((2, 150, 40), 2),
    ((2, 70, 3, 67), 2),
)


def check(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for offset in (0, 1):  # elements past an aligned address
            for dim in (0, 1, (0, 1)):
                chosen = [p for p in PARAMETERS if len(p[0]) > 1 or dim == 0]
                tensors = [[tensor(shape, dtype, offset) for _ in "wg"] for shape, _ in chosen]
                weights, grads = map(list, zip(*tensors, strict=True))
                if offset == 0:
                    last = torch.channels_last
                    images = [i for i, w in enumerate(weights) if w.dim() == 4 and i % 2 == 0]
                    for i in images:
                        weights[i] = weights[i].contiguous(memory_format=last)
                        grads[i] = grads[i].contiguous(memory_format=last)
                groups = [g for _, g in chosen]
                run = {"dim": dim, "groups": groups}
                got = filter_moments(weights, grads, backend="cuda", **run)
                expected = filter_moments(weights, grads, backend="reference", **run)
                for a, b in zip(flat(got), flat(expected), strict=True):
                    check(a, b)
            for shape, dim in ACTIVATIONS:
                y, dy = (tensor(shape, dtype, offset) for _ in range(2))
                bias = torch.randn(shape[dim], device="cuda")
                run = {"bias": bias, "channel_dim": dim}
                check(
                    gate_gradients(y, dy, backend="cuda", **run),
                    gate_gradients(y, dy, backend="reference", **run),
                )
    torch.cuda.synchronize()
    print("every kernel ran and agrees with the reference")


def tensor(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.randn(size + offset, device="cuda").to(dtype)[offset:].view(shape)


def flat(tables: object) -> list[Tensor]:
    return [tables] if isinstance(tables, Tensor) else [t for part in tables for t in flat(part)]


if __name__ == "__main__":
    main()
