"""SPP's probabilities against the paper's formulas in plain Python, and masks drawn with them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taylor_kernels.methods.probabilities import advanced, drawn, increments


def paper_increment(rank: int, to_go: int, step: float, decay: float) -> float:
    alpha = (math.log(2) - math.log(decay)) / to_go
    turn = -math.log(decay) / alpha
    if rank <= turn:
        return step * math.exp(-alpha * rank)
    return 2 * decay * step - step * math.exp(-alpha * (2 * turn - rank))


def paper_update(p: list[float], score: list[float], target: int, step: float, decay: float):
    pruned = sum(value == 1 for value in p)
    if pruned >= target:
        return [float(value == 1) for value in p]
    alive = sorted((i for i in range(len(p)) if p[i] != 1), key=lambda i: (score[i], i))
    new = list(p)
    for rank, i in enumerate(alive):
        new[i] = min(max(p[i] + paper_increment(rank, target - pruned, step, decay), 0.0), 1.0)
    return new


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.floats(0.01, 1.0), st.floats(0.02, 0.98))
def test_increments_turn_negative_at_the_target(count, share, step, decay):
    to_go = max(1, round(share * count))
    found = increments(count, to_go, step, decay)
    expected = [paper_increment(rank, to_go, step, decay) for rank in range(count)]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert (found[:to_go] > 0).all()
    assert (found[to_go:] < 1e-12 * step).all()
    assert found[0] == pytest.approx(step)


@given(st.integers(2, 40), st.floats(0.05, 0.95), st.floats(0.05, 0.9), st.integers(0, 2**31))
@settings(max_examples=30)
def test_exactly_the_target_is_pruned_and_p_stays_in_range(count, share, decay, seed):
    generator = torch.Generator().manual_seed(seed)
    target = min(math.ceil(share * count), count - 1)
    p, expected = torch.zeros(count), [0.0] * count
    for update in range(1000):  # ranks that change in the beginning, and settle
        score = torch.rand(count, generator=generator) * 0.95**update + torch.arange(count) * 0.05
        gone = p == 1
        p = advanced(p, score, target, 0.3, decay)
        expected = paper_update(expected, score.tolist(), target, 0.3, decay)
        assert ((p >= 0) & (p <= 1)).all()
        assert (p[gone] == 1).all()
        assert torch.allclose(p, torch.tensor(expected), atol=1e-4)
        expected = p.tolist()  # float32 keeps p, so that rounding does not add up
        if int((p == 1).sum()) == target:
            break
    assert int((p == 1).sum()) == target
    assert int((advanced(p, score, target, 0.3, decay) > 0).sum()) == target


def test_masks_are_drawn_with_their_probabilities():
    p = torch.tensor([0.0, 0.03, 0.5, 0.9, 1.0]).repeat_interleave(400)
    masks = [drawn([torch.ones(3), p], 7, i)[1] for i in range(25)]
    rate = torch.stack(masks).float().view(25, 5, 400).mean((0, 2))
    assert rate[0] == 0
    assert rate[4] == 1
    deviation = (p[::400] * (1 - p[::400]) / 10_000).sqrt()
    assert ((rate - p[::400]).abs() <= 5 * deviation).all()
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[3], drawn([torch.ones(3), p], 7, 3)[1])
    assert not torch.equal(masks[3], drawn([torch.ones(3), p], 8, 3)[1])
