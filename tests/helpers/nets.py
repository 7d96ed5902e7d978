"""Small networks in which every rule of tk.Importance has a place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixed(nn.Module):
    """BN and none, bias and none, in-place ReLU and skip, grouped and transposed convolutions."""

    def __init__(self, last: Callable[..., Tensor] = F.hardswish) -> None:
        super().__init__()
        self.last = last
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.plain = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.grouped_bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)), inplace=True)
        y = F.relu(self.plain(x), inplace=True)
        y = self.grouped_bn(self.grouped(y))
        y += x
        y = self.last(self.up(F.relu(y, inplace=True)), inplace=True)
        return self.fc(y.mean((2, 3)))


#: The module whose output a gate of Mixed sits on.
GATED = {
    "stem": "stem_bn",
    "plain": "plain",
    "grouped": "grouped_bn",
    "up": "up",
    "fc": "fc",
}


def mixed(*, train: bool = True, last: Callable[..., Tensor] = F.hardswish) -> Mixed:
    """A fresh one in float64, with BatchNorms that have seen and learned something.

    With last=F.relu it is piecewise linear in every gate.
    """
    model = Mixed(last).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
    return model.train(train)


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    """Fresh images [n, 3, 9, 9] in float64 and labels."""
    return torch.randn(n, 3, 9, 9, dtype=torch.float64), torch.randint(0, 5, (n,))


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def backward(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """One training step's gradients, from none."""
    model.zero_grad()
    loss = loss_of(model, data)
    loss.backward()
    return loss


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The module's output is passed through `change`."""
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def gate_gradient(model: nn.Module, name: str, data: tuple[Tensor, Tensor]) -> Tensor:
    """[N, C]: autograd's gradient of a gate per example on the output of module `name`."""
    gates = []

    def gate(output: Tensor) -> Tensor:
        shape = (*output.shape[:2], *[1] * (output.dim() - 2))
        gates.append(torch.ones(shape, dtype=output.dtype, requires_grad=True))
        return output * gates[-1]

    with changed_output(model.get_submodule(name), gate):
        (gradient,) = torch.autograd.grad(loss_of(model, data), gates)
    return gradient.flatten(1)


def filters_first(layer: nn.Module, tensor: Tensor) -> Tensor:
    """[filters, rest] of a weight-shaped tensor."""
    if getattr(layer, "transposed", False):
        parts = tensor.chunk(layer.groups)
        return torch.cat([part.transpose(0, 1).flatten(1) for part in parts])
    return tensor.flatten(1)


def gated_loss(
    model: nn.Module,
    gated: dict[str, str],
    gates: Tensor,
    loss: Callable[[], Tensor],
) -> Tensor:
    """The loss with the outputs of modules `gated` (layer -> module) multiplied by their gates.

    Args:
        gates: those of all layers, one after the other.
    """
    layers = [model.get_submodule(name) for name in gated]
    sizes = [len(filters_first(layer, layer.weight)) for layer in layers]
    with ExitStack() as stack:
        for layer, module, gate in zip(layers, gated.values(), gates.split(sizes), strict=True):
            shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * len(layer.kernel_size))
            stack.enter_context(
                changed_output(
                    model.get_submodule(module), lambda y, g=gate, s=shape: y * g.view(s)
                )
            )
        return loss()
