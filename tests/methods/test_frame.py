"""The frame: which weights a method keeps, and of which iteration, on a network of numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_kernels.methods import FRAMES, Frame
from taylor_kernels.methods.masks import ranked_weights

STEPS, EARLY = 10, 3


class Training:
    """Each iteration moves every kept weight a little, so that a weight tells its iteration."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, model: nn.Module, first: int, last: int) -> None:
        self.calls.append((first, last))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for _ in range(first, last):
            optimizer.zero_grad()
            sum(p.sum() for p in model.parameters()).backward()
            optimizer.step()


def run(frame: Frame, keep: float = 0.25, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    start = {name: w.detach().clone() for name, w in ranked_weights(model).items()}
    train = Training()
    batch = torch.randn(16, 6), torch.randint(0, 4, (16,))
    held = frame.run(
        model, keep, train, STEPS, batches=[batch], loss=F.cross_entropy, early=EARLY, **options
    )
    return model, start, train.calls, held


@pytest.mark.parametrize("name", FRAMES)
def test_each_method_keeps_the_weights_of_its_iteration(name):
    frame = FRAMES[name]
    model, start, calls, held = run(frame)
    rewind = {"start": 0, "early": EARLY, "end": STEPS}[frame.weights_from]
    whole = (rewind if rewind < STEPS else 0, STEPS)
    expected = [(0, rewind)] * (0 < rewind < STEPS)
    expected += [whole] * frame.times * (frame.mask_from == "end") + [whole]
    assert calls == expected
    if rewind < STEPS:  # what is kept has moved for as many iterations as a whole training has
        for key, weight in ranked_weights(model).items():
            mask = held.masks[key]
            moved = (start[key] - weight.detach())[mask] / 1e-3
            torch.testing.assert_close(moved, torch.full_like(moved, STEPS), rtol=1e-3, atol=1e-2)
            assert not weight[~mask].any()
    counts = [int(mask.sum()) for mask in held.masks.values()]
    assert sum(counts) == 20
    if frame.scope == "local":
        assert counts == [12, 8]
    if frame.granularity == "filter":
        assert all(len(row.unique()) == 1 for mask in held.masks.values() for row in mask)


def test_times_cut_further_what_is_left():
    """A weight that one time removes, none brings back: masks of more times are inside others."""
    once = run(Frame("it", "end", "start", "magnitude", "", times=1), keep=0.5)[3].masks
    twice = run(Frame("it", "end", "start", "magnitude", "", times=2), keep=0.25)[3].masks
    assert all((once[name] | ~mask).all() for name, mask in twice.items())


def test_controls():
    frame = FRAMES["SNIP"]
    plain = run(frame)[3].masks
    shuffled = run(frame, control="shuffle", generator=torch.Generator().manual_seed(1))[3].masks
    model, start, _, held = run(frame, control="reinit")
    for name, mask in plain.items():
        assert shuffled[name].sum() == mask.sum()
        assert not shuffled[name].equal(mask)
        assert held.masks[name].equal(mask)
        moved = (start[name] - ranked_weights(model)[name].detach())[mask] / 1e-3
        assert (moved - STEPS).abs().max() > 1


@pytest.mark.parametrize("name", ["SNIP", "lottery ticket, rewound"])
def test_masks_that_were_kept_are_finished_to_the_same_bits(name):
    """As a run that was stopped between the two halves goes on."""
    frame = FRAMES[name]
    whole, *_ = run(frame)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    again = copy.deepcopy(model)
    batch = torch.randn(16, 6), torch.randint(0, 4, (16,))
    masks = frame.find(
        model, 0.25, Training(), STEPS, batches=[batch], loss=F.cross_entropy, early=EARLY
    )
    assert all(w.all() for w in ranked_weights(model).values())  # not masked yet
    if frame.weights_from == "early":
        Training()(again, 0, EARLY)
    frame.finish(again, masks, Training(), STEPS, early=EARLY)
    for key, value in whole.state_dict().items():
        assert again.state_dict()[key].equal(value), key


def test_mistakes_are_named():
    for call, message in (
        (lambda: Frame("it", "early", "start", "snip", ""), "mask_from: 'early'"),
        (lambda: Frame("it", "end", "late", "snip", ""), "weights_from: 'late'"),
        (lambda: Frame("it", "end", "end", "snap", ""), "criterion: 'snap'"),
        (lambda: Frame("it", "start", "start", "snip", "", times=2), "times: a mask of untrained"),
        (lambda: Frame("it", "end", "end", "snip", "", rounds=0), "rounds, times: 0 and 1"),
        (lambda: run(FRAMES["SNIP"], control="swap"), "control: 'swap'"),
        (lambda: run(FRAMES["SNIP"], control="shuffle"), "generator: shuffling"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_training_that_fails_leaves_no_hook():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))

    def train(model, first, last):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        FRAMES["random"].run(model, 0.5, train, 10)
    assert not model[0].weight._backward_hooks


def test_a_frame_runs_under_bfloat16_autocast():
    def train(model, first, last):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        for _ in range(first, last):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(inputs).float(), targets)
            loss.backward()
            optimizer.step()

    inputs = torch.randn(64, 6)
    targets = inputs[:, :4].argmax(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    before = F.cross_entropy(model(inputs), targets)
    held = FRAMES["SNIP"].run(
        model, 0.5, train, 80, batches=[(inputs, targets)], loss=F.cross_entropy
    )
    weights = ranked_weights(model)
    assert all(not w[~held.masks[name]].any() for name, w in weights.items())
    assert sum(int(w.count_nonzero()) for w in weights.values()) == 40
    assert F.cross_entropy(model(inputs), targets) < before
