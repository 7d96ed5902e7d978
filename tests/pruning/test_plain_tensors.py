"""Tensors that modules hold as plain attributes, as tables of positions that are no buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.zoo.judging import check_all_but, check_file


class Positions(nn.Module):
    """Adds to tokens what stands in a table that nobody has registered."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[:, : x.size(1)].type_as(x).to(x.device)


class Remembering(nn.Module):
    """Keeps what it has seen last, and does away with it where it is of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = torch.zeros(2, 3)
        self.gone = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        if hasattr(self, "gone"):
            del self.gone
        return x.relu()


def model_of(width: int, shared: bool = False) -> tuple[nn.Sequential, Tensor]:
    # Without the channels of the first table, too few can go for the targets of these tests.
    table, inner = torch.randn(1, 9, width), width if shared else 3
    first, second = Positions(table), Positions(table if shared else torch.randn(1, 9, inner))
    body = (first, nn.Linear(width, inner), second, Remembering(), nn.Linear(inner, 2))
    return nn.Sequential(nn.Linear(3, width), *body), torch.randn(1, 6, 3)


@pytest.mark.parametrize("width", [5, 12])
def test_they_lose_the_channels_that_they_lie_on(width):
    model, inputs = model_of(width)
    before = model[1].table.clone()
    check_all_but(["5"], model, inputs)
    left = model[1].table
    assert left.shape[-1] == model[0].out_features < width
    kept = [bool((before == column[..., None]).all(1).any()) for column in left.unbind(-1)]
    assert all(kept), "what is left of the table are columns of the one that was there"
    assert model[3].table.shape[-1] == model[2].out_features


def test_one_that_two_modules_share_is_one():
    model, inputs = model_of(8, shared=True)
    check_all_but(["5"], model, inputs)
    assert model[1].table is model[3].table
    assert model[1].table.size(-1) == model[0].out_features == model[2].out_features


def test_another_model_that_holds_the_same_table_is_not_written_into():
    model, inputs = model_of(8)
    other = Positions(model[1].table)
    before = other.table.clone()
    pruner = tk.Pruner(model, inputs, "magnitude_l2", filters=0.5, every=1)
    while not pruner.done:
        pruner.step()
    assert torch.equal(other.table, before)
    assert (model[1].table == 0).any()


def test_a_pruned_file_cuts_them(tmp_path):
    pytest.importorskip("safetensors", reason="pruned models are files of safetensors")
    check_file(*model_of(10), tmp_path / "it")


def test_one_that_is_trained_stays_whole():
    model, inputs = model_of(7)
    model[1].table.requires_grad_()
    pruner = tk.Pruner(model, inputs, params=0.9, every=1)
    assert "0" in pruner.skipped
    assert "2" in pruner.widths
