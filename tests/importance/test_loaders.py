"""Scores under the loaders of real life, against formulas and plain loops in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import taylor_kernels as tk

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, BATCH, WIDTH, CLASSES = 22, 8, 6, 3
PER_EXAMPLE = ("taylor_fo_gate", "obd_fisher")
CRITERIA = ("taylor_fo", "taylor_fo_bn", *PER_EXAMPLE)


def value(index: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(index)
    x = torch.randn(WIDTH, generator=drawn, dtype=torch.float64)
    return {"x": x, "y": torch.tensor(index % CLASSES)}


class Examples(Dataset):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return value(index)


class Stream(IterableDataset):
    """Each worker has every n-th batch of examples, so that batches come as from `Examples`."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(COUNT):
            if index // BATCH % workers == number:
                yield value(index)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU())
    return model.append(nn.Linear(5, CLASSES)).double()


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def scores(model: nn.Module, criterion: str, batches: Any, call: Any = None) -> dict[str, Tensor]:
    """A meter over a loop of training, whose steps move the weights."""
    imp = tk.Importance(model, criterion)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(call or model, batch).backward()
        imp.update()
        optimizer.step()
    found = imp.compute()
    imp.close()
    return found


def by_hand(criterion: str, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The formulas, example by example with autograd, over the same training."""
    model = network()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observed: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches:
        n = len(batch["x"])
        squares = dict.fromkeys(names, 0.0)
        for i in range(n):
            optimizer.zero_grad()
            loss_of(model, {k: v[i : i + 1] for k, v in batch.items()}).backward()
            for name in names:
                layer = model.get_submodule(name)
                gw = layer.weight.grad * layer.weight.detach()
                if criterion == "taylor_fo_gate":  # in the loss of the minibatch, a mean
                    observed[name].append((gw.sum(1) / n).square())
                squares[name] = squares[name] + gw.square().sum(1) / n / 2
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        for name in names:
            layer = model.get_submodule(name)
            gw = layer.weight.grad * layer.weight.detach()
            if criterion == "taylor_fo":
                observed[name].append(gw.square().sum(1))
            if criterion == "taylor_fo_bn":  # no norm follows: its gate is on the whole output
                observed[name].append((gw.sum(1) + layer.bias.grad * layer.bias.detach()).square())
            if criterion == "obd_fisher":
                observed[name].append(squares[name])
        optimizer.step()
    return {name: torch.stack(of).mean(0) for name, of in observed.items()}


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(got[name].double(), score.double(), rtol=1e-5, atol=1e-12)


def plain_batches() -> list[dict[str, Tensor]]:
    parts = [range(first, min(first + BATCH, COUNT)) for first in range(0, COUNT, BATCH)]
    made = [[value(i) for i in part] for part in parts]
    return [{key: torch.stack([v[key] for v in part]) for key in ("x", "y")} for part in made]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_dict_batches_whose_last_is_smaller(criterion):
    """Every minibatch counts alike; under `taylor_fo_gate` every example does."""
    expected = by_hand(criterion, plain_batches())
    close(scores(network(), criterion, DataLoader(Examples(), BATCH)), expected)


def test_examples_of_a_smaller_batch_can_be_made_to_weigh_as_much_as_others():
    """As if the loss were the sum over a batch, divided by the size that others have."""
    found = []
    for mean in (True, False):
        model = network()
        imp = tk.Importance(model, "taylor_fo_gate")
        for batch in plain_batches():
            loss, n = loss_of(model, batch), len(batch["x"])
            (loss if mean else loss * n / BATCH).backward()
            imp.update(loss_scale=BATCH / n if mean else 1.0)
        found.append(imp.compute())
    close(*found)


@pytest.mark.parametrize("data", [Examples(), Stream()], ids=["map", "iterable"])
def test_worker_processes(data):
    loader = DataLoader(data, BATCH, num_workers=2)
    expected = scores(network(), "taylor_fo_gate", plain_batches())
    got = scores(network(), "taylor_fo_gate", loader)
    for name, score in expected.items():
        assert torch.equal(got[name], score)


def test_an_iterable_loader_prunes_as_lists_do():
    found = []
    for batches in (plain_batches(), DataLoader(Stream(), BATCH)):
        model = network()
        pruner = tk.Pruner(
            model, value(0)["x"][None], "taylor_fo", filters=0.5, every=2, per_step=2
        )
        while not pruner.done:
            for batch in batches:
                model.zero_grad()
                loss_of(model, batch).backward()
                pruner.step()
        found.append(pruner.history)
    assert found[0] == found[1]
    assert len(found[0]) > 1
