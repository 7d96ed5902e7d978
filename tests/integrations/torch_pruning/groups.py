"""Networks with all that Torch-Pruning's groups hold, and what their scores should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Terms = Callable[[nn.Parameter], Tensor]


class Everything(nn.Module):
    """Plain, depthwise, grouped, dilated and transposed convolutions, norms and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 6, 3, padding=2, dilation=2, groups=3)
        self.up = nn.ConvTranspose2d(6, 10, 2, stride=2)
        self.down = nn.Conv2d(10, 5, 3, stride=2)
        self.hidden = nn.Linear(5 * 9, 7)
        self.layer_norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depthwise(torch.sigmoid(self.norm(self.stem(x)))))
        x = torch.sigmoid(self.grouped(torch.tanh(self.point(x))))
        x = torch.tanh(self.down(self.up(x)))
        return self.head(self.layer_norm(self.hidden(x.flatten(1))))


def everything() -> tuple[Everything, Tensor, Tensor]:
    """The network in eval mode, with norms that have seen something, and a batch."""
    model = Everything()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model.eval(), torch.randn(5, 3, 4, 4), torch.randint(0, 4, (5,))


def all_groups(model: nn.Module, x: Any, ignored: Sequence[nn.Module]) -> list[Any]:
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    return list(graph.get_all_groups(ignored_layers=list(ignored)))


def group_of(groups: Sequence[Any], layer: nn.Module) -> Any:
    """That of the channels which a layer makes."""
    return next(
        group
        for group in groups
        for item in group
        if item.dep.target.module is layer and "out_" in item.dep.handler.__name__
    )


def assert_same(found: Tensor, want: Tensor) -> None:
    """To 1e-5 of the greatest score, as float32 sums of either sign allow."""
    scale = want.abs().max().item()
    torch.testing.assert_close(found.to(want), want, rtol=1e-5, atol=1e-5 * scale)


def loop_squares(model: nn.Module, loss_of: Callable[[slice], Tensor], n: int) -> Terms:
    """w²·mean g², from one backward pass for each example."""
    total: dict[nn.Parameter, Tensor] = {}
    for i in range(n):
        model.zero_grad()
        loss_of(slice(i, i + 1)).backward()
        for p in model.parameters():
            if p.grad is not None:
                total[p] = total.get(p, 0) + p.grad.double().square()
    model.zero_grad()
    return lambda p: total[p] / n * p.detach().double().square()


def expected(
    group: Any, terms: Terms, kinds: tuple[type, ...], *, outputs_only: bool = False
) -> Tensor:
    """The mean over a group's parameters of what each channel has in them, channel by channel."""
    size = len(group[0].idxs)
    total, count = torch.zeros(size, dtype=torch.float64), 0
    for item in group:
        layer = item.dep.target.module
        if not isinstance(layer, kinds):
            continue
        into = isinstance(layer, (_ConvNd, nn.Linear)) and "in_" in item.dep.handler.__name__
        if into and outputs_only:
            continue
        for name in ("weight",) if into else ("weight", "bias"):
            parameter = getattr(layer, name)
            if parameter is None:
                continue
            count += 1
            table = terms(parameter)
            for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                total[root] += of_channel(layer, table, channel, into)
    total /= count
    return total / total.mean()


def of_channel(layer: nn.Module, table: Tensor, channel: int, into: bool) -> Tensor:
    """The part of a parameter that belongs to one channel of its layer, summed."""
    if table.dim() == 1:
        return table[channel]
    groups = getattr(layer, "groups", 1)
    if into == isinstance(layer, _ConvTransposeNd):
        return table[channel].sum()
    within = table.size(1)
    here = channel // within
    rows = table.size(0) // groups
    return table[here * rows : (here + 1) * rows, channel % within].sum()
