"""Small layers are read off their gradients where these have the slopes seen at the outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk

WARM = 5


class Gated(nn.Module):
    """Channels with factors from two small layers, one of which others may use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).sigmoid()
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).tanh()).sigmoid()
        return self.head((x * gate).mean((2, 3)))


class ScaledConv2d(nn.Conv2d):
    """Has weights of length one, so that the slope along a weight is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(
            x, nn.functional.normalize(self.weight.flatten(1)).view_as(self.weight), self.bias
        )


def nothing(model: Gated) -> None:
    """Leaves the model as it is."""


def another_class(model: Gated) -> None:
    model.down = ScaledConv2d(8, 4, 1).double()


def a_weight_computed_anew(model: Gated) -> None:
    nn.utils.parametrizations.weight_norm(model.down)


def another_hook(model: Gated) -> None:
    model.down.register_forward_hook(lambda _, __, output: output.square())


def no_bias(model: Gated) -> None:
    model.down = nn.Conv2d(8, 4, 1, bias=False).double()


def loss_of(model: Gated, penalty: float, images: Tensor) -> Tensor:
    return model(images).square().sum() + penalty * model.down.weight.square().sum()


def last_scores(
    change: Callable[[Gated], None], penalty: float, warm: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Scores of the last of `warm` + 1 updates, and the small layers with a hook behind them."""
    model = Gated().double()
    change(model)
    imp = tk.Importance(model, "taylor_fo_bn", example_inputs=torch.randn(1, 3, 6, 6).double())
    for _ in range(warm + 1):
        imp.reset()
        loss_of(model, penalty, torch.randn(5, 3, 6, 6).double()).backward()
        imp.update()
    hooked = [name for name in ("down", "up") if model.get_submodule(name)._forward_hooks]
    return imp.compute(), hooked


@pytest.mark.parametrize(
    ("change", "penalty", "seen"),
    [
        (nothing, 0.0, []),
        (nothing, 0.1, ["down"]),
        (another_class, 0.0, ["down"]),
        (a_weight_computed_anew, 0.0, ["down"]),
        (another_hook, 0.0, ["down"]),
        (no_bias, 0.0, ["down"]),
    ],
)
def test_what_adds_to_a_gradient_leaves_the_layer_seen_at_its_output(change, penalty, seen):
    seed = int(torch.randint(1 << 30, ()))
    torch.manual_seed(seed)
    scores, hooked = last_scores(change, penalty, WARM)
    assert hooked == seen
    torch.manual_seed(seed)
    model = Gated().double()
    change(model)
    torch.randn(1, 3, 6, 6).double()  # the example inputs
    for _ in range(WARM):
        torch.randn(5, 3, 6, 6).double()
    images = torch.randn(5, 3, 6, 6).double()
    first = tk.Importance(model, "taylor_fo_bn", example_inputs=images[:1])
    loss_of(model, penalty, images).backward()
    first.update()
    for name, score in first.compute().items():
        torch.testing.assert_close(scores[name], score, rtol=1e-5, atol=0)
        assert score.any()


def test_a_tied_weight_is_seen_at_both_outputs():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    x = torch.randn(4, 6)
    late = tk.Importance(model, "taylor_fo_bn", example_inputs=x[:1])
    for _ in range(WARM):
        model(torch.randn(4, 6)).square().sum().backward()
        late.update()
    first = tk.Importance(model, "taylor_fo_bn", example_inputs=x[:1])
    late.reset()
    model(x).square().sum().backward()
    late.update()
    first.update()
    assert first.compute().keys() >= {"0", "2"}
    for name, score in first.compute().items():
        torch.testing.assert_close(late.compute()[name], score)
