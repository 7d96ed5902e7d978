"""TKEF and TKGGN against laplace-torch's own backends where these can run, and loops where not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.allocation import Largest
from tests.integrations.conftest import library

library("laplace")
from laplace import Laplace  # noqa: E402
from laplace import curvature as theirs  # noqa: E402

from taylor_kernels.integrations.laplace import TKEF, TKGGN  # noqa: E402
from tests.integrations.laplace_references import (  # noqa: E402
    C,
    N,
    by_loop,
    images,
    loss_of,
    network,
    reference,
    same,
    targets,
)

pytestmark = pytest.mark.usefixtures("one_thread")


OWN = {
    TKEF: ("CurvlinopsEF", "BackPackEF", "AsdlEF"),
    TKGGN: ("CurvlinopsGGN", "BackPackGGN", "AsdlGGN"),
}
#: But for what finds 0 everywhere, of which there is a test.
FITS = [
    (ours, name, subset)
    for ours, names in OWN.items()
    for name in names
    for subset in ("all", "last_layer")
    if (name, subset) != ("CurvlinopsEF", "last_layer")
]


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize(("ours", "name", "subset"), FITS, ids=lambda x: getattr(x, "__name__", x))
def test_fitted_as_with_its_own_backends(ours, name, subset, likelihood):
    model, x = network(norm="Asdl" not in name), images()
    loader = DataLoader(TensorDataset(x, targets(likelihood, N)), batch_size=4)
    fitted = []
    for backend in (ours, getattr(theirs, name)):
        la = Laplace(copy.deepcopy(model), likelihood, subset, "diag", backend=backend)
        la.fit(loader)
        fitted.append(la)
    found, expected = fitted
    same(found.H, expected.H)
    same(found.loss, expected.loss)
    same(found.log_marginal_likelihood(), expected.log_marginal_likelihood())
    for mine, its in zip(tree_leaves(found(x[:3])), tree_leaves(expected(x[:3])), strict=True):
        same(mine.detach(), its.detach())


def test_its_fault_is_mended_a_last_layer_without_curvature():
    model, loader = network(), DataLoader(TensorDataset(images(), torch.randint(0, C, (N,))), 4)
    found = {}
    for backend in (theirs.CurvlinopsEF, TKEF):
        la = Laplace(model, "classification", "last_layer", "diag", backend=backend)
        la.fit(loader)
        found[backend] = la.H
    assert not found[theirs.CurvlinopsEF].any()
    ones = zip(loader.dataset.tensors[0].split(1), loader.dataset.tensors[1].split(1), strict=True)
    same(found[TKEF], by_loop(model, "classification", ones)[-7 * C :])


def test_a_batch_of_certain_outputs_adds_zeros():
    model, x, y = network(), images(), targets("classification", N)
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.linspace(5e3, -5e3, C))
    la = Laplace(model, "classification", "all", "diag", backend=TKGGN)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    assert not la.H.any()


@pytest.mark.parametrize("ours", [TKEF, TKGGN])
def test_frozen_parameters_are_left_out(ours):
    model, x, y = network(), images(), targets("classification", N)
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="not supported"):
        Laplace(model, "classification", "all", "diag", backend=theirs.BackPackGGN)
    la = Laplace(model, "classification", "all", "diag", backend=ours)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    same(la.H, reference(ours, model, "classification", x, y))
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("ours", [TKEF, TKGGN])
def test_a_subnetwork(ours):
    model, x, y = network(), images(), targets("classification", N)
    whole = reference(ours, model, "classification", x, y)
    for indices in (torch.randint(len(whole), (9,)), torch.tensor([3]), torch.tensor([]).long()):
        backend = ours(model, "classification", subnetwork_indices=indices)
        loss, found = backend.diag(x, y, N=N)
        assert found.shape == indices.shape
        torch.testing.assert_close(found, whole[indices])
        same(loss, loss_of("classification", model(x), y).detach())
    indices = torch.randint(len(whole), (9,)).unique()
    la = Laplace(
        model,
        "classification",
        "subnetwork",
        "diag",
        subnetwork_indices=indices,
        backend=ours,
    )
    la.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    same(la.H, whole[indices])
    backend = ours(model, "classification", subnetwork_indices=torch.tensor([len(whole)]))
    with pytest.raises(IndexError, match="subnetwork_indices"):
        backend.diag(x, y)


@pytest.mark.parametrize("ours", [TKEF, TKGGN])
def test_no_tensor_has_more_elements_than_there_are_parameters(ours):
    model, x, y = network(), images(), targets("classification", N)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters > N * 2 * 16  # as many as the input has
    with Largest() as seen:
        ours(model, "classification").diag(x, y)
    assert seen.elements <= max(parameters, N * 4 * 16)


def test_the_estimate_has_the_exact_diagonal_for_a_mean_and_follows_the_seed():
    model, x, y = network(), images(), targets("classification", N)
    exact = TKGGN(model, "classification").diag(x, y)[1]
    sampling = TKGGN(model, "classification", stochastic=True, num_samples=2)
    torch.manual_seed(3)
    draws = [sampling.diag(x, y)[1] for _ in range(60)]
    torch.manual_seed(3)
    assert sampling.diag(x, y)[1].equal(draws[0])
    assert not draws[0].equal(draws[1])
    spread = torch.stack(draws).std(0).norm() / 60**0.5
    assert (torch.stack(draws).mean(0) - exact).norm() <= 6 * spread
    assert spread > 0


@pytest.mark.parametrize("ours", [TKEF, TKGGN])
def test_the_model_is_left_as_it_was(ours):
    model, x, y = network(), images(), targets("regression", N)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    flags = [p.requires_grad for p in model.parameters()]
    ours(model, "regression", last_layer=False, subnetwork_indices=torch.tensor([2])).diag(x, y)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model[4].weight.grad.eq(1).all()
    assert all(p.grad is None for p in model.parameters() if p is not model[4].weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("ours", [TKEF, TKGGN])
def test_what_is_not_offered_says_so(ours):
    model, x, y = network(), images(), targets("classification", N)
    loader = DataLoader(TensorDataset(x, y), batch_size=N)
    la = Laplace(model, "classification", "all", "kron", backend=ours)
    with pytest.raises(NotImplementedError, match=f"{ours.__name__} has 'diag' and 'full'"):
        la.fit(loader)
    la = Laplace(
        model, "classification", "all", "diag", backend=ours, asdl_fisher_kwargs={"seed": 1}
    )
    with pytest.raises(TypeError, match="seed: unknown here"):
        la.fit(loader)


def test_its_names_pass_the_checks_that_laplace_makes_on_names():
    for ours in (TKEF, TKGGN):
        assert not any(word in ours.__name__.lower() for word in ("backpack", "asdl", "asdfghjkl"))
    assert issubclass(TKEF, theirs.EFInterface)
    assert issubclass(TKGGN, theirs.GGNInterface)
