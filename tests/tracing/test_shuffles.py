"""Shuffles between grouped convolutions, whose groups their widths do not divide."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taylor_kernels.tracing import trace
from taylor_kernels.tracing.resolving.cuts import _different, _together
from tests.tracing.parts import Apply, shuffle
from tests.tracing.removal import faults


def between(kind: str, groups: int):
    """A shuffle, with something that is done to the grid of it."""

    def turned(self: nn.Module, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n, groups, c // groups, h, w)
        gate = 1.0
        if kind == "gated":
            y = y * y.sum(1, keepdim=True).tanh()
        elif kind == "softmax":
            y = y.softmax(1)
        elif kind == "relu":
            y = y.relu()
        elif kind == "second use":
            gate = (y[:, 0] * y[:, 1]).sum(1, keepdim=True).tanh()
        return y.transpose(1, 2).reshape(n, c, h, w) * gate

    return turned


def grouped(seed: int, depth: int = 2) -> nn.Sequential:
    """Grouped convolutions with shuffles, depthwise convolutions and residuals between."""
    rng = random.Random(seed)
    groups = rng.choice([2, 3, 4])
    width = groups * rng.randint(2, 11)
    parts: list[nn.Module] = [nn.Conv2d(3, width, 1)]
    for _ in range(depth):
        middle = groups * rng.randint(2, 11)
        turn = rng.choice([shuffle(groups), shuffle(groups), None])
        body = [
            nn.Conv2d(width, middle, 1, groups=rng.choice([1, groups])), nn.BatchNorm2d(middle),
            nn.ReLU(), nn.ChannelShuffle(groups) if turn is None else Apply(turn),
            nn.Conv2d(middle, middle, 3, padding=1, groups=middle),
            nn.Conv2d(middle, width, 1, groups=groups),
        ]  # fmt: skip
        how = rng.choice(["residual", "plain", "cat"])
        if how == "plain":
            parts += body
        elif how == "residual":
            parts.append(Apply(lambda s, x: (x + s.body(x)).relu(), body=nn.Sequential(*body)))
        else:
            parts.append(
                Apply(lambda s, x: torch.cat([s.body(x), x], 1), body=nn.Sequential(*body))
            )
            width *= 2
    return nn.Sequential(*parts, nn.Conv2d(width, 2, 1))


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**20))
def test_masking_what_a_shuffle_moved_is_removing_it(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = grouped(seed)
        inputs = torch.randn(1, 3, 3, 3)
    assert not faults(model, inputs, trace(model, inputs), draws=3, every=False)


@pytest.mark.parametrize(("groups", "share"), [(2, 5), (2, 7), (3, 7), (3, 10), (4, 9), (4, 13)])
def test_runs_begin_anew_in_each_group(groups, share):
    """`share` channels a group, no multiple of the groups: as many runs as fit can go."""
    width = groups * share
    model = nn.Sequential(
        nn.Conv2d(3, width, 1, groups=1), Apply(shuffle(groups)),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.Conv2d(width, groups, 1, groups=groups), nn.Conv2d(groups, 2, 1),
    )  # fmt: skip
    inputs = torch.randn(1, 3, 4, 4)
    channels = trace(model, inputs)
    first = next(group for group in channels.groups if group.name == "0")
    assert first.size == share // groups
    assert first.producers[0].index.size(1) == groups**2
    assert not faults(model, inputs, channels)


@pytest.mark.parametrize("kind", ["gated", "softmax", "relu", "second use"])
@pytest.mark.parametrize("groups", [2, 3])
def test_a_grid_that_is_used_keeps_its_rows(kind, groups):
    width = groups * 7
    model = nn.Sequential(
        nn.Conv2d(3, width, 1), Apply(between(kind, groups)),
        nn.Conv2d(width, 4 * groups, 1, groups=groups), nn.Conv2d(4 * groups, 2, 1),
    )  # fmt: skip
    inputs = torch.randn(1, 3, 4, 4)
    assert not faults(model, inputs, trace(model, inputs))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("groups", [2, 3])
def test_a_shuffle_with_channels_of_the_input_moves_those_too(groups, first):
    """They cannot go, wherever they lie behind it, nor can what is as wide as the grid of them."""
    width = groups * random.randint(3, 6)

    def beside(self: nn.Module, x: Tensor) -> Tensor:
        y = torch.cat([x, self.layer(x)] if first else [self.layer(x), x], 1)
        return shuffle(groups)(self, y)

    model = nn.Sequential(
        Apply(beside, layer=nn.Conv2d(3, width - 3, 1)),
        nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, 2, 1),
    )  # fmt: skip
    inputs = torch.randn(1, 3, 4, 4)
    assert not faults(model, inputs, trace(model, inputs))


def test_rows_of_groups_go_in_equal_numbers():
    """Groups of 9 rows beside 3 channels of another layer, read in groups of 10.

    Places p, p + 10 and p + 20 lie in the three groups of rows for p from 0 to 6, and can go.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        Apply(
            lambda s, x: torch.cat([s.rows(x), s.beside(x)], 1),
            rows=nn.Conv2d(6, 27, 1, groups=3), beside=nn.Conv2d(6, 3, 1),
        ),
        nn.Conv2d(30, 6, 1, groups=3), nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    inputs = torch.randn(1, 3, 4, 4)
    channels = trace(model, inputs)
    group = next(group for group in channels.groups if group.name == "1.rows")
    assert group.producers[0].index.T.tolist() == [list(range(d, d + 7)) for d in (0, 10, 20)]
    assert not faults(model, inputs, channels)


@given(
    rows=st.lists(
        st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any), min_size=1, max_size=14
    ),
)
def test_sets_are_in_proportion_and_hold_each_row_once(rows):
    sets, left = _together(np.array(rows, np.int64).reshape(-1, 3))
    assert sorted([row for members in sets for row in members] + left) == list(range(len(rows)))
    for members in sets:
        assert len(set(np.sum([rows[row] for row in members], axis=0).tolist())) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40) | st.integers(0, 4000), min_size=1, max_size=30))
def test_classes_are_told_apart_however_far_apart_they_lie(label):
    classes, first, number = _different(np.array(label, np.int64))
    assert classes.tolist() == sorted(set(label))
    assert first.tolist() == [label.index(each) for each in classes]
    assert classes[number].tolist() == label
