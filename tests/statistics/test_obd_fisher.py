"""obd_fisher against a loop over examples that forms every weight gradient, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import taylor_kernels as tk
from tests.helpers import nets
from tests.helpers.fisher_loop import Twice, by_loop, close, half_squares, metered, random_batch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scoring", [True, False], ids=["no weight gradients", "weight gradients"])
def test_is_that_of_a_loop_over_examples(scoring):
    model, batches = nets.mixed(train=False), [nets.batch(4)]
    expected = by_loop(model, batches)
    model.zero_grad()
    if scoring:
        with tk.scoring(model):
            got = metered(model, batches)
        assert all(p.grad is None for p in model.parameters())
    else:
        got = metered(model, batches)
    close(got, expected)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "tokens": (lambda: nn.Linear(7, 5), (4, 7)),
    "more tokens": (lambda: nn.Linear(7, 5), (3, 2, 7)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 8, 7)),
    "dilated": (lambda: nn.Conv2d(3, 5, (3, 2), padding=(2, 1), dilation=(2, 1)), (3, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (6, 6, 6)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), (6, 6, 6)),
    "same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same"), (3, 6, 6)),
    "valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 6, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (3, 6, 6)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 6)),
    "replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (3, 6, 6)),
    "same, circular": (
        lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="circular"),
        (3, 6, 6),
    ),
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "1d, same, reflect": (
        lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="reflect", dilation=2),
        (4, 9),
    ),
    "3d": (lambda: nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=1, groups=2), (4, 4, 5, 3)),
    "3d, replicate": (
        lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"),
        (2, 3, 4, 3),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 5, 4),
    ),
    "transposed, output padding over stride": (
        lambda: nn.ConvTranspose2d(4, 6, 3, dilation=3, padding=2, output_padding=2),
        (4, 5, 4),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 4, stride=3), (3, 5)),
    "transposed 3d": (
        lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, padding=1, groups=2),
        (4, 3, 4, 3),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind):
    make, shape = LAYERS[kind]
    model, batch = nn.Sequential(make()).double(), random_batch(*shape)
    close(metered(model, [batch], half_squares), by_loop(model, [batch], half_squares))


@pytest.mark.parametrize("kind", ["linear", "conv", "1d", "3d", "transposed"])
def test_one_example_without_a_batch(kind):
    make, shape = LAYERS[kind]
    model = nn.Sequential(make()).double()
    x, _ = random_batch(*shape, n=1)
    expected = metered(model, [(x, None)], lambda m, b: m(b[0]).sin().sum())
    close(metered(model, [(x[0], None)], lambda m, b: m(b[0]).sin().sum()), expected)


def test_gradients_of_a_layer_used_twice_add_up_before_they_are_squared():
    model, batch = Twice().double(), random_batch(3, 12, 12)
    close(metered(model, [batch], half_squares), by_loop(model, [batch], half_squares))


def test_of_two_modules_with_one_weight_each_has_its_own_use():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    twin = copy.deepcopy(model)
    twin[2].weight.data = twin[0].weight.data.clone()
    model[2].weight = model[0].weight
    twin[2].bias.data, model[2].bias.data = torch.zeros(2, 4, dtype=torch.float64)
    batch = random_batch(4)
    close(metered(model, [batch], half_squares), by_loop(twin, [batch], half_squares))


def test_passes_before_one_update_are_weighed_by_their_examples():
    model, batches = nets.mixed(train=False), [nets.batch(n) for n in (3, 5, 1)]
    expected = by_loop(model, batches)
    close(metered(model, batches), expected)
    imp = tk.Importance(model, "obd_fisher")
    sum(nets.loss_of(model, batch) for batch in batches).backward()  # three calls, one backward
    imp.update()
    close(imp.compute(), expected)


def test_the_weight_of_a_parametrized_layer_is_the_one_it_used_and_does_not_move():
    layer = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)).double()
    model, batch = nn.Sequential(layer), random_batch(3, 5, 5)
    imp = tk.Importance(model, "obd_fisher")
    twin = copy.deepcopy(model)
    for _ in range(2):
        loss = half_squares(twin, batch)
        imp.reset()
        half_squares(model, batch).backward()
        imp.update()
        theirs = twin[0].parametrizations.weight[0]
        mine = layer.parametrizations.weight[0]
        assert mine._u.equal(theirs._u)
        assert mine.training
        plain = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
        plain[0].weight.data = twin.eval()[0].weight.detach()
        plain[0].bias.data = layer.bias.detach()
        twin.train()
        assert half_squares(plain, batch).isclose(loss)
        close(imp.compute(), by_loop(plain, [batch], half_squares))
