"""The specification: each op in a few lines of PyTorch, for any device, dtype and strides.

Half types are widened to float32 first; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from taylor_kernels.backends.mirror_reference import mirror_step as mirror_step
from taylor_kernels.layout import (
    Conv2dFisherArgs,
    GateGradientsArgs,
    GlobalThresholdArgs,
    ParameterItem,
    RademacherItem,
    ScoreItem,
    SparseMomentumArgs,
    accumulator,
)


def filter_moments(items: Sequence[ParameterItem]) -> None:
    """Write the moments of all items into their outputs."""
    for item in items:
        assert item.grad is not None
        w, g = _widened(item.weight, item.grad)
        gw = g * w
        _write_sums(item, gw, gw * gw, gw.abs(), w * w, g * g)


def second_order_moments(items: Sequence[ParameterItem]) -> None:
    """Write (Σ q, Σ q²), q = w·(g − ½h), of all items into their outputs."""
    for item in items:
        assert item.grad is not None
        assert item.hvp is not None
        w, g, h = _widened(item.weight, item.grad, item.hvp)
        q = w * (g - h / 2)
        _write_sums(item, q, q * q)


def hutchinson_moments(items: Sequence[ParameterItem], seed: int) -> None:
    """Write Σ w² z (Hz), z the random signs of the seed, of all items into their outputs."""
    for item in items:
        assert item.hvp is not None
        w, hz = _widened(item.weight, item.hvp)
        _write_sums(item, w * (w * random_signs(seed, item.stream, w) * hz))


def rademacher(items: Sequence[RademacherItem], seed: int) -> None:
    """Fill the outputs of all items with random signs."""
    for item in items:
        item.out.copy_(random_signs(seed, item.stream, item.out))


def gate_gradients(args: GateGradientsArgs) -> None:
    """Write the gate gradients of one activation into `args.out`."""
    extents = (args.batch, args.outer, args.channels, args.inner)
    dtype = accumulator(args.output.dtype)
    y = args.output.to(dtype).reshape(extents)
    if args.bias is not None:
        y = y - args.bias.to(dtype)[:, None]
    args.out.copy_((y * args.grad_output.to(dtype).reshape(extents)).sum((1, 3)))


def conv2d_fisher(args: Conv2dFisherArgs) -> None:
    """Write Σ_n of squared per-example weight gradients, or its filters' sums, into `args.out`."""
    dtype = accumulator(args.input.dtype)
    size = (args.groups * args.filters, args.channels, *args.kernel)
    geometry = (args.stride, args.padding, args.dilation, args.groups)
    fisher = args.input.new_zeros(size, dtype=dtype)
    for x, dy in zip(args.input.split(1), args.grad_output.split(1), strict=True):
        fisher += conv2d_weight(x.to(dtype), size, dy.to(dtype), *geometry).square()
    if args.weight is not None:
        fisher = (fisher * args.weight.to(dtype).square()).flatten(1).sum(1)
    args.out.copy_(fisher)


def conv2d_example_norms(args: Conv2dFisherArgs) -> None:
    """Write Σ of squared weight gradients of each example into `args.out`."""
    dtype = accumulator(args.input.dtype)
    size = (args.groups * args.filters, args.channels, *args.kernel)
    geometry = (args.stride, args.padding, args.dilation, args.groups)
    for n in range(args.batch):
        x, dy = (t[n : n + 1].to(dtype) for t in (args.input, args.grad_output))
        args.out[n] = conv2d_weight(x, size, dy, *geometry).square().sum()


def global_threshold(args: GlobalThresholdArgs) -> None:
    """Write into `args.table` what tells the `args.wanted` greatest scores from the others."""
    scores = [_score(item) for item in args.items]
    ranked = [s for s, item in zip(scores, args.items, strict=True) if item.ranked]
    keys = torch.cat([sort_keys(s, args.is_signed) for s in ranked])
    ordered, positions = keys.sort(descending=True, stable=True)
    key, last = ordered[args.wanted - 1], positions[args.wanted - 1]
    all_of_them = ((keys == key) & (torch.arange(len(keys), device=keys.device) > last)).sum() == 0
    whole = torch.stack([s.isfinite().all() for s in scores])
    broken = torch.arange(len(scores), 0, -1, device=keys.device).where(~whole, 0).max()
    everything = torch.iinfo(torch.int64).max
    args.table.copy_(torch.stack((key, last.where(~all_of_them, everything), broken)))


def sparse_momentum(args: SparseMomentumArgs) -> None:
    """z ← (beta·z + decay·w) + (active ? g : 0), w ← w − lr·z, of all items or of none."""
    fine = args.table[2] == 0
    for item in args.items:
        w, g, z = _widened(item.weight, item.grad, item.momentum)
        if item.row_scores is not None:
            active = among_the_greatest(item.row_scores, args.table, item.first)
            active = active.repeat_interleave(item.row_elements)
        elif item.ranked:
            active = among_the_greatest(narrowed(g * w), args.table, item.first)
        else:
            active = torch.ones_like(g, dtype=torch.bool)
        moved = (item.beta * z + item.decay * w) + g.where(active, torch.zeros_like(g))
        for tensor, old, new in ((item.momentum, z, moved), (item.weight, w, w - item.lr * moved)):
            tensor.copy_(new.where(fine, old).view(tensor.shape))


def sort_keys(scores: Tensor, is_signed: bool) -> Tensor:
    """int64 numbers below 2**32 in the order of scores, or of their magnitudes."""
    bits = (scores + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    if not is_signed:
        return bits & 0x7FFFFFFF
    return bits ^ torch.where(bits >= 2**31, 0xFFFFFFFF, 2**31)


def among_the_greatest(
    scores: Tensor, table: Tensor, first: int, is_signed: bool = False
) -> Tensor:
    """Which scores, a vector whose first has the position `first`, a table names."""
    keys, positions = sort_keys(scores, is_signed), torch.arange(len(scores), device=scores.device)
    return (keys > table[0]) | ((keys == table[0]) & (positions + first <= table[1]))


def narrowed(values: Tensor) -> Tensor:
    """In float32, infinite only where they are."""
    most = torch.finfo(torch.float32).max
    return values.clamp(-most, most).where(values.isfinite(), values).float()


def _score(item: ScoreItem) -> Tensor:
    """Of an item that is not ranked, what is looked at."""
    a = item.a.to(accumulator(item.dtype)).reshape(-1)
    if item.b is None:
        return narrowed(a)
    b = item.b.to(accumulator(item.dtype)).reshape(-1)
    return narrowed(b * a if item.ranked else b)


def random_signs(seed: int, stream: int, like: Tensor) -> Tensor:
    """1 and -1 for the elements of a vector `like`, as csrc/common/philox.h defines them."""
    blocks = torch.arange(-(-len(like) // 128), device=like.device)
    zeros = torch.zeros_like(blocks)
    bits = philox4x32((blocks & 0xFFFFFFFF, blocks >> 32, zeros + stream, zeros), seed)
    minus = bits[:, :, None] >> torch.arange(32, device=like.device) & 1
    return 1 - 2 * minus.flatten()[: len(like)].to(like.dtype)


def philox4x32(counter: Sequence[Tensor], key: int) -> Tensor:
    """Philox4x32-10: four words [N] of 32 bits, held in int64, to as many random ones, [N, 4]."""
    a, b, c, d = counter
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2**64: the bits of the product
        a, b = q >> 32 & 0xFFFFFFFF ^ b ^ low, q & 0xFFFFFFFF
        c, d = p >> 32 & 0xFFFFFFFF ^ d ^ high, p & 0xFFFFFFFF
        low, high = low + 0x9E3779B9 & 0xFFFFFFFF, high + 0xBB67AE85 & 0xFFFFFFFF
    return torch.stack((a, b, c, d), -1)


def _widened(*tensors: Tensor) -> list[Tensor]:
    """The elements in the order they are stored, in the dtype of their sums."""
    return [t.to(accumulator(t.dtype)).reshape(-1) for t in tensors]


def _write_sums(item: ParameterItem, *terms: Tensor) -> None:
    """Sum what each sum adds, elements in the order they are stored, into the item's outputs."""
    extents = (item.groups, item.rows // item.groups, item.channels, item.kernel)
    if item.channels_last:
        extents = (*extents[:2], item.kernel, item.channels)
    blocks = torch.stack(terms).reshape(len(terms), *extents)
    if item.channels_last:
        blocks = blocks.transpose(3, 4)
    if item.row_out is not None:
        item.row_out.copy_(blocks.sum((3, 4)).flatten(1).T.reshape(item.row_out.shape))
    if item.col_out is not None:
        item.col_out.copy_(blocks.sum((2, 4)).flatten(1).T.reshape(item.col_out.shape))
