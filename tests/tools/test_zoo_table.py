"""The kept run over the zoo is of all its networks, and none has become worse than the table."""

from __future__ import annotations

import json

import pytest

from tests.helpers import ROOT
from tests.zoo.networks import NETWORKS
from tools.zoo_block import ZOO, zoo_block

KEPT = json.loads((ROOT / ZOO).read_text())


def test_every_network_is_in_it():
    assert list(KEPT["networks"]) == list(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_shows_what_the_tests_ask_for(name):
    one, network = KEPT["networks"][name], NETWORKS[name]
    assert one["prunable"] >= network.least
    assert one["reached"]
    assert one["error"] < 1e-6


def test_a_network_without_a_result_says_why():
    failed = {"package": "pytorchcv", "failed": "takes more than 600 seconds"}
    assert "takes more than 600 seconds" in zoo_block({**KEPT, "networks": {"big": failed}})
