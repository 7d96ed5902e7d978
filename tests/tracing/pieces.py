"""Pieces of networks, [N, C, H, W] in and out, each with a structure that a tracer must read."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tracing.parts import (
    Apply,
    Attention,
    Partial,
    Recurrent,
    halves,
    non_local,
    padded,
    shifted,
    shuffle,
    slices,
    split_attention,
    windows,
)

#: Norms across channels, as models write them out: of (module, images).
ACROSS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda s, x: s.gain * F.normalize(x - x.mean(1, True), dim=1) + s.shift,
    "rms_norm": lambda s, x: s.gain * x * (x.square().mean(1, keepdim=True) + 0.1).rsqrt(),
    "response_norm": lambda s, x: x + s.gain * x * (
        (n := x.norm(dim=(2, 3), keepdim=True)) / (n.mean(1, keepdim=True) + 0.1)
    ),
}  # fmt: skip


def conv(rng: random.Random, inputs: int, outputs: int, **options: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=rng.random() < 0.5, **options)


def normed(rng: random.Random, inputs: int, outputs: int) -> nn.Module:
    parts = [conv(rng, inputs, outputs), nn.BatchNorm2d(outputs)]
    if rng.random() < 0.3:
        parts.reverse()
        parts[0] = nn.BatchNorm2d(inputs)
    return nn.Sequential(*parts, activation(rng))


def activation(rng: random.Random) -> nn.Module:
    kinds = [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.ReLU(inplace=True), nn.Softplus()]
    return rng.choice([*kinds, nn.LogSigmoid(), nn.Hardswish(), nn.LeakyReLU(0.1), nn.Identity()])


def piece(kind: str, rng: random.Random, c: int) -> tuple[nn.Module, int]:
    """A piece for c channels, and how many it gives."""
    even, width = c % 2 == 0, rng.choice([4, 6, 8, 12])
    if kind == "conv":
        return conv(rng, c, width), width
    if kind == "normed":
        return normed(rng, c, width), width
    if kind == "activation":
        return activation(rng), c
    if kind == "pool":
        return rng.choice(
            [nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.Upsample(scale_factor=1)]
        ), c
    if kind == "halves" and even:
        return Apply(rng.choice([halves, slices])), c
    if kind == "twice":
        return Apply(lambda s, x: torch.cat([x, s.act(x), x], 1), act=activation(rng)), 3 * c
    if kind == "shuffle" and even:
        groups = rng.choice([g for g in (2, 3, 4) if c % g == 0])
        return Apply(shuffle(groups)), c
    if kind == "native_shuffle" and even:
        return nn.ChannelShuffle(2), c
    if kind == "residual":
        body = nn.Sequential(normed(rng, c, width), conv(rng, width, c))
        return Apply(lambda s, x: x + s.body(x), body=body), c
    if kind == "projection":
        return Apply(
            lambda s, x: F.relu(s.skip(x) + s.body(x)),
            body=normed(rng, c, width), skip=nn.Conv2d(c, width, 1),
        ), width  # fmt: skip
    if kind == "padded":
        return Apply(padded(2), body=conv(rng, c, c + 2)), c + 2
    if kind == "excite":
        return Apply(
            lambda s, x: x * torch.sigmoid(s.up(F.relu(s.down(x.mean((2, 3), keepdim=True))))),
            down=nn.Conv2d(c, width, 1), up=nn.Conv2d(width, c, 1),
        ), c  # fmt: skip
    if kind == "grouped" and even:
        width = rng.choice([4, 8])
        return conv(rng, c, width, groups=2), width
    if kind == "depthwise":
        times = rng.choice([1, 1, 2])
        return conv(rng, c, times * c, groups=c), times * c
    if kind == "transposed":
        groups = 2 if even and rng.random() < 0.5 else 1
        return nn.ConvTranspose2d(c, 4, 3, padding=1, groups=groups), 4
    if kind == "pixel_shuffle" and c % 4 == 0 and c >= 8:
        return nn.Sequential(nn.PixelShuffle(2), nn.AvgPool2d(2)), c // 4
    if kind == "pixel_unshuffle" and c <= 6:
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2)), 4 * c
    if kind == "maxout" and even:
        if rng.random() < 0.5:
            return Apply(lambda s, x: x.reshape(len(x), -1, 2, *x.shape[2:]).amax(2)), c // 2
        return Apply(lambda s, x: torch.maximum(*x.chunk(2, 1))), c // 2
    if kind == "partial" and c >= 4:
        return Partial(c, c // 4, rng.random() < 0.5), c
    if kind == "attention":
        how = rng.choice(["plain", "fused", "packed"])
        shared = 1 if how == "packed" else rng.choice([1, 2])
        return Attention(c, rng.choice([2, 4]), shared, rng.choice([3, 5]), how), c
    if kind == "shared":
        same = conv(rng, c, c)
        return nn.Sequential(same, activation(rng), same), c
    if kind == "glu" and even:
        return rng.choice([nn.GLU(1), Apply(lambda s, x: torch.mul(*x.chunk(2, 1)))]), c // 2
    if kind == "reflect":
        return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(c, width, 3)), width
    if kind == "scale":
        return Apply(lambda s, x: x * s.gain, gain=nn.Parameter(torch.rand(c, 1, 1) + 0.5)), c
    if kind == "gate":
        return Apply(lambda s, x: x * s.mask(x).sigmoid(), mask=nn.Conv2d(c, 1, 1)), c
    if kind == "prelu":
        return nn.PReLU(c), c
    if kind == "instance_norm":
        return nn.InstanceNorm2d(c, affine=rng.random() < 0.5), c
    if kind == "group_norm":
        return nn.GroupNorm(rng.choice([g for g in (1, 2, 4, c) if c % g == 0]), c), c
    if kind in ACROSS:
        gain, shift = (nn.Parameter(torch.rand(c, 1, 1) + 0.5) for _ in range(2))
        return Apply(ACROSS[kind], gain=gain, shift=shift), c
    if kind == "softmax":
        return nn.Softmax(1), c
    if kind == "every_other" and even:
        return Apply(lambda s, x: x[:, ::2] - x[:, 1::2]), c // 2
    if kind == "stacked":
        return Apply(lambda s, x: torch.stack([x, x.relu()], 1).sum(1)), c
    if kind == "flipped":
        return Apply(lambda s, x: x.flip(1)), c
    if kind == "split_of_two":
        return Apply(
            lambda s, x: torch.mul(*torch.split(s.both(x), s.both(x).shape[1] // 2, 1)),
            both=conv(rng, c, 2 * width),
        ), width  # fmt: skip
    if kind == "rescaled":
        return Apply(lambda s, x: x * torch.full_like(x, 0.5) + torch.zeros(x.shape)), c
    if kind == "weight_norm":
        return nn.utils.parametrizations.weight_norm(conv(rng, c, width)), width
    if kind == "csp":
        return Apply(
            lambda s, x: s.merge(torch.cat([s.one(x), s.two(x), s.one(x).relu()], 1)),
            one=conv(rng, c, 4), two=normed(rng, c, width), merge=conv(rng, 8 + width, 6),
        ), 6  # fmt: skip
    if kind == "c2f":

        def c2f(s: nn.Module, x: Tensor) -> Tensor:
            parts = list(s.enter(x).chunk(2, 1))
            parts.append(parts[-1] + s.body(parts[-1]))
            return s.leave(torch.cat(parts, 1))

        return Apply(
            c2f, enter=normed(rng, c, 8), body=normed(rng, 4, 4), leave=conv(rng, 12, width)
        ), width  # fmt: skip
    if kind == "summed":
        return Apply(lambda s, x: x * s.act(x).sum(1, keepdim=True).tanh(), act=activation(rng)), c
    if kind == "normalised":
        return Apply(lambda s, x: F.normalize(x, dim=1)), c
    if kind == "temporal_shift" and c >= 4:
        return Apply(shifted), c
    if kind == "windows":
        return Apply(windows, mix=nn.Linear(c, width), back=nn.Linear(width, c)), c
    if kind == "frames":
        return Apply(
            lambda s, x: s.body(x.unflatten(0, (1, -1)).flatten(0, 1)), body=conv(rng, c, c)
        ), c
    if kind == "patches":
        return Apply(
            lambda s, x: s.mix(F.unfold(x, 3, padding=1)).unflatten(2, x.shape[2:]),
            mix=nn.Conv1d(9 * c, width, 1),
        ), width  # fmt: skip
    if kind == "non_local":
        return Apply(
            non_local, q=nn.Conv2d(c, 5, 1), k=nn.Conv2d(c, 5, 1), v=nn.Conv2d(c, width, 1),
            out=nn.Conv2d(width, c, 1),
        ), c  # fmt: skip
    if kind == "position":
        return Apply(lambda s, x: x + s.table, table=nn.Parameter(torch.randn(1, c, 4, 1))), c
    if kind == "split_attention":
        return Apply(
            split_attention, radix=conv(rng, c, 2 * width), down=nn.Conv2d(width, 3, 1),
            up=nn.Conv2d(3, 2 * width, 1),
        ), width  # fmt: skip
    # Of a multiple of 2, or of 3, the last ones may be a half or a third to a trace, and follow the
    # width; a pruner's proof refuses that here, where they do not.
    if kind == "dual_path" and c >= 4 and c % 2 and (c + 1) % 3:
        return Apply(
            lambda s, x: torch.cat([x[:, :-2] + (y := s.body(x))[:, :-3], x[:, -2:], y[:, -3:]], 1),
            body=conv(rng, c, c + 1),
        ), c + 3  # fmt: skip
    if kind == "einsum":
        weight = nn.Parameter(torch.randn(width, c))
        return Apply(lambda s, x: torch.einsum("oc,nchw->nohw", s.weight, x), weight=weight), width
    return conv(rng, c, width), width


KINDS = (
    "conv", "normed", "activation", "pool", "halves", "twice", "shuffle", "native_shuffle",
    "residual", "projection", "padded", "excite", "grouped", "depthwise", "transposed", "maxout",
    "pixel_shuffle", "pixel_unshuffle", "partial", "attention", "shared", "glu", "reflect",
    "scale", "gate", "prelu", "instance_norm", "group_norm", "softmax", "every_other", "stacked",
    "flipped", "split_of_two", "rescaled", "weight_norm", "csp", "c2f", "einsum",
    "summed", "normalised", "temporal_shift", "windows", "frames", "patches", "non_local",
    "position", "split_attention", "dual_path", *ACROSS,
)  # fmt: skip
HEADS = ("mean", "flatten", "lstm", "gru", "conv", "tokens")


def head(kind: str, c: int, size: int) -> nn.Module:
    """What makes a piece's channels an output."""
    if kind == "flatten":
        return nn.Sequential(nn.Flatten(), nn.Linear(c * size**2, 6), nn.ReLU(), nn.Linear(6, 3))
    if kind in ("lstm", "gru"):
        return Recurrent(kind, c)
    if kind == "conv":
        return nn.Conv2d(c, 2, 1)
    if kind == "tokens":
        return Apply(lambda s, x: s.out(x.flatten(2).transpose(1, 2)), out=nn.Linear(c, 3))
    return Apply(lambda s, x: s.out(x.mean((2, 3))), out=nn.Linear(c, 3))


def network(
    kinds: list[str], last: str, seed: int, size: int = 4, widest: int = 24
) -> nn.Sequential:
    """A network of these pieces, narrowed by a convolution where it gets wider than `widest`."""
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        c = rng.choice([4, 6, 8])
        parts: list[nn.Module] = [conv(rng, 3, c)]
        for kind in kinds:
            part, c = piece(kind, rng, c)
            parts.append(part)
            if c > widest:
                parts.append(conv(rng, c, 8))
                c = 8
        return nn.Sequential(*parts, head(last, c, size))
