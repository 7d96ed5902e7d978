"""The README's snippets run, in order, as a reader would type them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def yours() -> dict[str, object]:
    """What the snippets call yours: a model, its data, an optimizer, a loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    data = [(torch.randn(3, 12, 12), int(torch.randint(0, 10, ()))) for _ in range(200)]
    return {
        "model": model,
        "loader": DataLoader(data, batch_size=8, shuffle=True),
        "example": data[0][0][None],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "loss_fn": nn.functional.cross_entropy,
    }


def flops(model: nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 12, 12))
    return counter.get_total_flops()


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = yours()
    code = "import torch\nimport taylor_kernels as tk\n" + SNIPPETS[number]
    exec(compile(code, f"README.md, snippet {number + 1}", "exec"), names)
    assert all(p.isfinite().all() for p in names["model"].parameters())
    if "while not pruner.done" in SNIPPETS[number]:
        assert flops(names["model"]) <= 0.5 * flops(yours()["model"])
        widths = [m.out_channels for m in names["model"].modules() if isinstance(m, nn.Conv2d)]
        assert sum(widths) < 32
        assert "of the FLOPs left" in capsys.readouterr().out
