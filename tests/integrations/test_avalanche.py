"""EWCPlugin against Avalanche's own at batch size 1, which is the Fisher diagonal."""

from __future__ import annotations

import inspect
import runpy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("avalanche", "one_thread")
N = 23


class Net(nn.Module):
    """Every kind of parameter: an embedding, a convolution, norms, a frozen and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 3)
        self.frozen = nn.Linear(3, 3)
        self.unused = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(x).transpose(1, 2)))
        return self.frozen(self.fc(self.last(x.relu().mean(2))))


def problem() -> tuple[nn.Module, TensorDataset, torch.optim.Optimizer]:
    model = Net().double()
    data = TensorDataset(
        torch.randint(0, 9, (N, 5)), torch.randint(0, 3, (N,)), torch.zeros(N, dtype=torch.int64)
    )
    model(data.tensors[0])  # running statistics
    return model, data, torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_importances_are_those_of_batch_size_1(batch_size, reduction):
    from avalanche.training.plugins import EWCPlugin as Theirs

    from taylor_kernels.integrations.avalanche import EWCPlugin as Ours

    model, data, optimizer = problem()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    expected = Theirs(1.0).compute_importances(model, criterion, optimizer, data, "cpu", 1)
    found = Ours(1.0).compute_importances(model, criterion, optimizer, data, "cpu", batch_size)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, want in expected.items():
        assert type(found[name]) is type(want)
        atol = 1e-5 * want.data.max().item()
        torch.testing.assert_close(found[name].data, want.data, rtol=1e-5, atol=atol, msg=name)
    assert expected["embed.weight"].data.any()
    assert all(module.training for module in model.modules())


def test_its_fault_is_mended_squares_of_the_minibatch_mean():
    """Two examples whose gradients cancel: Avalanche finds that nothing matters."""
    from avalanche.training.plugins import EWCPlugin as Theirs

    from taylor_kernels.integrations.avalanche import EWCPlugin as Ours

    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    data = TensorDataset(
        torch.ones(2, 1, dtype=torch.float64),
        torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
        torch.zeros(2, dtype=torch.int64),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    arguments = (model, nn.MSELoss(), optimizer, data, "cpu", 2)
    assert Theirs(1.0).compute_importances(*arguments)["weight"].data.item() == 0
    assert Ours(1.0).compute_importances(*arguments)["weight"].data.item() == pytest.approx(4)


def test_squares_of_a_half_precision_model_do_not_vanish():
    """In float16 a gradient of 1e-5 squared is 0."""
    from taylor_kernels.integrations.avalanche import EWCPlugin

    model = nn.Linear(4, 2, bias=False).half()
    x = torch.randn(6, 4).half()
    data = TensorDataset(x, torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def small(output, y):
        return 1e-5 * output.float().sum(1).mean()

    found = EWCPlugin(1.0).compute_importances(model, small, optimizer, data, "cpu", 3)
    want = (1e-5 * x.double()).square().mean(0).expand(2, 4)
    torch.testing.assert_close(found["weight"].data.double(), want, rtol=0.02, atol=0)


def test_its_constructor_and_its_class_are_those_of_avalanche():
    from avalanche.training.plugins import EWCPlugin as Theirs

    from taylor_kernels.integrations.avalanche import EWCPlugin as Ours

    assert inspect.signature(Ours) == inspect.signature(Theirs)
    assert isinstance(Ours(1.0, mode="online", decay_factor=0.9), Theirs)
    names = [[*inspect.signature(c.compute_importances).parameters] for c in (Ours, Theirs)]
    assert names[0] == names[1]


def test_wrong_criteria_and_models_without_trained_parameters():
    from taylor_kernels.integrations.avalanche import EWCPlugin

    model, data, optimizer = problem()
    with pytest.raises(ValueError, match="reduction='none'"):
        EWCPlugin(1.0).compute_importances(
            model, nn.CrossEntropyLoss(reduction="none"), optimizer, data, "cpu", 4
        )
    model.requires_grad_(False)
    found = EWCPlugin(1.0).compute_importances(
        model, nn.CrossEntropyLoss(), optimizer, data, "cpu", 4
    )
    assert not any(value.data.any() for value in found.values())


def test_the_example_remembers(capsys):
    runpy.run_path(str(ROOT / "examples/continual_digits.py"))
    shares = [float(word) for word in capsys.readouterr().out.split(":")[-1].split()]
    assert len(shares) == 5
    assert min(shares) >= 0.4
    assert sum(shares) / 5 > 0.6
