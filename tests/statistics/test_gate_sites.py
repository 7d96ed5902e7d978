"""Where gates stand: their slopes against autograd of gates that are written out in the model."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.gate_sites import find_gate_sites
from taylor_kernels.statistics import find_layers
from taylor_kernels.statistics.hooks.gate_tables import GateTables
from taylor_kernels.statistics.hooks.sites import GateSites, Site
from tests.helpers.late_norms import NETWORKS, conv, gated, head, lived, readers_of


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.randint(0, 4, (n,))


def slopes(model: nn.Module, data: tuple[Tensor, Tensor], places: dict, count: int) -> Tensor:
    """∂L/∂gates of `count` gates that multiply what stands at these places."""
    gates = torch.ones(count, dtype=torch.float64, requires_grad=True)
    with gated(model, places, gates):
        (slope,) = torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), gates)
    return slope


def scores(
    model: nn.Module, data: tuple[Tensor, Tensor], criterion: str, **options
) -> dict[str, Tensor]:
    imp = tk.Importance(model, criterion, example_inputs=data[0][:2], **options)

    def loss() -> Tensor:
        return F.cross_entropy(model(data[0]), data[1])

    if imp.needs_closure:
        imp.update(closure=loss)
    else:
        model.zero_grad()
        loss().backward()
        imp.update()
    found = imp.compute()
    imp.close()
    return found


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_slopes_are_those_of_gates_at_the_sites(network, train):
    model = lived(NETWORKS[network]()).train(train)
    data = batch()
    channels = tk.trace(model, data[0][:1])
    found = scores(model, data, "taylor_fo_bn")
    for layer, sites in model.sites.items():
        classes = channels.layers[layer][1]
        places = {}
        for name, side, dim in sites:
            vectors = [s.classes for s in find_gate_sites(
                channels, model, find_layers(model, [layer], trainable_only=False)
            ).sites if (s.module, s.side) == (name, side)]  # fmt: skip
            assert len(vectors) == 1, (layer, name, side)
            index = torch.full_like(vectors[0], -1)
            for number, one in enumerate(classes.tolist()):
                index[vectors[0] == one] = number
            places[name, side, dim] = index
        expected = slopes(model, data, places, len(classes)).square().float()
        assert (expected > 0).any()
        torch.testing.assert_close(found[layer], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_no_other_sites_are_found_than_those_listed(network):
    model = lived(NETWORKS[network]())
    channels = tk.trace(model, batch(1)[0])
    for layer, expected in model.sites.items():
        layers = find_layers(model, [layer], trainable_only=False)
        sites = find_gate_sites(channels, model, layers)
        assert not sites.hidden
        assert {(s.module, s.side, s.dim) for s in sites.sites} == set(expected)


class Drawn(nn.Module):
    """Random blocks between ReLUs, so that a gate behind a norm is one in front of all readers."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.blocks = nn.ModuleList()
        self.kinds: list[str] = []
        width = 4
        for _ in range(draw.randint(2, 4)):
            kind = draw.choice(["plain", "late", "pool", "residual", "dense", "twice", "depth"])
            out = draw.choice([3, 4, 5])
            if kind == "dense":
                block = [nn.BatchNorm2d(width), conv(width, out)]
                width += out
            elif kind == "residual":
                block = [
                    nn.BatchNorm2d(width), conv(width, out), nn.BatchNorm2d(out), conv(out, width),
                ]  # fmt: skip
            elif kind == "depth":
                block = [
                    conv(width, out), nn.BatchNorm2d(out),
                    conv(out, out, groups=out), nn.BatchNorm2d(out),
                ]  # fmt: skip
                width = out
            else:
                block = [conv(width, out), nn.BatchNorm2d(out), nn.BatchNorm2d(out)]
                width = out
            self.kinds.append(kind)
            self.blocks.append(nn.ModuleList(block))
        self.last, self.raw, self.head = nn.BatchNorm2d(width), conv(width, 3, 1), head(width + 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, b in zip(self.kinds, self.blocks, strict=True):
            if kind == "dense":
                x = torch.cat((x, b[1](F.relu(b[0](x)))), 1)
            elif kind == "residual":
                x = x + b[3](F.relu(b[2](b[1](F.relu(b[0](x))))))
            elif kind == "depth":
                x = F.relu(b[3](b[2](F.relu(b[1](b[0](F.relu(x)))))))
            elif kind == "plain":
                x = F.relu(b[1](b[0](F.relu(x))))
            elif kind == "late":
                x = b[1](F.relu(b[0](F.relu(x))))
            elif kind == "pool":
                x = b[1](F.max_pool2d(b[0](F.relu(x)), 3, 1, 1))
            else:
                x = F.relu(b[2](F.relu(b[1](b[0](F.relu(x))))))
        return self.head(torch.cat((F.relu(self.last(x)), self.raw(F.relu(x))), 1))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("number", range(12))
def test_every_path_to_a_reader_passes_one_site(number, train):
    """Behind all norms there are ReLUs alone, so gates there are gates at the readers' inputs."""
    seed = random.randrange(1 << 30)
    model = lived(Drawn(random.Random(seed))).train(train)
    data = batch(4)
    channels = tk.trace(model, data[0][:1])
    found = scores(model, data, "taylor_fo_bn")
    for layer in found:
        classes = channels.layers[layer][1]
        places = readers_of(channels, model, classes)
        if not places:
            continue  # the model's outputs
        expected = slopes(model, data, places, len(classes)).square().float()
        torch.testing.assert_close(
            found[layer], expected, rtol=1e-4, atol=1e-12, msg=f"seed {seed}, layer {layer}"
        )


@pytest.mark.parametrize("network", ["pre-activation", "dense", "functional"])
def test_other_statistics_stand_on_the_same_sites(network):
    model = lived(NETWORKS[network]()).eval()
    data = batch()
    n = len(data[0])
    channels = tk.trace(model, data[0][:1])
    layers = find_layers(model, list(model.sites), trainable_only=False)
    sites = find_gate_sites(channels, model, layers)
    found = {
        criterion: scores(model, data, criterion, layers=list(layers))
        for criterion in (
            "taylor_fo_gate",
            "taylor_so_bn",
            "taylor_so_diag_exact",
            "obd_bn_exact",
            "oracle",
        )
    }
    own = {s.key for s in sites.sites if isinstance(model.get_submodule(s.module), nn.Conv2d)}
    gates = torch.ones(int(max(s.classes.max() for s in sites.sites)) + 1, dtype=torch.float64)
    places = {(s.module, s.side, s.dim): s.classes for s in sites.sites}
    active = {one for classes in sites.layers.values() for one in classes.tolist()}

    def loss(z: Tensor) -> Tensor:
        with gated(model, places, z):
            return F.cross_entropy(model(data[0]), data[1])

    z = gates.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(z), z, create_graph=True)
    on = torch.zeros_like(gates)
    on[list(active)] = 1.0
    (product,) = torch.autograd.grad((slope * on).sum(), z)
    base = loss(gates)
    for layer, classes in sites.layers.items():
        got = found["taylor_so_bn"][layer]
        expected = (slope - product / 2).square()[classes].float()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-12)
        without = []
        for one in classes.tolist():
            removed = gates.clone()
            removed[one] = 0.0
            without.append((loss(removed) - base).square())
        torch.testing.assert_close(
            found["oracle"][layer], torch.stack(without).float(), rtol=1e-3, atol=1e-9
        )
        bent = found["obd_bn_exact"][layer]
        torch.testing.assert_close(
            found["taylor_so_diag_exact"][layer], (slope[classes].float() - bent).square(),
            rtol=1e-3, atol=1e-9,
        )  # fmt: skip
        if not own:  # where a layer has its own output for a site its bias is no part of it
            each = []
            for x, y in zip(data[0].split(1), data[1].split(1), strict=True):
                z = gates.clone().requires_grad_()
                with gated(model, places, z):
                    part = F.cross_entropy(model(x), y) / n
                each.append(torch.autograd.grad(part, z)[0][classes].square())
            mean = torch.stack(each).mean(0).float()
            torch.testing.assert_close(found["taylor_fo_gate"][layer], mean, rtol=1e-4, atol=1e-12)


def test_scales_are_those_of_the_norms_at_the_sites():
    model = lived(NETWORKS["pre-activation"]())
    found = scores(model, batch(), "bn_scale")
    expected = torch.stack([n.weight.abs() for n in (model.n1, model.n3, model.last)]).mean(0)
    torch.testing.assert_close(found["stem"], expected.float())
    torch.testing.assert_close(found["c1"], model.n2.weight.abs().float())
    assert found["raw"].isnan().all()


def test_a_filter_that_no_hook_can_reach_is_named():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.weight = nn.Linear(3, 6), nn.Parameter(torch.randn(2, 6))
            self.used = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            hidden = (x @ self.used.weight.T).relu()
            weight = 2 * self.weight.T  # a product by what is computed
            return self.a(x).relu() * 2 @ weight + hidden @ weight

    model = Net()
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match=r"^used: .* no gate can stand"):
        imp = tk.Importance(model, "taylor_fo_bn", example_inputs=x)
    model(x).square().sum().backward()
    imp.update()
    found = imp.compute()
    assert found["used"].isnan().all()
    assert (found["a"] > 0).any()


def test_a_layer_whose_weight_is_taken_apart_elsewhere_is_named():
    """A score of attention: its one filter is no dimension of the matrix that code makes of it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 2)
            self.score = nn.Linear(8, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.enter(x).tanh()
            weights = (hidden @ self.score.weight.squeeze(0)[:, None]).softmax(1)
            return self.leave((weights * hidden).sum(1))

    model, x = Net(), torch.randn(4, 5, 3)
    with pytest.warns(UserWarning, match=r"^score: .* no gate can stand"):
        imp = tk.Importance(model, example_inputs=x)
    model(x).square().sum().backward()
    imp.update()
    found = imp.compute()
    assert found["score"].isnan().all()
    assert (found["enter"] > 0).any()


def test_gates_of_one_channel_at_sites_with_other_numbers_of_examples_do_not_add_up():
    tables = {"a": torch.rand(4, 2), "b": torch.rand(4, 6)}
    sites = GateSites(
        tuple(Site(name, "out", -1, torch.arange(4)) for name in tables),
        {"layer": torch.arange(4)},
    )
    together = GateTables({"layer": nn.Linear(3, 4)}, sites)
    with pytest.raises(RuntimeError, match=r"a: was given 2 examples .* b was given\s+6"):
        together.finish(tables, training=True)
    (found,) = together.finish({"a": tables["a"], "b": tables["a"]}, training=True)
    torch.testing.assert_close(found, 2 * tables["a"])
