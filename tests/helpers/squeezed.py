"""A model with norms and small layers, and the ways in which a training loop may run it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk


class Squeezed(nn.Module):
    """Convolutions in front of norms, and small ones of a squeezed image without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.of_stem = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.body, self.of_body = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)
        self.saves = self.twice = self.squeezed_twice = False

    def first(self, x: Tensor) -> Tensor:
        return self.of_stem(self.stem(x)).relu()

    def second(self, x: Tensor) -> Tensor:
        x = self.of_body(self.body(x)).sigmoid()
        squeezed = x.mean((2, 3), keepdim=True)
        gate = nn.functional.leaky_relu_(self.down(squeezed))
        if self.squeezed_twice:
            gate = gate + self.down(squeezed * 2)
        return self.head((x * self.up(gate).sigmoid()).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.first(x * 2) if self.twice else self.first(x)
        return checkpoint(self.second, x, use_reentrant=False) if self.saves else self.second(x)


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


def loss(y: Tensor) -> Tensor:
    return y.square().sum()


def plain(model: Squeezed) -> None:
    loss(model(images())).backward()


def two_passes_before_one_backward(model: Squeezed) -> None:
    (loss(model(images())) + loss(model(images(3)))).backward()


def two_backwards(model: Squeezed) -> None:
    for count in (4, 6):
        loss(model(images(count))).backward()


def two_backwards_over_one_graph(model: Squeezed) -> None:
    y = model(images())
    y[0].sum().backward(retain_graph=True)
    loss(y).backward()


def clipped(model: Squeezed) -> None:
    loss(model(images())).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(0.1)


def onto_gradients_that_there_are(model: Squeezed) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    loss(model(images())).backward()
    model.zero_grad(set_to_none=False)


def with_a_graph_of_gradients(model: Squeezed) -> None:
    loss(model(images())).backward(create_graph=True)


def in_checkpoints(model: Squeezed) -> None:
    model.saves = True
    loss(model(images())).backward()
    model.saves = False


def beside_passes_that_count_nothing(model: Squeezed) -> None:
    model(images())
    with torch.no_grad():
        model(images())
    loss(model(images())).backward()
    model(images())


def part_by_part(model: Squeezed) -> None:
    for _ in range(2):
        loss(model.second(model.first(images()))).backward()


def a_norm_twice_in_a_pass(model: Squeezed) -> None:
    model.twice = True
    loss(model(images())).backward()
    model.twice = False


def a_small_layer_twice_in_a_pass(model: Squeezed) -> None:
    model.squeezed_twice = True
    loss(model(images())).backward()
    model.squeezed_twice = False


def other_weights(model: Squeezed) -> None:
    model.down.weight = nn.Parameter(torch.randn_like(model.down.weight))
    loss(model(images())).backward()


def weights_of_one_call(model: Squeezed) -> None:
    others = {"up.bias": torch.rand(8).double().requires_grad_()}
    loss(torch.func.functional_call(model, others, images())).backward()
    loss(model(images())).backward()


def a_frozen_bias(model: Squeezed) -> None:
    model.down.bias.requires_grad_(False)
    loss(model(images())).backward()
    model.down.bias.requires_grad_(True)


def small_and_large_outputs(model: Squeezed) -> None:
    for count in (5, 60, 5):
        loss(model(images(count))).backward()


def other_parameters(model: Squeezed) -> None:
    """Put there as `load_state_dict(assign=True)` does."""
    model.of_stem.weight = nn.Parameter(torch.rand_like(model.of_stem.weight))
    loss(model(images())).backward()


def parameters_of_one_call(model: Squeezed) -> None:
    others = {"of_stem.weight": torch.rand(6).double().requires_grad_()}
    loss(torch.func.functional_call(model, others, images())).backward()


def lent_parameters(model: Squeezed) -> None:
    """For one call, of the kind that a model has; beside a pass with its own."""
    lent = {name: nn.Parameter(own.detach().clone()) for name, own in model.named_parameters()}
    loss(torch.func.functional_call(model, lent, images())).backward()
    loss(model(images())).backward()


def only_lent_parameters(model: Squeezed) -> None:
    lent = {f"of_body.{leaf}": nn.Parameter(torch.rand(8).double()) for leaf in ("weight", "bias")}
    for _ in range(2):
        loss(torch.func.functional_call(model, lent, images())).backward()


def a_frozen_scale(model: Squeezed) -> None:
    model.of_body.weight.requires_grad_(False)
    loss(model(images())).backward()
    model.of_body.weight.requires_grad_(True)


def inside_scoring(model: Squeezed) -> None:
    with tk.scoring(model):
        loss(model(images())).backward()


def in_the_other_mode(model: Squeezed) -> None:
    model.train(not model.training)
    loss(model(images())).backward()


def large_outputs(model: Squeezed) -> None:
    loss(model(images(60))).backward()


WAYS = (
    plain, two_passes_before_one_backward, two_backwards, two_backwards_over_one_graph, clipped,
    onto_gradients_that_there_are, with_a_graph_of_gradients, in_checkpoints,
    beside_passes_that_count_nothing, part_by_part, a_norm_twice_in_a_pass, other_parameters,
    parameters_of_one_call, lent_parameters, only_lent_parameters, a_frozen_scale, inside_scoring,
    in_the_other_mode, large_outputs, a_small_layer_twice_in_a_pass, other_weights,
    weights_of_one_call, a_frozen_bias, small_and_large_outputs,
)  # fmt: skip
