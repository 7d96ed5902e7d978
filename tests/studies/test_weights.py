"""Trained networks are kept: none is trained twice, and none is taken for another."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("sklearn", reason="the studies need scikit-learn")
pytest.importorskip("safetensors", reason="the studies need safetensors")

from taylor_kernels.studies import weights
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.data import Split, load_digits
from taylor_kernels.studies.networks import DigitsResNet
from taylor_kernels.studies.settings import StudySettings
from taylor_kernels.studies.training import Schedule
from taylor_kernels.studies.weights import (
    Trained,
    load_weights,
    save_weights,
    trained_network,
    training_piece,
)
from tests.helpers.problems import quiet

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = Schedule(epochs=1, batch_size=64, lr=0.1, weight_decay=5e-4)


def trained(cache: Cache) -> Trained:
    make = partial(DigitsResNet, 4, 1)
    return trained_network(make, 0, load_digits(0).test, SHORT, cache, quiet(), label="it")


def same(one: Trained, other: Trained) -> bool:
    states = (one.model.state_dict(), other.model.state_dict())
    return all(value.equal(states[1][name]) for name, value in states[0].items())


def test_a_network_that_was_trained_is_not_trained_again(tmp_path, monkeypatch):
    settings = StudySettings(out=tmp_path)
    first = trained(settings.open_cache())
    runs = []
    monkeypatch.setattr(weights, "train", lambda *_, **__: runs.append(1))
    again = trained(settings.open_cache())
    assert (first.cached, again.cached, runs) == (False, True, [])
    assert same(first, again)
    trained(StudySettings(out=tmp_path, force=True).open_cache())
    assert runs == [1]


def test_a_damaged_file_is_as_good_as_none(tmp_path):
    first = trained(Cache(tmp_path))
    first.file.write_bytes(first.file.read_bytes()[:100])
    again = trained(Cache(tmp_path))
    assert not again.cached
    assert same(first, again)
    assert load_weights(first.model, first.file)


def test_the_key_follows_what_decides_the_weights(tmp_path, keep_threads):
    def key(width=4, seed=0, split=0, threads=1, **changes) -> str:
        torch.set_num_threads(threads)
        torch.manual_seed(7)
        data = load_digits(split).train
        schedule = Schedule(**vars(SHORT) | changes)
        return training_piece(
            DigitsResNet(width, 1), seed, data, schedule, Cache(tmp_path)
        ).file.name

    keys = [key(), key(width=5), key(seed=1), key(split=1), key(threads=2), key(epochs=2)]
    keys += [key(lr=0.2), key(batch_size=32), key(weight_decay=0.0)]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_data_on_which_one_pixel_differs_is_other_data(tmp_path):
    model, data = DigitsResNet(4, 1), load_digits(0).test
    images = data.images.clone()
    images[3, 0, 4, 4] += 1e-3
    pieces = [
        training_piece(model, 0, split, SHORT, Cache(tmp_path))
        for split in (data, Split(images, data.labels))
    ]
    assert pieces[0] != pieces[1]


def test_weights_of_another_network_are_refused(tmp_path):
    save_weights(DigitsResNet(4, 1), tmp_path / "w")
    with pytest.raises(ValueError, match="another network"):
        load_weights(DigitsResNet(5, 1), tmp_path / "w")
    assert load_weights(DigitsResNet(4, 1), tmp_path / "none") is False
