"""TKEF and TKGGN of models of tokens, of mappings, and with several outputs for an example."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.integrations.conftest import library

library("laplace")
from laplace import Laplace  # noqa: E402
from laplace import curvature as theirs  # noqa: E402

from taylor_kernels.integrations.laplace import TKEF, TKGGN  # noqa: E402
from tests.integrations.laplace_references import (  # noqa: E402
    C,
    by_jacobians,
    by_loop,
    images,
    loss_of,
    reference,
    same,
    targets,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
