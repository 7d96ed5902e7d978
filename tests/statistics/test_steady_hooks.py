"""The short ways of hooks in later passes give the scores that the long ways of the first give."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk
from taylor_kernels.statistics.hooks import steady

WARM = 4  # updates after which the gradients of gates are no longer looked at for noise


class Squeezed(nn.Module):
    """Convolutions in front of norms, and small ones of a squeezed image without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.of_stem = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.body, self.of_body = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)
        self.saves = self.twice = False

    def first(self, x: Tensor) -> Tensor:
        return self.of_stem(self.stem(x)).relu()

    def second(self, x: Tensor) -> Tensor:
        x = self.of_body(self.body(x)).sigmoid()
        gate = nn.functional.leaky_relu_(self.down(x.mean((2, 3), keepdim=True)))
        return self.head((x * self.up(gate).sigmoid()).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.first(x * 2) if self.twice else self.first(x)
        return checkpoint(self.second, x, use_reentrant=False) if self.saves else self.second(x)


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


def loss(y: Tensor) -> Tensor:
    return y.square().sum()


def plain(model: Squeezed) -> None:
    loss(model(images())).backward()


def two_passes_before_one_backward(model: Squeezed) -> None:
    (loss(model(images())) + loss(model(images(3)))).backward()


def two_backwards(model: Squeezed) -> None:
    for count in (4, 6):
        loss(model(images(count))).backward()


def two_backwards_over_one_graph(model: Squeezed) -> None:
    y = model(images())
    y[0].sum().backward(retain_graph=True)
    loss(y).backward()


def clipped(model: Squeezed) -> None:
    loss(model(images())).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(0.1)


def onto_gradients_that_there_are(model: Squeezed) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    loss(model(images())).backward()
    model.zero_grad(set_to_none=False)


def with_a_graph_of_gradients(model: Squeezed) -> None:
    loss(model(images())).backward(create_graph=True)


def in_checkpoints(model: Squeezed) -> None:
    model.saves = True
    loss(model(images())).backward()
    model.saves = False


def beside_passes_that_count_nothing(model: Squeezed) -> None:
    model(images())
    with torch.no_grad():
        model(images())
    loss(model(images())).backward()
    model(images())


def part_by_part(model: Squeezed) -> None:
    for _ in range(2):
        loss(model.second(model.first(images()))).backward()


def a_norm_twice_in_a_pass(model: Squeezed) -> None:
    model.twice = True
    loss(model(images())).backward()
    model.twice = False


def other_parameters(model: Squeezed) -> None:
    """Put there as `load_state_dict(assign=True)` does."""
    model.of_stem.weight = nn.Parameter(torch.rand_like(model.of_stem.weight))
    loss(model(images())).backward()


def large_outputs(model: Squeezed) -> None:
    loss(model(images(60))).backward()


WAYS = (
    plain, two_passes_before_one_backward, two_backwards, two_backwards_over_one_graph, clipped,
    onto_gradients_that_there_are, with_a_graph_of_gradients, in_checkpoints,
    beside_passes_that_count_nothing, part_by_part, other_parameters, large_outputs,
)  # fmt: skip


def scores(
    model: nn.Module, warm: int, run: Callable[[Squeezed], None], seed: int
) -> list[dict[str, Tensor]]:
    """Scores of what `run` does, after other passes, and of a plain pass after that."""
    model = copy.deepcopy(model)
    imp = tk.Importance(model, "taylor_fo_bn", example_inputs=images(1))
    for _ in range(warm):
        plain(model)
        imp.update()
    torch.manual_seed(seed)
    found = []
    for way in (run, plain):
        imp.reset()
        model.zero_grad()
        way(model)
        imp.update()
        found.append(imp.compute())
    imp.close()
    return found


@pytest.mark.parametrize("run", WAYS, ids=lambda run: run.__name__)
def test_later_passes_are_scored_as_first_ones(run, monkeypatch):
    monkeypatch.setattr(steady, "SMALL", 200)
    model = Squeezed().double().eval()
    seed = int(torch.randint(1 << 30, ()))
    first, late = scores(model, 0, run, seed), scores(model, WARM, run, seed)
    for expected, found in zip(first, late, strict=True):
        assert all(score.any() for score in found.values())
        for name, score in expected.items():
            torch.testing.assert_close(found[name], score, rtol=1e-5, atol=0)


def test_a_norm_that_runs_twice_for_once_is_seen():
    model = Squeezed().double().eval()
    imp = tk.Importance(model, "taylor_fo_bn", example_inputs=images(1))
    for _ in range(WARM):
        plain(model)
        imp.update()
    imp.reset()
    seed = int(torch.randint(1 << 30, ()))
    a_norm_twice_in_a_pass(model)
    with pytest.raises(RuntimeError, match="behind of_stem ran more often in this pass"):
        imp.update()
    torch.manual_seed(seed)
    a_norm_twice_in_a_pass(model)
    imp.update()
    again, _ = scores(model, 0, a_norm_twice_in_a_pass, seed)
    for name, score in again.items():
        torch.testing.assert_close(imp.compute()[name], score, rtol=1e-5, atol=0)


def test_later_passes_go_the_short_way(monkeypatch):
    taken = []
    model = Squeezed().double().eval()
    imp = tk.Importance(model, "taylor_fo_bn", example_inputs=images(1))
    for _ in range(WARM):
        plain(model)
        imp.update()
    monkeypatch.setattr(
        "taylor_kernels.statistics.hooks.sites.SiteHooks._after",
        lambda self, key, *rest: taken.append(key),
    )
    plain(model)
    imp.update()
    assert not taken
