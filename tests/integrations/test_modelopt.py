"""use_importance against Model-Optimizer itself: what its sorting, search and export keep."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.integrations.conftest import library

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of what it imports
]


@pytest.fixture(scope="module")
def mtn():
    library("modelopt")
    import modelopt.torch.nas as mtn

    return mtn


class Net(nn.Module):
    """Two layers that share a width, and two whose outputs are joined, which is not sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 6, 3)
        self.d = nn.Conv2d(8, 10, 3)
        self.last = nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(x)
        return self.last(torch.cat([self.c(x), self.d(x)], 1)).mean((2, 3))


X = (2, 3, 8, 8)
MODE = ("fastnas", {"nn.Conv2d": {"*": {"channels_ratio": (0.5, 1), "channel_divisor": 1}}})


def converted(mtn) -> Net:
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        return mtn.convert(Net(), [MODE])


def kept(before: Tensor, after: Tensor) -> set[int]:
    """Channels by their biases, which are all different."""
    return {i for i, value in enumerate(before) if (after == value).any()}


def best(scores: Tensor, count: int) -> set[int]:
    return set(scores.argsort(descending=True)[:count].tolist())


def test_its_sorting_keeps_the_channels_that_score_most(mtn):
    from modelopt.torch.nas.utils import sort_parameters

    from taylor_kernels.integrations.modelopt import use_importance

    for _ in range(3):
        model = converted(mtn)
        scores = {
            name: torch.rand(width) for name, width in zip("abcd", (8, 8, 6, 10), strict=True)
        }
        biases = {name: model.get_submodule(name).bias.detach().clone() for name in scores}
        assert use_importance(model, scores) == ["a", "b"]
        with contextlib.redirect_stdout(io.StringIO()):
            sort_parameters(model)
            model.a.get_hparam("out_channels").active = 4
            small = mtn.export(model)
        both = scores["a"] + scores["b"]
        assert kept(biases["a"], small.a.bias) == best(both, 4) == kept(biases["b"], small.b.bias)
        assert small(torch.randn(X)).shape == (2, 4)


def test_its_search_prunes_by_a_criterion_of_this_package(mtn, monkeypatch):
    """Its FLOPs come from a package that is not here; the constraint is on parameters."""
    from modelopt.torch.nas import algorithms

    from taylor_kernels.integrations.modelopt import use_importance

    monkeypatch.setattr(algorithms, "inference_flops", lambda *_, **__: 1.0)
    torch.manual_seed(0)
    model = Net()
    importance = tk.Importance(model, "taylor_fo_gate")
    model(torch.randn(X)).square().mean().backward()
    importance.update()
    importance.close()
    scores = importance.compute()
    bias = model.a.bias.detach().clone()
    size = sum(p.numel() for p in model.parameters())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model = mtn.convert(model, [MODE])
        use_importance(model, importance)
        config = {"score_func": lambda m: sum(p.numel() for p in m.parameters()) / size}
        config |= {"data_loader": [torch.randn(X)], "collect_func": lambda batch: batch}
        small, _ = mtn.search(model, {"params": "60%"}, torch.randn(X), config=config)
    assert sum(p.numel() for p in small.parameters()) <= 0.6 * size
    assert len(small.a.bias) < 8
    assert kept(bias, small.a.bias) == best(scores["a"] + scores["b"], len(small.a.bias))


def test_its_fault_is_mended_registered_scores_are_added_to_norms(mtn):
    """A channel whose score is 0 is kept for the norm of the weights that read it."""
    from taylor_kernels.integrations.modelopt import use_importance

    model = converted(mtn)
    with torch.no_grad():
        model.b.weight.zero_()
        model.c.weight.zero_()
        model.d.weight.zero_()
        model.d.weight[:, 0] = 1.0
    score = torch.tensor([0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75])
    width = model.a.get_hparam("out_channels")
    width.register_importance(lambda: score)
    assert width.importance.argmax() == 0
    use_importance(model, {"a": score})
    assert torch.equal(width.importance.argsort(), torch.arange(8))


def test_errors_change_nothing(mtn):
    from taylor_kernels.integrations.modelopt import use_importance

    with pytest.raises(ValueError, match=r"mtn\.convert"):
        use_importance(Net(), {"a": torch.rand(8)})
    model = converted(mtn)
    width = model.a.get_hparam("out_channels")
    before = list(width._importance_estimators)
    for scores, message in (
        ({"a": torch.rand(8), "b": torch.rand(5)}, "b has .*5.*, and 8 filters"),
        ({"c": torch.rand(6)}, "c belong to no width"),
        ({"a": torch.full((8,), torch.nan)}, "not all finite"),
        ({"x": torch.rand(8)}, "x belong to no width"),
        ({}, "none belong to no width"),
    ):
        with pytest.raises(ValueError, match=message):
            use_importance(model, scores)
    assert width._importance_estimators == before
