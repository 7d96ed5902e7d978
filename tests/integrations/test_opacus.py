"""Opacus's fast gradient clipping with the norms of convolutions, against Opacus and autograd."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.conftest import library

LAYERS = {
    "conv1d": (nn.Conv1d(4, 8, 3, 2, 2, 2, groups=2), (4, 19)),
    "conv2d": (nn.Conv2d(4, 8, 3, 2, 2, 2, groups=2), (4, 9, 9)),
    "conv2d_wide": (nn.Conv2d(24, 32, 3, padding=1), (24, 3, 4)),
    "conv3d": (nn.Conv3d(4, 8, 3, 2, 2, (1, 2, 1), groups=2), (4, 7, 9, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, bias=False), (6, 8, 8)),
    "same": (nn.Conv2d(3, 4, (2, 4), padding="same"), (3, 6, 6)),
    "same_3d": (nn.Conv3d(2, 4, (2, 4, 2), padding="same"), (2, 4, 5, 6)),
    "valid": (nn.Conv1d(3, 4, 2, padding="valid"), (3, 6)),
    "linear": (nn.Linear(7, 5), (7,)),
    "tokens": (nn.Linear(7, 5), (6, 7)),
}
#: What Opacus's own norms are wrong about, or have no answer to.
MENDED = {
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 6, 6)),
    "reflect": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6)),
    "replicate": (nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate"), (2, 4, 5, 6)),
    "pairs_of_tokens": (nn.Linear(7, 5), (2, 3, 7)),
}


@pytest.fixture(scope="module")
def door():
    library("opacus")
    return importlib.import_module("taylor_kernels.integrations.opacus")


@pytest.fixture(autouse=True)
def as_opacus_ships(door, monkeypatch):
    """Whatever this process has registered before, as the examples of the documentation do."""
    from opacus.grad_sample import embedding_norm_sample, linear

    shipped = {
        nn.Linear: linear.compute_linear_norm_sample,
        nn.Embedding: embedding_norm_sample.compute_embedding_norm_sample,
    }
    monkeypatch.setattr(door.GradSampleHooksFastGradientClipping, "NORM_SAMPLERS", shipped)


@pytest.fixture
def registered(door):
    with door.register_norm_samplers():
        yield


def by_loop(model: nn.Module, x: Tensor) -> Tensor:
    """Norms [N, parameters] of the gradients of Σ output², example by example."""
    rows = []
    for one in x.split(1):
        model.zero_grad()
        model(one).square().sum().backward()
        rows.append(torch.stack([p.grad.norm() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows)


def by_ghost(model: nn.Module, x: Tensor) -> Tensor:
    """The same by Opacus's fast gradient clipping."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(copy.deepcopy(model), loss_reduction="sum")
    wrapped(x).square().sum().backward()
    return torch.stack([p._norm_sample for p in wrapped.parameters()], 1)


def fresh(layer: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    layer.reset_parameters()
    return layer.double(), torch.randn(5, *shape).double()


@pytest.mark.parametrize("name", LAYERS)
def test_norms_are_opacus_own_and_those_of_a_batch_1_loop(name, door):
    from opacus.grad_sample import GradSampleModule

    layer, x = fresh(*LAYERS[name])
    own = GradSampleModule(copy.deepcopy(layer), loss_reduction="sum")
    own(x).square().sum().backward()
    expected = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in own.parameters()], 1)
    with door.register_norm_samplers():
        got = by_ghost(layer, x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got, by_loop(layer, x))


@pytest.mark.parametrize("name", MENDED)
def test_what_opacus_gets_wrong_is_right(name, door):
    layer, x = fresh(*MENDED[name])
    expected = by_loop(layer, x)
    if isinstance(layer, nn.Linear):
        with pytest.raises(AttributeError, match="_norm_sample"):  # Opacus has none
            by_ghost(layer, x)
    else:
        assert not torch.allclose(by_ghost(layer, x), expected, rtol=1e-2)
    with door.register_norm_samplers():
        torch.testing.assert_close(by_ghost(layer, x), expected)


def test_no_gradients_of_examples_are_made(registered, monkeypatch):
    from opacus.grad_sample import grad_sample_module_fast_gradient_clipping as opacus

    def refuse(**_: object) -> None:
        raise AssertionError("a gradient for each example")

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    monkeypatch.setattr(opacus, "create_or_accumulate_grad_sample", refuse)
    assert by_ghost(model, torch.randn(5, 3, 6, 6)).shape == (5, 4)


def test_frozen_parameters_have_no_norm(registered):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    conv = nn.Conv2d(3, 4, 3)
    conv.weight.requires_grad_(False)
    wrapped = GradSampleModuleFastGradientClipping(conv)
    wrapped(torch.randn(2, 3, 5, 5)).sum().backward()
    assert not hasattr(conv.weight, "_norm_sample")
    assert conv.bias._norm_sample.shape == (2,)


def test_it_is_undone_and_what_came_later_stays(door):
    from opacus.grad_sample.utils import register_norm_sampler

    registry = door.GradSampleHooksFastGradientClipping.NORM_SAMPLERS
    before = dict(registry)
    first = door.register_norm_samplers()
    second = door.register_norm_samplers(backend="reference")
    assert registry[nn.Conv2d] not in before.values()
    second.remove()
    second.remove()
    first.remove()
    assert registry == before
    third = door.register_norm_samplers()
    later = register_norm_sampler(nn.Conv2d)(lambda *_: {})
    third.remove()
    assert registry.pop(nn.Conv2d) is later
    assert registry == before


def test_private_training_is_what_it_is_with_gradients_of_examples(registered):
    """Without noise, whole steps of ghost clipping and of Opacus's hooks give the same weights."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.randn(24, 3, 8, 8), torch.randint(0, 3, (24,)))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2),
        nn.Flatten(), nn.Linear(72, 3),
    )  # fmt: skip
    weights = []
    for mode in ("hooks", "ghost"):
        net = copy.deepcopy(model)
        engine = PrivacyEngine()
        extra = {"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}
        made = engine.make_private(
            module=net, optimizer=torch.optim.SGD(net.parameters(), 0.5), poisson_sampling=False,
            data_loader=DataLoader(data, 8), noise_multiplier=0.0, max_grad_norm=0.05,
            grad_sample_mode=mode, **extra,
        )  # fmt: skip
        private, optimizer, *more, loader = made
        loss_of = more[0] if more else nn.CrossEntropyLoss()
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(private(x), y).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert not torch.allclose(weights[0], nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
