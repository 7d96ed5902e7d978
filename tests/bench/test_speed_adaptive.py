"""Latencies of pruned networks: of the shapes that the kept runs say, over the dense network's."""

from __future__ import annotations

import json
from statistics import mean

import pytest
from torch import nn

pytest.importorskip("sklearn", reason="the studies need scikit-learn")

from bench import methods, speed_adaptive
from taylor_kernels.studies.methods import shapes
from taylor_kernels.studies.methods.problems import NETWORKS
from taylor_kernels.studies.training import layer_widths

GONE = "blocks.1"


def hidden(model: nn.Module) -> dict[str, int]:
    """Filters of all layers but that of the outputs."""
    return dict(list(layer_widths(model).items())[:-1])


def run(way: str, seed: int) -> dict:
    """A kept run: dense, or without a block and with half of the filters of all other layers."""
    whole = hidden(NETWORKS["ResNet"]((1, 8, 8)))
    of = {"dense": lambda name, n: n, "it": lambda name, n: 0 if GONE in name else n // 2}[way]
    return {
        "way": way,
        "network": "ResNet",
        "data": "digits",
        "seed": seed,
        "blocks": [GONE] if way == "it" else [],
        "filters": [[name, of(name, count), count] for name, count in whole.items()],
    }


def test_a_network_is_rebuilt_with_its_widths_and_without_its_blocks():
    model = shapes.rebuilt(run("it", 0))
    assert hidden(model) == {name: n for name, n, _ in run("it", 0)["filters"] if n}


def test_latencies_are_over_the_mean_of_the_dense_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_adaptive, "ROOT", tmp_path)
    monkeypatch.setattr(speed_adaptive, "ADAPTIVE", "it")
    file = tmp_path / methods.KEPT / "adaptive.json"
    file.parent.mkdir(parents=True)
    runs = [run(way, seed) for way in ("it", "dense") for seed in range(2)]
    file.write_text(json.dumps({"runs": runs}))
    found = speed_adaptive.measure()
    of = found["relative"]["ResNet, digits"]
    assert {way: len(each) for way, each in of.items()} == {"it": 2, "dense": 2}
    assert mean(of["dense"]) == pytest.approx(1)
    assert all(value > 0 for value in of["it"])
    assert found["words"] == shapes.speed_words(found["relative"], "it")


def test_a_gain_is_told_where_dense_networks_of_one_shape_differ_by_less():
    def words(dense, *ours):
        names = ("ResNet, digits", "ResNet, deep, digits")
        each = [{"dense": dense, "it": [left]} for left in ours]
        each[-1]["dense"] = [1.0, 1.0]
        return shapes.speed_words(dict(zip(names, each, strict=True)), "it")

    assert words([1.05, 0.95], 0.92, 0.93) == "–"  # noise of one problem is that of the other too
    assert words([1.05, 0.95], 0.8, 0.93) == "a batch faster by 1.25× (ResNet, digits)"
    assert words([1.01, 0.99], 0.99, 0.5) == "a batch faster by 2.00× (ResNet, deep, digits)"
    assert words([1.0, 1.0], 0.8, 0.5).count("×") == 2
