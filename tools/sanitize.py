"""Launches every CUDA kernel of the package on a few odd shapes, for compute-sanitizer.

compute-sanitizer --tool memcheck python3 tools/sanitize.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taylor_kernels.methods import MirrorDescent
from taylor_kernels.methods.mirror_settings import METHODS
from taylor_kernels.ops.conv2d_fisher import conv2d_fisher
from taylor_kernels.ops.filter_moments import filter_moments
from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.ops.global_threshold import global_threshold
from taylor_kernels.ops.hutchinson_moments import hutchinson_moments
from taylor_kernels.ops.rademacher import rademacher_like
from taylor_kernels.ops.second_order_moments import second_order_moments
from taylor_kernels.ops.sparse_momentum import sparse_momentum

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
    ((9, 1711), 1),
    ((700, 3), 1),
    ((1, 2, 141, 129), 1),
    ((2, 150, 40), 2),
    ((2, 70, 3, 67), 2),
)
#: input, weight, (stride, padding, dilation, groups): every tile and team, vectors and elements,
#: one span and several, splits of the examples.
CONVOLUTIONS = (
    ((2, 190, 5, 5), (250, 190, 1, 1), (1, 0, 1, 1)),
    ((2, 16, 20, 16), (64, 16, 3, 3), (1, 1, 1, 1)),
    ((3, 40, 9, 9), (11, 40, 2, 3), (2, 1, 1, 1)),
    ((17, 64, 1, 1), (32, 64, 1, 1), (1, 0, 1, 1)),
    ((3, 33, 19, 18), (33, 1, 3, 3), (1, 1, 1, 33)),
    ((3, 50, 7, 6), (60, 5, 1, 1), (1, 0, 1, 10)),
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
                check_second_order(weights, grads, run)
            for shape, dim in ACTIVATIONS:
                y, dy = (tensor(shape, dtype, offset) for _ in range(2))
                bias = torch.randn(shape[dim], device="cuda")
                run = {"bias": bias, "channel_dim": dim}
                check(
                    gate_gradients(y, dy, backend="cuda", **run),
                    gate_gradients(y, dy, backend="reference", **run),
                )
            for shape, size, geometry in CONVOLUTIONS:
                check_fisher(shape, size, geometry, dtype, offset)
            weights, grads, momenta = (
                [tensor(shape, dtype, offset) for shape, _ in PARAMETERS] for _ in range(3)
            )
            check_momentum(weights, grads, momenta)
            check_mirror(weights, grads)
    torch.cuda.synchronize()
    print("every kernel ran and agrees with the reference")


def check_second_order(weights: list[Tensor], grads: list[Tensor], run: dict) -> None:
    signs = rademacher_like(weights, seed=1, backend="cuda")
    same = rademacher_like(weights, seed=1, backend="reference")
    for got, expected in zip(signs, same, strict=True):
        check(got, expected)
    found = [
        (
            second_order_moments(weights, grads, signs, backend=backend, **run),
            hutchinson_moments(weights, grads, seed=1, backend=backend, **run),
        )
        for backend in ("cuda", "reference")
    ]
    for got, expected in zip(*(flat(tables) for tables in found), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1.0)


def check_momentum(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
    """A step of GSM, whose bits are the reference's."""
    number = len(weights)
    count = sum(w.numel() for w in weights) // 3
    found = []
    for backend in ("cuda", "reference"):
        mine, kept = ([t.clone() for t in each] for each in (weights, momenta))
        table = global_threshold(mine, count, factors=grads, backend=backend)
        each = {"lr": [0.1] * number, "momentum": [0.9] * number, "weight_decay": [0.01] * number}
        ranked = [True] * number
        sparse_momentum(mine, grads, kept, table, ranked=ranked, backend=backend, **each)
        found.append([table, *mine, *kept])
    for got, expected in zip(*found, strict=True):
        if not got.equal(expected):
            raise AssertionError("global_threshold, sparse_momentum: other bits than the reference")


def check_mirror(weights: list[Tensor], grads: list[Tensor]) -> None:
    """Two steps and the rounding of every projection and update of mirror_step.

    Half weights lie on a grid, so that a few come to a threshold of the hard step exactly.
    """
    for method in METHODS:
        for levels in ("binary", "ternary"):
            if (method, levels) == ("md-tanh", "ternary"):
                continue
            found = []
            for backend in ("cuda", "reference"):
                mine = [nn.Parameter(w.clone()) for w in weights]
                optimizer = MirrorDescent(
                    mine, 0.01, method=method, levels=levels, quantize="all", backend=backend
                )
                for _ in range(2):
                    for weight, grad in zip(mine, grads, strict=True):
                        weight.grad = grad
                    optimizer.step()
                found.append([w.detach().clone() for w in mine])
                optimizer.quantize()
            got, expected = (torch.cat([w.flatten() for w in each]) for each in found)
            differ = ~torch.isclose(got, expected, rtol=1e-2, atol=1e-2)
            if int(differ.sum()) > got.numel() // 1000:
                raise AssertionError(f"mirror_step: {method}, {levels} is not the reference's")


def check_fisher(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    geometry: tuple[int, int, int, int],
    dtype: torch.dtype,
    offset: int,
) -> None:
    x, w = tensor(shape, dtype, offset), torch.randn(size, device="cuda")
    y = torch.nn.functional.conv2d(x.to("meta"), w.to("meta", dtype), None, *geometry)
    dy = tensor(y.shape, dtype, offset)
    orders = (torch.contiguous_format, torch.channels_last)[: 2 - offset]
    for order, weight in zip(orders, (None, w) if offset == 0 else (w,), strict=True):
        x, dy = (t.contiguous(memory_format=order) for t in (x, dy))
        cpu = (x.cpu(), size, dy.cpu(), *geometry)
        expected = conv2d_fisher(*cpu, weight=None if weight is None else w.cpu())
        for tf32 in (False, True)[: 1 + (dtype == torch.float32)]:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                got = conv2d_fisher(x, size, dy, *geometry, weight=weight, backend="cuda")
            rounding = 1e-2 if tf32 else 1e-3
            atol = rounding * float(expected.max())
            torch.testing.assert_close(got.cpu(), expected, rtol=rounding, atol=atol)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.randn(size + offset, device="cuda").to(dtype)[offset:].view(shape)


def flat(tables: object) -> list[Tensor]:
    return [tables] if isinstance(tables, Tensor) else [t for part in tables for t in flat(part)]


if __name__ == "__main__":
    main()
