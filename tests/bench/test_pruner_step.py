"""What bench_pruner_step times: a plain step and one that prunes, in rounds with a pruning each."""

from __future__ import annotations

import torch
from torch import nn

from bench import bench_pruner_step
from bench.bench_pruner_step import in_turns, over_plain
from tools.step_block import step_block


def small_net() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))


def test_rounds_hold_both_and_a_pruning(monkeypatch):
    monkeypatch.setattr(bench_pruner_step, "SIZE", 16)
    model = small_net()
    found = in_turns(model, 2)
    assert [len(seconds) for seconds in found.masked.values()] == [2, 2]
    rounds = bench_pruner_step.ROUNDS_COMPACTED
    assert [len(seconds) for seconds in found.compacted.values()] == [rounds, rounds]
    # The warm-up's pruning and one of each round are cut, those behind are masked.
    assert len(model[1].weight) == 8 - 3
    assert (model[1].weight == 0).sum() == rounds
    assert found.parameters == (5 * 27 + 5 + 2 * 5 + 5 * 10 + 10) / (8 * 27 + 8 + 2 * 8 + 80 + 10)
    assert torch.isfinite(model[0].weight).all()


def test_the_ratio_is_of_rounds_beside_each_other():
    """Though the machine slowed down for one of them."""
    found = {"plain": [1.0, 4.0, 1.0], "with a pruner": [1.02, 4.04, 1.5]}
    assert over_plain(found) == 1.02
    block = step_block(
        {
            "rounds": {"net": found},
            "compacted": {"net": {"parameters": 0.51, "rounds": {w: [1.0] for w in found}}},
            "every": 10, "images": 4, "size": 224,
            "machine": {"processor": "a processor", "threads": 1},
            "versions": {"torch": "2", "pytorchcv": "0"},
        }
    )  # fmt: skip
    assert "| net | 100 | 150 | 1.020 (1.010–1.500) | 3 | ok | 51% | 1.00 |" in block
