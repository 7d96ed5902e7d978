"""Parameters that lie in the same memory without being one object."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing import trace

HOW = ["same", "buffer", "flat", "columns", "turned", "part", "plain", "seen otherwise"]
#: Of these the ones whose channels can still go.
FREE = HOW[:4]


class Two(nn.Module):
    """Two layers, and how the memory of their weights hangs together.

    Args:
        how: the second weight is the "same" as the first, "turned" round, or has a "part" of it;
            both are from "flat" memory, or "columns" of one matrix; the first is also a "buffer", a
            "plain" tensor, or one that is "seen otherwise".
    """

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        kind = {"dtype": torch.float64}
        self.enter, self.leave = nn.Linear(5, width, **kind), nn.Linear(width, 3, **kind)
        self.one, self.two = (nn.Linear(width, width, **kind) for _ in range(2))
        first, self.beside = self.one.weight.data, None
        if how in ("same", "turned"):
            self.two.weight.data = first if how == "same" else first.t()
        elif how in ("flat", "part"):
            memory = torch.cat([first, self.two.weight.data])
            self.one.weight.data = memory[:width]
            self.two.weight.data = memory[width - (how == "part") :][:width]
        elif how == "columns":
            halves = torch.cat([first, self.two.weight.data], 1).chunk(2, 1)
            self.one.weight.data, self.two.weight.data = halves
        elif how == "buffer":
            del self.beside
            self.register_buffer("beside", first)
        else:
            self.beside = first if how == "plain" else first.view(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).tanh()
        y = self.two(self.one(x).relu())
        if self.beside is not None:
            y = y + nn.functional.linear(x, self.beside.view_as(self.one.weight))
        return self.leave(y.tanh())


def trained(model: nn.Module, x: Tensor, pruner: tk.Pruner | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if pruner is not None:
            pruner.step()
        optimizer.step()


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("width", [6, 9])
def test_what_masks_one_of_them_changes_nothing_that_stays(how, width):
    torch.manual_seed(width)
    model, x = Two(width, how), torch.randn(4, 5, dtype=torch.float64)
    whole = nn.Sequential(model, nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    pruner = tk.Pruner(whole, x, "magnitude_l2", filters=0.6, every=1, per_step=0.4)
    assert {"0.one", "0.two"} <= pruner.widths.keys() or how not in FREE
    assert how in FREE or not {"0.enter", "0.one", "0.two"} & pruner.widths.keys()
    whole(x).square().mean().backward()
    pruner.step()
    for name, value in whole.state_dict().items():
        gone = pruner._network.channels.entries(pruner._network.dead).get(name, {})
        stays = torch.ones(value.shape, dtype=torch.bool)
        for dim, index in gone.items():
            stays.index_fill_(dim, index, False)
        assert torch.equal(value[stays], before[name][stays])
        assert not value[~stays].any()
    found = whole(x)
    torch.testing.assert_close(pruner.compact()(x), found, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("how", FREE)
@pytest.mark.parametrize("compacted", [1, 2, 5])
def test_they_share_memory_once_they_are_cut(how, compacted):
    x = torch.randn(6, 5, dtype=torch.float64)
    outputs = []
    for cut in (False, True):
        torch.manual_seed(compacted)
        model = Two(8, how)
        together = memory(model.one.weight) == memory(model.two.weight)
        pruner = tk.Pruner(model, x, "magnitude_l2", filters=0.5, every=1, per_step=compacted)
        while not pruner.done:
            trained(model, x, pruner)
            if cut:
                pruner.compact()
        trained(model, x)
        outputs.append(model(x))
        if how == "same":
            assert together
            assert memory(model.one.weight) == memory(model.two.weight)
        if how == "buffer":
            assert memory(model.one.weight) == memory(model.beside)
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("how", ["turned", "part", "plain", "seen otherwise"])
def test_what_cannot_be_cut_says_why(how):
    skipped = trace(Two(7, how), torch.randn(2, 5, dtype=torch.float64)).skipped
    other = "two.weight" if how in ("turned", "part") else "beside"
    assert "shares its memory" in skipped["one"]
    assert other in skipped["one"]
