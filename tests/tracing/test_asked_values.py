"""What values of the example lead code past is not cut off: what may feed it stays."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.tracing import asserting

#: The numbers of rows for another layer, as code asks for them: of [N] bool.
ASKED: dict[str, Callable[[Tensor], Tensor | None]] = {
    "any": lambda rare: rare.nonzero()[:, 0] if rare.any() else None,
    "a number": lambda rare: torch.arange(len(rare))[rare] if int(rare.sum()) else None,
    "the greatest": lambda rare: rare.nonzero().flatten() if rare.float().max() > 0 else None,
    "nonzero": lambda rare: rows if len(rows := rare.nonzero()[:, 0]) else None,
    "where": lambda rare: rows if (rows := torch.where(rare)[0]).numel() else None,
    "argwhere": lambda rare: rows if (rows := rare.argwhere()[:, 0]).numel() else None,
    "a mask": lambda rare: rows if len(rows := torch.arange(len(rare))[rare]) else None,
    "masked_select": lambda rare: (
        rows if len(rows := torch.arange(len(rare)).masked_select(rare)) else None
    ),
    "unique": lambda rare: rare.nonzero()[:, 0] if len(rare.unique()) > 1 else None,
    "equal": lambda rare: (
        None if torch.equal(rare, torch.zeros_like(rare)) else rare.nonzero()[:, 0]
    ),
    "allclose": lambda rare: (
        None if torch.allclose(rare.float(), torch.zeros(1)) else rare.nonzero()[:, 0]
    ),
    "a list": lambda rare: rare.nonzero()[:, 0] if True in rare.tolist() else None,
    "numpy": lambda rare: rare.nonzero()[:, 0] if rare.numpy().any() else None,
}


class Rows(nn.Module):
    """Says which rows are rare, or that none is."""

    def __init__(self, asked: str) -> None:
        super().__init__()
        self.asked = asked

    def forward(self, x: Tensor) -> Tensor | None:
        return ASKED[self.asked](x[:, 0] > 1e3)


class Listed(Rows):
    """In a list, which may be empty."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [rows for rows in [super().forward(x)] if rows is not None]


class Counted(nn.Module):
    """As many as there are, which is for its caller to see."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 1e3)[0] if random.random() < 0.5 else (x[:, 0] > 1e3).nonzero()


class Rare(nn.Module):
    """Rows whose first feature is large go through a layer of their own too."""

    def __init__(self, asked: str, *, apart: bool = False) -> None:
        super().__init__()
        self.enter, self.own, self.leave = nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(9, 2)
        self.rows = Rows(asked) if apart else ASKED[asked]
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x).relu()
        rows = self.rows(x if self.apart else x[:, 0] > 1e3)
        if rows is not None:
            y = y.index_add(0, rows, self.own(y[rows]))
        return self.leave(y)


class Told(Rare):
    """By a module inside, or one inside of that."""

    def __init__(self, teller: nn.Module) -> None:
        super().__init__("any")
        self.rows = teller

    def forward(self, x: Tensor) -> Tensor:
        y, rows = self.enter(x).relu(), self.rows(x)
        if len(rows):
            rows = (rows[0] if isinstance(rows, list) else rows).flatten()
            y = y.index_add(0, rows, self.own(y[rows]))
        return self.leave(y)


COMMON = torch.rand(4, 5)
RARE = torch.cat([COMMON, 2e3 * torch.ones(2, 5)])


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_what_feeds_it_stays(asked, apart):
    channels = trace(Rare(asked, apart=apart), COMMON)
    assert not channels.groups
    assert "'own.weight'" in channels.skipped["enter"]
    assert "pass an example that reaches it" in channels.skipped["enter"]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("teller", [lambda: Listed("any"), Counted])
def test_what_a_module_inside_has_found_may_lead_its_caller(teller, deep):
    model = Told(nn.Sequential(teller()) if deep else teller())
    channels = trace(model, COMMON)
    assert not channels.groups
    assert "'own.weight'" in channels.skipped["enter"]
    assert [group.size for group in trace(model, RARE).groups] == [9]


@pytest.mark.parametrize("asked", ASKED)
def test_with_an_example_that_reaches_it_all_go(asked):
    model = Rare(asked).double()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    pruner = tk.Pruner(
        model, RARE.double(), "magnitude_l2", filters=0.6, every=1, per_step=3, optimizer=optimizer
    )
    assert set(pruner.widths) == {"enter", "own"}
    while not pruner.done:
        pruner.step()
    for x in (RARE.double(), COMMON.double()):
        before = model(x)
        torch.testing.assert_close(pruner.compact()(x), before)


def test_numbers_as_indices_ask_for_nothing():
    class Neighbours(nn.Module):
        """A layer that is put aside by a setting, beside rows that are taken by numbers."""

        extra = False

        def __init__(self) -> None:
            super().__init__()
            self.enter, self.own, self.leave = nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.enter(x)[torch.tensor([1, 0, 3])]
            return self.leave(self.own(y) if self.extra else y)

    assert [group.size for group in trace(Neighbours(), COMMON).groups] == [9]


class Asserting(nn.Module):
    """Asks for values, and has a layer that is run on what it is told of them."""

    def __init__(self, asks: Callable[[Tensor], bool | None]) -> None:
        super().__init__()
        self.enter, self.own, self.leave = nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(9, 2)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x).relu()
        return self.leave(self.own(y) if self.asks(x) else y)


@pytest.mark.parametrize("asks", asserting.ASSERTIONS)
def test_an_assertion_that_holds_leads_nowhere_else(asks):
    """What is behind it raises an error in any other case, so that the layer is never run."""
    assert [group.size for group in trace(Asserting(asks), COMMON).groups] == [9]


@pytest.mark.parametrize("asks", [asserting.caught, asserting.caught_outside, asserting.told])
def test_what_catches_an_assertion_goes_another_way(asks):
    channels = trace(Asserting(asks), COMMON)
    assert not channels.groups
    assert "'own.weight'" in channels.skipped["enter"]
