"""TKEF and TKGGN against laplace-torch's own backends where these can run, and loops where not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.allocation import Largest
from tests.integrations.conftest import library

library("laplace")
from laplace import Laplace  # noqa: E402
from laplace import curvature as theirs  # noqa: E402

from taylor_kernels.integrations.laplace import TKEF, TKGGN  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
N, C = 11, 4


def network(outputs: int = C, norm: bool = True) -> nn.Module:
    norms = [nn.BatchNorm2d(4)] if norm else []
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        *norms,
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.Tanh(),
        nn.Linear(6, outputs),
    ).double()
    model(images())  # running statistics
    return model.eval()


def images(n: int = N) -> Tensor:
    return torch.randn(n, 2, 4, 4, dtype=torch.float64)


def targets(likelihood: str, *shape: int) -> Tensor:
    if likelihood == "classification":
        return torch.randint(0, C, shape)
    return torch.randn(*shape, C, dtype=torch.float64)


def same(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= rtol * expected.abs().max()


def loss_of(likelihood: str, f: Tensor, y: Tensor) -> Tensor:
    if likelihood == "regression":
        return F.mse_loss(f, y, reduction="sum")
    return F.cross_entropy(f.reshape(-1, f.size(-1)), y.reshape(-1), reduction="sum")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def by_loop(model: nn.Module, likelihood: str, ones: Iterator[tuple[object, Tensor]]) -> Tensor:
    """factor · Σ_n g_n², every example alone."""
    total = torch.zeros(())
    for x, y in ones:
        grads = torch.autograd.grad(
            loss_of(likelihood, model(x), y), trained(model), materialize_grads=True
        )
        total = total + torch.cat([g.flatten() for g in grads]).square()
    return total * (0.5 if likelihood == "regression" else 1)


def by_jacobians(model: nn.Module, likelihood: str, xs: Iterator[object]) -> Tensor:
    """Σ_n diag(J_nᵀ H_n J_n) by whole Jacobians and Hessians."""
    total = torch.zeros(())
    for x in xs:
        f = model(x)[0]
        J = torch.stack(
            [
                torch.cat(
                    [
                        g.flatten()
                        for g in torch.autograd.grad(
                            out, trained(model), retain_graph=True, materialize_grads=True
                        )
                    ]
                )
                for out in f.flatten()
            ]
        ).unflatten(0, (-1, f.size(-1)))
        if likelihood == "regression":
            total = total + J.square().sum((0, 1))
        else:
            p = f.detach().reshape(-1, f.size(-1)).softmax(1)
            H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            total = total + torch.einsum("tcp,tcd,tdp->p", J, H, J)
    return total


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


def reference(ours: type, model: nn.Module, likelihood: str, x: Tensor, y: Tensor) -> Tensor:
    if ours is TKEF:
        return by_loop(model, likelihood, zip(x.split(1), y.split(1), strict=True))
    return by_jacobians(model, likelihood, iter(x.split(1)))


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


class Tokens(nn.Module):
    """[N, T] tokens to [N, T, C], whose positions see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        return self.out(self.norm(h + h.mean(1, keepdim=True)))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("ours", [TKEF, TKGGN])
def test_its_fault_is_mended_outputs_of_several_tokens(ours, likelihood):
    model, x, y = Tokens().double(), torch.randint(0, 9, (5, 3)), targets(likelihood, 5, 3)
    expected = reference(ours, model, likelihood, x, y)
    loss, found = ours(model, likelihood).diag(x, y, N=5)
    same(found, expected)
    same(loss, {"regression": 0.5}.get(likelihood, 1) * loss_of(likelihood, model(x), y).detach())
    if (ours, likelihood) != (TKEF, "regression"):
        own = {TKEF: theirs.CurvlinopsEF, TKGGN: theirs.CurvlinopsGGN}[ours]
        with pytest.raises(RuntimeError):
            own(model, likelihood).diag(x, y)


def test_tokens_of_an_example_add_up_where_asdl_takes_them_apart():
    model, x, y = Tokens().double(), torch.randint(0, 9, (5, 3)), torch.randint(0, C, (5, 3))
    ones = zip(x.split(1), y.split(1), strict=True)
    expected = by_loop(model, "classification", ones)
    _, own = theirs.AsdlEF(copy.deepcopy(model), "classification").diag(x, y)
    assert (own - expected).norm() > 0.05 * expected.norm()
    same(TKEF(model, "classification").diag(x, y)[1], expected)


@pytest.mark.parametrize("ours", [TKEF, TKGGN])
def test_its_fault_is_mended_inputs_of_transformers_models(ours):
    """A BatchEncoding, and a dict, whose model is called as it stands."""
    library("transformers")
    from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=17,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
    )

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertForSequenceClassification(config)

        def forward(self, data) -> Tensor:
            return self.bert(
                input_ids=data["input_ids"], attention_mask=data["attention_mask"]
            ).logits

    model = Classifier().double().eval()
    mask = torch.ones(6, 5, dtype=torch.int64)
    mask[::2, 3:] = 0
    batch = {
        "input_ids": torch.randint(0, 17, (6, 5)),
        "attention_mask": mask,
        "labels": torch.randint(0, 3, (6,)),
    }
    rows = [{k: v[n : n + 1] for k, v in batch.items()} for n in range(6)]
    if ours is TKEF:
        expected = by_loop(model, "classification", ((row, row["labels"]) for row in rows))
    else:
        expected = by_jacobians(model, "classification", iter(rows))
    for kind in (dict, BatchEncoding):
        loader = DataLoader(
            [{k: v[n] for k, v in batch.items()} for n in range(6)],
            batch_size=4,
            collate_fn=lambda rows, kind=kind: kind(
                {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
            ),
        )
        la = Laplace(model, "classification", "all", "diag", backend=ours)
        la.fit(loader)
        same(la.H, expected, 1e-8)
    if ours is TKEF:
        own = Laplace(model, "classification", "all", "diag", backend=theirs.CurvlinopsEF)
        with pytest.raises(ValueError, match="not supported"):
            own.fit(loader)


def test_a_mapping_whose_first_tensor_does_not_count_examples():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, C)

        def forward(self, data) -> Tensor:
            return self.out(data["input_ids"] + data["shift"])

    x = {"shift": torch.randn(1, 3), "input_ids": torch.randn(5, 3)}
    with pytest.raises(ValueError, match=r"first tensor has 1 along dim 0, x\['input_ids'\] 5"):
        TKEF(Net(), "classification").diag(x, torch.randint(0, C, (5,)))


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


@pytest.mark.parametrize("classes", [2, 5])
def test_images_with_a_class_for_each_pixel(classes):
    model = nn.Conv2d(2, classes, 3, padding=1).double()
    x, y = images(3), torch.randint(0, classes, (3, 4, 4))
    loss: Callable[[Tensor, Tensor], Tensor] = lambda f, y: F.cross_entropy(f, y, reduction="sum")  # noqa: E731
    total = torch.zeros(())
    for one, label in zip(x.split(1), y.split(1), strict=True):
        grads = torch.autograd.grad(loss(model(one), label), [*model.parameters()])
        total = total + torch.cat([g.flatten() for g in grads]).square()
    same(TKEF(model, "classification").diag(x, y)[1], total)
