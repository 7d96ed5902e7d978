"""The shapes that are measured: parameters, activations and layers of well-known networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]

# (width of the bottleneck, blocks) of ResNet-50's four stages (He et al., 2016); a block's output
# has four times its width.
RESNET50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
EXPANSION = 4


@dataclass(frozen=True)
class Conv:
    """A convolution's weight [out, in, k, k], and the side of its output for a 224² image."""

    weight: Shape
    side: int


@dataclass(frozen=True)
class Layer:
    """What a layer's weight gradient is made of: the shapes of x and the weight, the geometry."""

    name: str  # of the first such layer
    input: Shape  # [N, C, H, W], or [N, tokens, features] of a linear layer
    weight: Shape
    stride: int = 1
    padding: int = 0
    count: int = 1  # layers of these shapes in the network

    @property
    def output(self) -> Shape:
        if len(self.weight) == 2:
            return (*self.input[:-1], self.weight[0])
        sides = self.input[2:]
        places = [(s + 2 * self.padding - self.weight[2]) // self.stride + 1 for s in sides]
        return (self.input[0], self.weight[0], *places)

    @property
    def flops(self) -> int:
        """Of the weight gradient: two per multiply-add."""
        return 2 * prod(self.output) * prod(self.weight[1:])


def layers_of(model: nn.Module, input: Shape) -> list[Layer]:
    """A model's convolutions and linear layers in order, those of the same shapes counted once."""
    found: dict[tuple, Layer] = {}

    def see(name: str, module: nn.Module, x: Tensor) -> None:
        conv = isinstance(module, nn.Conv2d)
        geometry = (module.stride[0], module.padding[0]) if conv else (1, 0)
        layer = Layer(name, tuple(x.shape), tuple(module.weight.shape), *geometry)
        key = (layer.input, layer.weight, *geometry)
        known = found.setdefault(key, replace(layer, count=0))
        found[key] = replace(known, count=known.count + 1)

    hooks = [
        module.register_forward_pre_hook(lambda module, x, name=name: see(name, module, x[0]))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    model.to("meta")(torch.empty(input, device="meta"))
    for hook in hooks:
        hook.remove()
    return list(found.values())


def transformer_layers(
    batch: int = 8, tokens: int = 2048, *, hidden: int = 4096, inner: int = 11008
) -> list[Layer]:
    """The linear layers of a block of a Llama of 7 B parameters."""
    shapes = {
        "attention": (hidden, hidden, 4),
        "up": (inner, hidden, 2),
        "down": (hidden, inner, 1),
    }
    return [
        Layer(name, (batch, tokens, into), (out, into), count=count)
        for name, (out, into, count) in shapes.items()
    ]


def resnet50_convs(keep: float = 1.0) -> list[Conv]:
    """ResNet-50's 53 convolutions in order, every width shrunk to the fraction `keep`."""

    def width(full: int) -> int:
        return max(1, round(full * keep))

    convs = [Conv((width(64), 3, 7, 7), 112)]
    before, side = width(64), 56
    for stage, (full, blocks) in enumerate(RESNET50_STAGES):
        inner, outer = width(full), width(full * EXPANSION)
        for block in range(blocks):
            first_side = side
            if block == 0 and stage > 0:
                side //= 2  # by the stride of the 3x3 convolution, so the 1x1 before it is larger
            convs.append(Conv((inner, before, 1, 1), first_side))
            convs.append(Conv((inner, inner, 3, 3), side))
            convs.append(Conv((outer, inner, 1, 1), side))
            if block == 0:
                convs.append(Conv((outer, before, 1, 1), side))
            before = outer
    return convs


def resnet50_weights(keep: float = 1.0) -> list[Shape]:
    """ResNet-50's 54 convolution and linear weights, 25.50 M elements at keep = 1."""
    convs = resnet50_convs(keep)
    return [conv.weight for conv in convs] + [(1000, convs[-1].weight[0])]


def resnet50_activations(batch: int) -> list[Shape]:
    """[N, C, H, W] of every convolution's output for images of 224², 11.1 M elements an image."""
    return [(batch, conv.weight[0], conv.side, conv.side) for conv in resnet50_convs()]


def llama_weights(
    *, layers: int = 10, hidden: int = 1024, inner: int = 2816, vocabulary: int = 32000
) -> list[Shape]:
    """The 2-D weights of a Llama of 194 M parameters (at the defaults): 72 matrices."""
    block = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    return [(vocabulary, hidden), *block * layers, (vocabulary, hidden)]


def llama_activations(batch: int, tokens: int) -> list[Shape]:
    """[N, T, C] of every linear layer's output in that Llama, without the vocabulary's."""
    return [(batch, tokens, out) for out, _ in llama_weights()[1:-1]]


def some(shapes: Sequence[Shape], quick: bool) -> Sequence[Shape]:
    """All of them, or the first eight: one graph of fifty layers takes long to compile."""
    return shapes[:8] if quick else shapes


def elements(shapes: Sequence[Shape]) -> int:
    """How many numbers a list of shapes holds."""
    total = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        total += count
    return total
