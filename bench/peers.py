"""What else one would use, each as a small function: eager, torch._foreach, torch.compile, einsum.

Moments are taken of 3-D views [out, in, positions], which suits every peer; sums are float32 also
for half inputs, since a product rounded to half is too far off to be called an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.reference import Expected

#: The dimensions of [out, in, positions] that are summed for a value per row, and per column.
DIMS = {"rows": (1, 2), "cols": (0, 2)}
AXES = {"rows": ("rows",), "cols": ("cols",), "both": ("rows", "cols")}
TWO = ("joint", "gw2")
FIVE = ("gw", "gw2", "abs_gw", "w2", "g2")


def as_3d(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.reshape(*t.shape[:2], -1) for t in tensors]


def two(w: Tensor, g: Tensor, axes: tuple[str, ...]) -> list[Tensor]:
    """Per axis (Σgw)² and Σ(gw)²: what one needs for first-order Taylor scores."""
    p = w.float() * g.float()
    q = p * p
    return [s for axis in axes for s in (p.sum(DIMS[axis]) ** 2, q.sum(DIMS[axis]))]


def five(w: Tensor, g: Tensor, axes: tuple[str, ...]) -> list[Tensor]:
    """Per axis all that filter_moments computes."""
    w, g = w.float(), g.float()
    p = w * g
    terms = (p, p * p, p.abs(), w * w, g * g)
    return [term.sum(DIMS[axis]) for axis in axes for term in terms]


def second_order(w: Tensor, g: Tensor, h: Tensor, axes: tuple[str, ...]) -> list[Tensor]:
    """Per axis (Σq)² and Σq², q = w·(g − ½h): all that second_order_moments computes."""
    q = w.float() * (g.float() - 0.5 * h.float())
    squares = q * q
    return [s for axis in axes for s in (q.sum(DIMS[axis]) ** 2, squares.sum(DIMS[axis]))]


def hutchinson(w: Tensor, h: Tensor, z: Tensor, axes: tuple[str, ...]) -> list[Tensor]:
    """Per axis Σ w² z h; it reads the signs z that hutchinson_moments draws again."""
    p = w.float() * w.float() * z.float() * h.float()
    return [p.sum(DIMS[axis]) for axis in axes]


def per_layer(
    function: Callable[..., list[Tensor]], axes: tuple[str, ...], *lists: Sequence[Tensor]
) -> list[list[Tensor]]:
    """`function` on each layer's tensors; a list of its outputs per layer."""
    return [function(*tensors, axes) for tensors in zip(*lists, strict=True)]


def foreach_two(
    weights: Sequence[Tensor], grads: Sequence[Tensor], axes: tuple[str, ...]
) -> list[list[Tensor]]:
    """`two` with the products of all layers in one torch._foreach call."""
    products = torch._foreach_mul(weights, grads)
    sums = [p.sum(DIMS[axis]) for axis in axes for p in products]
    torch._foreach_mul_(sums, sums)
    torch._foreach_mul_(products, products)
    squares = [p.sum(DIMS[axis]) for axis in axes for p in products]
    n = len(products)
    return [
        [t for k in range(len(axes)) for t in (sums[k * n + i], squares[k * n + i])]
        for i in range(n)
    ]


def named(
    layers: list[list[Tensor]], names: tuple[str, ...], axes: tuple[str, ...]
) -> dict[str, list[Tensor]]:
    """Outputs per layer -> outputs by name, as `reference.check` takes them."""
    keys = [f"{axis}.{name}" for axis in axes for name in names]
    return {key: [layer[i] for layer in layers] for i, key in enumerate(keys)}


def dynamic(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with symbolic shapes: a few variants serve all layers."""
    return torch.compile(function, dynamic=True)


def static(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly the shapes it is given."""
    return torch.compile(function, dynamic=False)


def product(tensors: Sequence[Tensor]) -> Tensor:
    return math.prod(tensors[1:], start=tensors[0])


def product_sum(*tensors: Tensor) -> Tensor:
    """Reads two buffers or more; compiled, it is a floor."""
    return product(tensors).sum()


def eager_gates(output: Tensor, grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (output * grad).sum(dims)


def eager_gates_float(output: Tensor, grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The same for half inputs, with float32 products."""
    return (output.float() * grad.float()).sum(dims)


class TorchPruning:
    """Torch-Pruning's own Taylor importance over all groups of a model, gradients in place."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        import torch_pruning as tp

        self._importance = tp.importance.GroupTaylorImportance()
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
        # ResNet's last layer is what it predicts with: nobody prunes its outputs.
        outputs = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.groups = list(
            graph.get_all_groups(
                ignored_layers=outputs, root_module_types=[nn.modules.conv._ConvNd, nn.Linear]
            )
        )
        out = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
        into = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        index = {layer: i for i, layer in enumerate(layers)}
        self.weights = [layer.weight for layer in layers]
        #: per group: (layer, 0 for its rows and 1 for its columns, indices, indices in the root)
        self._members = [
            [
                (
                    index[dep.target.module],
                    int(dep.handler in into),
                    torch.tensor(indices, device=example.device),
                    torch.tensor(group[i].root_idxs, device=example.device),
                )
                for i, (dep, indices) in enumerate(group)
                if dep.handler in out + into and dep.target.module in index
            ]
            for group in self.groups
        ]

    def run(self) -> list[Tensor]:
        return [self._importance(group) for group in self.groups]

    def by_rule(self, tables: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """Its rule (mean over members of Σ|gw|, over the group's mean), from vectors of Σ|gw|."""
        scores = []
        for members in self._members:
            size = members[0][2].numel()
            total = tables[0][0].new_zeros(size)
            for layer, axis, indices, root in members:
                total.index_add_(0, root, tables[axis][layer][indices])
            total /= len(members)
            scores.append(total / total.mean())
        return scores

    def expected(self, moments: Expected) -> Expected:
        """Its scores in float64; all terms are positive, so each is its own scale."""
        tables = tuple(
            moments[f"{axis}.abs_gw"][0].split([w.size(k) for w in self.weights])
            for k, axis in enumerate(("rows", "cols"))
        )
        scores = torch.cat(self.by_rule(tables))
        return {"scores": (scores, scores)}

    def answer(self, scores: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        return {"scores": scores}
