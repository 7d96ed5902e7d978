"""Those to blame for a fault are found in few trials, and nobody else is blamed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.proof.culprits import culprits, made_alike
from taylor_kernels.pruning.proof.trial import Trial
from taylor_kernels.tracing import trace
from tests.tracing.pieces import Apply


class Tries:
    """Finds a fault wherever one of `wrong` is, or all of a set that is wrong together."""

    def __init__(self, wrong: set[int], together: set[int] = frozenset()) -> None:
        self.wrong, self.together, self.count = wrong, together, 0

    def __call__(self, numbers: Sequence[int]) -> str:
        self.count += 1
        both = bool(self.together) and self.together <= {*numbers}
        return "wrong" if both or self.wrong & {*numbers} else ""


@st.composite
def sets_and_wrong(draw) -> tuple[list[list[int]], set[int]]:
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    numbers = draw(st.permutations(range(sum(sizes))))
    sets = [[numbers.pop() for _ in range(size)] for size in sizes]
    wrong: set[int] = set()
    for alike in sets:
        wrong |= {*draw(st.sampled_from([[], [], alike, alike[1:], alike[::2], alike[-1:]]))}
    return sets, wrong


@given(sets_and_wrong())
def test_who_is_wrong_is_found_and_nobody_beside_those_made_alike(case):
    sets, wrong = case
    fault = Tries(wrong)
    found = culprits(fault, sets)
    assert wrong <= found.keys()
    for alike in sets:
        blamed = {*alike} & found.keys()
        if blamed - wrong:  # three of them were tried: both ends, and the neighbour of one
            assert len(alike) >= 6
            assert {alike[0], alike[1], alike[-1]} <= wrong
    known = Tries(wrong)
    assert culprits(known, sets, "known" if wrong else "").keys() == found.keys()
    assert known.count == fault.count - bool(wrong)


@given(st.sets(st.integers(0, 19), min_size=2, max_size=20))
def test_what_is_wrong_only_together_is_blamed_together(together: set[int]):
    fault = Tries(set(), together)
    found = culprits(fault, [[number] for number in range(20)])
    assert together <= found.keys()
    assert not fault([number for number in range(20) if number not in found])


@pytest.mark.parametrize("layers", [6, 40])
def test_trials_do_not_grow_with_the_depth(layers: int):
    fault = Tries({*range(0, 2 * layers, 2)})
    sets = [[*range(0, 2 * layers, 2)], [*range(1, 2 * layers, 2)]]
    assert culprits(fault, sets).keys() == fault.wrong
    assert fault.count == 6  # all, either set, and three of the faulty one


class Block(nn.Module):
    """A residual block of which the inner channels can go, or part at a width in its code."""

    def __init__(self, sound: bool) -> None:
        super().__init__()
        self.up, self.down, self.sound = nn.Linear(6, 8), nn.Linear(8, 6), sound

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = y.tanh() if self.sound else torch.cat([y[:, :3].tanh(), y[:, 3:8]], 1)
        return x + self.down(y if self.sound else y.reshape(-1, 8))


def deep(sound: Sequence[bool]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(*map(Block, sound)), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("sound", "most"),
    [
        ([False] * 12, 9),
        ([True] * 12, 1),
        ([number % 2 == 0 for number in range(12)], 40),
        ([number != 7 for number in range(12)], 25),
    ],
    ids=["none", "all", "in turns", "but one"],
)
def test_blocks_that_repeat(sound: list[bool], most: int, monkeypatch: pytest.MonkeyPatch):
    tried = []
    fault = Trial._fault
    monkeypatch.setattr(Trial, "_fault", lambda *args: tried.append(1) or fault(*args))
    pruner = Pruner(deep(sound), torch.randn(3, 4), "magnitude_l2", filters=0.9)
    stay = [f"1.{number}.up" for number, each in enumerate(sound) if not each]
    assert sorted(set(pruner.skipped) - {"2"}) == sorted(stay)
    assert len(tried) <= most


@pytest.mark.parametrize("seed", range(4))
def test_the_layer_that_shows_a_fault_says_whose_it_is(seed: int, monkeypatch: pytest.MonkeyPatch):
    """However many others there are, none of them alike."""
    torch.manual_seed(seed)
    count, wrong = 20, random.Random(seed).randrange(20)
    code = Apply(lambda s, x: x * x.size(1) ** 0.5)
    blocks = [
        nn.Sequential(nn.Linear(6, 5 + n), code if n == wrong else nn.Tanh(), nn.Linear(5 + n, 6))
        for n in range(count)
    ]
    tried, fault = [], Trial._fault
    monkeypatch.setattr(Trial, "_fault", lambda *args: tried.append(1) or fault(*args))
    pruner = Pruner(nn.Sequential(*blocks), torch.randn(3, 6), "magnitude_l2", filters=0.9)
    assert set(pruner.skipped) == {f"{wrong}.0", f"{count - 1}.2"}
    assert len(tried) <= 5


def test_groups_made_alike():
    model = nn.Sequential(
        *(Block(True) for _ in range(3)), nn.Linear(6, 8), Apply(lambda _, x: x.relu()),
        nn.Linear(8, 8), nn.Linear(8, 6), Block(True),
    )  # fmt: skip
    groups = trace(model, torch.randn(2, 6)).groups
    names = [[groups[n].name for n in alike] for alike in made_alike(groups, range(len(groups)))]
    assert ["0.up", "1.up", "2.up", "7.up"] in names
    assert ["3"] in names
    assert ["5"] in names
