"""Scores of padded sequences: masks, checkpointed activations, compiled steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk
from tests.importance.test_loaders import CLASSES, CRITERIA, PER_EXAMPLE, WIDTH, close

pytestmark = pytest.mark.usefixtures("one_thread")


class Tagger(nn.Module):
    """Layers that are given [N, T, C], and behind them one that is given all tokens in dim 0."""

    def __init__(self, saves: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(WIDTH, 7), nn.Linear(7, 8)
        self.head = nn.Linear(8, CLASSES)
        self.saves = saves
        self.double()

    def body(self, x: Tensor) -> Tensor:
        return self.second(x.tanh()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.saves is None:
            x = self.body(x)
        else:
            x = checkpoint(self.body, x, use_reentrant=self.saves)
        return self.head(x.flatten(0, 1))


def sequences(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, WIDTH).double(), torch.randint(CLASSES, (n,))) for n in lengths]


def padded(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """What a collate function makes: x [N, T, W], y [N, T], attention mask [N, T]."""
    x = pad_sequence([x for x, _ in parts], batch_first=True, padding_value=9.0)
    y = pad_sequence([y for _, y in parts], batch_first=True, padding_value=-100)
    return x, y, (y != -100).long()


def tagged_by_hand(model: Tagger, criterion: str, batches: list) -> dict[str, Tensor]:
    """Scores of `second`, whose examples are sequences, and `head`, whose examples are tokens.

    No padding takes part. The loss is the mean over the tokens of a batch.
    """
    found: dict[str, list[Tensor]] = {"second": [], "head": []}
    for parts in batches:
        count = sum(len(y) for _, y in parts)
        layers = {"second": (model.second, len(parts)), "head": (model.head, count)}
        squares = {name: torch.zeros(layer.out_features) for name, (layer, _) in layers.items()}
        for x, y in parts:
            losses = F.cross_entropy(model(x[None]), y, reduction="none") / count
            for name, examples in (("second", [losses.sum()]), ("head", list(losses))):
                layer, n = layers[name]
                for loss in examples:
                    (g,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
                    gw = g * layer.weight.detach()
                    if criterion == "taylor_fo_gate":
                        found[name].append(gw.sum(1).square())
                    else:
                        squares[name] = squares[name] + n * gw.square().sum(1) / 2
        if criterion == "obd_fisher":
            for name, square in squares.items():
                found[name].append(square)
    return {name: torch.stack(of).mean(0) for name, of in found.items()}


@pytest.mark.parametrize("criterion", PER_EXAMPLE)
def test_padding_does_not_count_where_a_mask_says_so(criterion):
    batches = [sequences([3, 1, 5]), sequences([2, 2]), sequences([4])]
    model = Tagger()
    expected = tagged_by_hand(model, criterion, batches)
    found = {}
    for masked in (True, False):
        imp = tk.Importance(model, criterion, layers=["second", "head"])
        for parts in batches:
            x, y, mask = padded(parts)
            F.cross_entropy(model(x), y.flatten(), ignore_index=-100).backward()
            imp.update(mask=mask if masked else None)
        found[masked] = imp.compute()
        imp.close()
    close(found[True], expected)
    assert not torch.allclose(found[False]["head"].double(), expected["head"], rtol=0.05)
    close({"second": found[False]["second"]}, {"second": expected["second"]})


@pytest.mark.parametrize("criterion", PER_EXAMPLE)
def test_masks_of_an_accumulation_come_in_a_list(criterion):
    """Whole sequences of padding too, as where a sampler fills the last batch of a rank."""
    model = Tagger()
    batches = [sequences([3, 1]), sequences([2, 5, 2])]
    found = []
    for fill in (0, 2):
        imp = tk.Importance(model, criterion)
        for x, y, mask in map(padded, batches):
            rows = torch.zeros(fill, x.size(1))
            x = torch.cat([x, rows[..., None].expand(-1, -1, WIDTH) + 3.0])
            y = torch.cat([y, rows.long() - 100])
            F.cross_entropy(model(x), y.flatten(), ignore_index=-100).backward()
            imp.update(mask=torch.cat([mask, rows.long()]))
        found.append(imp.compute())
        imp.close()
    close(found[1], found[0])
    # All at once: passes that went through one backward() or two.
    both = []
    for together in (False, True):
        imp = tk.Importance(model, criterion)
        losses = [
            F.cross_entropy(model(x), y.flatten(), ignore_index=-100)
            for x, y, _ in map(padded, batches)
        ]
        if together:
            sum(losses).backward()
        else:
            for loss in losses:
                loss.backward()
        imp.update(mask=[mask for *_, mask in map(padded, batches)])
        both.append(imp.compute())
        imp.close()
    close(*both)


def test_a_pruner_takes_the_mask_too():
    model = Tagger()
    pruner = tk.Pruner(
        model, torch.randn(2, 3, WIDTH).double(), "taylor_fo_gate", filters=0.5, every=1, per_step=1
    )
    imp = tk.Importance(model, "taylor_fo_gate", layers=["second"])
    x, y, mask = padded(sequences([3, 1, 5]))
    F.cross_entropy(model(x), y.flatten(), ignore_index=-100).backward()
    imp.update(mask=mask)
    pruner.step(mask=mask)
    got, expected = pruner.scores()["second"], imp.compute()["second"]
    left = got.isfinite()
    assert left.sum() >= 7
    torch.testing.assert_close(got[left], expected[left])


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(3, 4, dtype=torch.bool), r"mask: has shape \(3, 4\).* 9 examples"),
        (torch.zeros(3, 3, dtype=torch.long), "no example counts; call skip"),
        (torch.ones(3, 3), "expected bool or integers"),
        ([torch.ones(3, 3).bool()] * 2, "2 given, and the model ran 1 times"),
    ],
)
def test_a_mask_that_does_not_fit_is_one_clear_error(mask, said):
    model = Tagger()
    imp = tk.Importance(model, "taylor_fo_gate")
    x, y, right = padded(sequences([3, 1, 2]))
    F.cross_entropy(model(x), y.flatten(), ignore_index=-100).backward()
    with pytest.raises(ValueError, match=said):
        imp.update(mask=mask)
    imp.reset()
    F.cross_entropy(model(x), y.flatten(), ignore_index=-100).backward()
    imp.update(mask=right)  # and nothing is left of the wrong one
    assert all(score.isfinite().all() for score in imp.compute().values())


def padded_steps(model: Tagger, criterion: str, call: Any) -> dict[str, Tensor]:
    """Scores over a few steps of training on padded batches; `call` gives the loss of one."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    imp = tk.Importance(model, criterion)
    for lengths in ([3, 1, 5], [3, 1, 5], [5, 5, 2]):
        x, y, mask = padded(sequences(lengths))
        optimizer.zero_grad()
        call(x, y.flatten()).backward()
        imp.update(mask=mask)
        optimizer.step()
    found = imp.compute()
    imp.close()
    return found


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(criterion, use_reentrant):
    found = []
    for saves in (None, use_reentrant):
        model = Tagger(saves)
        found.append(padded_steps(model, criterion, lambda x, y, m=model: F.cross_entropy(m(x), y)))
    close(found[1], found[0])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_compiled_training_step(criterion):
    """The model and its loss in one function, which is compiled with the meter on the model."""
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = Tagger()

        def loss(x: Tensor, y: Tensor, model: Tagger = model) -> Tensor:
            return F.cross_entropy(model(x), y)

        call = torch.compile(loss, backend="aot_eager") if compiled else loss
        found.append(padded_steps(model, criterion, call))
    close(found[1], found[0])
