"""Modules and functions that pieces of networks are made of, each with a structure of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Apply(nn.Module):
    """A function with modules to use."""

    def __init__(self, function: Callable, **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Partial(nn.Module):
    """A convolution of the first channels, whose number is an attribute; the rest passes."""

    def __init__(self, width: int, part: int, written: bool) -> None:
        super().__init__()
        self.touched, self.written = part, written
        self.conv = nn.Conv2d(part, part, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.written:
            x = x.clone()
            x[:, : self.touched] = self.conv(x[:, : self.touched])
            return x
        one, rest = torch.split(x, [self.touched, x.shape[1] - self.touched], dim=1)
        return torch.cat([self.conv(one), rest], 1)


class Attention(nn.Module):
    """Attention over pixels; the number of heads is an attribute, or the width of one is."""

    def __init__(self, width: int, heads: int, shared: int, size: int, how: str) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim, self.how = heads, heads // shared, size, how
        inner, outer = heads * size, heads // shared * size
        if how == "packed":
            self.qkv = nn.Linear(width, 3 * inner)
        else:
            self.q, self.k = nn.Linear(width, inner), nn.Linear(width, outer)
            self.v = nn.Linear(width, outer)
        self.scale = size**-0.5
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if self.how == "packed":
            packed = self.qkv(tokens).reshape(n, h * w, 3, self.num_heads, -1)
            q, k, v = packed.permute(2, 0, 3, 1, 4)
        else:
            shape = (n, h * w, -1, self.head_dim)
            q, k, v = (f(tokens).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
            if k.shape[1] != q.shape[1]:
                times = q.shape[1] // k.shape[1]
                k = k[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
                v = v.repeat_interleave(times, 1)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(n, h * w, -1))
        return x + y.transpose(1, 2).reshape(n, -1, h, w)


class Recurrent(nn.Module):
    def __init__(self, kind: str, inputs: int) -> None:
        super().__init__()
        make = nn.LSTM if kind == "lstm" else nn.GRU
        self.rnn = make(inputs, 5, num_layers=2, batch_first=True, bidirectional=kind == "lstm")
        self.out = nn.Linear(10 if kind == "lstm" else 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x.flatten(2).transpose(1, 2))
        return self.out(y[:, -1])


def halves(self: nn.Module, x: Tensor) -> Tensor:
    one, two = x.chunk(2, 1)
    return torch.cat([one.relu(), two.sigmoid()], 1)


def slices(self: nn.Module, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([x[:, half:].tanh(), x[:, :half]], 1)


def shuffle(groups: int) -> Callable:
    def shuffled(self: nn.Module, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return shuffled


def shifted(self: nn.Module, x: Tensor) -> Tensor:
    part = x.shape[1] // 4
    out = torch.zeros_like(x)
    out[:, :part, 1:] = x[:, :part, :-1]
    out[:, part : 2 * part, :-1] = x[:, part : 2 * part, 1:]
    out[:, 2 * part :] = x[:, 2 * part :]
    return out


def windows(self: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = x.permute(0, 2, 3, 1).view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
    y = self.back(self.mix(y.reshape(-1, 4, c)).sigmoid())
    y = y.view(n, h // 2, w // 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h, w)
    return x + y


def non_local(self: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
    y = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
    return x + self.out(y.unflatten(2, x.shape[2:]))


def split_attention(self: nn.Module, x: Tensor) -> Tensor:
    x = self.radix(x)
    parts = x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:])
    gates = self.up(self.down(parts.sum(1).mean((2, 3), keepdim=True)).relu())
    return (parts * gates.view(len(x), 2, -1, 1, 1).softmax(1)).sum(1)


def padded(extra: int) -> Callable:
    def added(self: nn.Module, x: Tensor) -> Tensor:
        return self.body(x) + F.pad(x, (0, 0, 0, 0, 0, extra))

    return added
