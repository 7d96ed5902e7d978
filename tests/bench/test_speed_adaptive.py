"""Latencies of pruned networks: of the shapes that the kept runs say, over the dense network's."""

from __future__ import annotations

import json
from statistics import mean

import pytest

pytest.importorskip("sklearn", reason="the studies need scikit-learn")

from bench import methods, speed_adaptive
from taylor_kernels.studies.methods import adaptive
from taylor_kernels.studies.methods.problems import NETWORKS

GONE = "blocks.1"


def run(way: str, seed: int) -> dict:
    """A kept run: dense, or without a block and with half of the filters of all other layers."""
    whole = adaptive._filters(NETWORKS["ResNet"]((1, 8, 8)))
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
    model = adaptive.rebuilt(run("it", 0))
    assert adaptive._filters(model) == {name: n for name, n, _ in run("it", 0)["filters"] if n}


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
    assert "ResNet, digits" in found["words"]
