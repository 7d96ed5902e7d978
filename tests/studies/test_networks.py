"""What all studies stand on: data, networks, training, exported programs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the studies need scikit-learn")
pytest.importorskip("safetensors", reason="the studies need safetensors")

from taylor_kernels.studies import training
from taylor_kernels.studies.data import Split, load_digits, minibatches
from taylor_kernels.studies.export import export
from taylor_kernels.studies.networks import DigitsCnn, DigitsResNet
from taylor_kernels.studies.training import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_split_is_disjoint_complete_and_seeded():
    digits, again, other = load_digits(3), load_digits(3), load_digits(4)
    rows = torch.cat([digits.train_rows, digits.test_rows])
    assert torch.equal(rows.sort().values, torch.arange(1797))
    assert len(digits.test) == 449
    assert torch.equal(digits.train.images, again.train.images)
    assert torch.equal(digits.test_rows, again.test_rows)
    assert not torch.equal(digits.test_rows, other.test_rows)


def test_images_are_those_of_scikit_learn_normalised_by_the_training_split():
    from sklearn.datasets import load_digits as load

    digits = load_digits(0)
    assert digits.train.images.dtype == torch.float32
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert abs(digits.train.images.mean()) < 1e-5
    assert abs(digits.train.images.std() - 1) < 1e-5
    raw = torch.from_numpy(load().images)[digits.test_rows].unsqueeze(1)
    restored = digits.test.images * digits.std + digits.mean
    torch.testing.assert_close(restored.double(), raw, atol=1e-4, rtol=0)
    assert torch.equal(digits.test.labels, torch.from_numpy(load().target)[digits.test_rows])


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-9])
def test_split_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ValueError, match="test_fraction"):
        load_digits(0, fraction)


def test_minibatches_are_seeded_full_and_without_repeats():
    split = Split(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    first, again = (list(minibatches(split, 3, generator(5))) for _ in range(2))
    other = list(minibatches(split, 3, generator(6)))
    labels = torch.cat([label for _, label in first])
    assert [len(label) for _, label in first] == [3, 3, 3]
    assert labels.unique().numel() == 9
    assert torch.equal(labels, torch.cat([label for _, label in again]))
    assert not torch.equal(labels, torch.cat([label for _, label in other]))
    assert all(torch.equal(images.flatten(), label.float()) for images, label in first)


@pytest.mark.parametrize(("width", "blocks"), [(16, 2), (4, 1), (8, 3)])
def test_network_widths_and_shapes(width, blocks):
    model = DigitsResNet(width, blocks)
    widths = training.layer_widths(model)
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert model.blocks(model.stem(torch.randn(2, 1, 8, 8))).shape == (2, 4 * width, 2, 2)
    assert widths["stem.0"] == width
    assert [widths[f"blocks.{i}.conv2"] for i in range(3 * blocks)] == [
        width << stage for stage in range(3) for _ in range(blocks)
    ]
    shortcuts = [name for name in widths if "shortcut" in name]
    assert shortcuts == [f"blocks.{blocks}.shortcut.0", f"blocks.{2 * blocks}.shortcut.0"]


def test_the_plain_network_is_as_wide_as_it_says():
    widths = [m.weight.size(0) for m in DigitsCnn().modules() if hasattr(m, "kernel_size")
              and hasattr(m, "weight")]  # fmt: skip
    assert widths == [16, 32, 48]


@pytest.mark.parametrize("arguments", [(0, 1), (16, 0)])
def test_network_of_no_size_is_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        DigitsResNet(*arguments)


def test_evaluate_counts_in_eval_mode_and_puts_the_mode_back():
    data = load_digits(0).test
    model = nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(64, 10)).train()
    nn.init.zeros_(model[2].weight)
    model[2].bias.data = nn.functional.one_hot(torch.tensor(3), 10).float()
    assert training.evaluate(model, data) == (data.labels == 3).sum().item() / len(data)
    assert model.training


def test_flops_are_two_per_multiply_add():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 10))
    expected = 2 * (4 * 9 * 36 + 4 * 36 * 10)
    assert training.count_flops(model, torch.zeros(1, 1, 8, 8)) == expected
    assert training.count_parameters(model) == 36 + 1440 + 10


def test_latencies_time_every_model_alike():
    ran = []

    class Noted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            ran.append(self.name)
            return x

    times = training.latencies({n: Noted(n) for n in "ab"}, torch.zeros(1), repeats=4)
    assert "".join(ran[6:]) == "abbaabba"  # after three warm-up passes each
    for quartiles in times.values():
        assert 0 <= quartiles["q1"] <= quartiles["median"] <= quartiles["q3"]


def test_training_is_the_same_twice_and_learns():
    data = load_digits(0)
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DigitsResNet(4, 1)
        schedule = Schedule(epochs=2, batch_size=64, lr=0.1, weight_decay=0)
        training.train(model, data.train, schedule, generator=generator())
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    assert training.evaluate(model, data.test) > 0.8


def test_export_is_in_eval_mode_and_leaves_the_model_alone(tmp_path):
    model = DigitsResNet(4, 1).train()
    facts = export(model, tmp_path / "m.pt2")
    assert model.training
    assert facts["max_abs_difference"] < 1e-5
    program = torch.export.load(tmp_path / "m.pt2").module()
    images = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(program(images), model.eval()(images))
