"""The README's snippets run, in order, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def yours() -> dict[str, object]:
    """What the snippets call yours: a model, its data, an optimizer, a loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    data = [(torch.randn(8, 3, 12, 12), torch.randint(0, 10, (8,))) for _ in range(400)]
    return {
        "model": model,
        "loader": data,
        "example": data[0][0],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "loss_fn": nn.functional.cross_entropy,
    }


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = yours()
    code = "import torch\nimport taylor_kernels as tk\n" + SNIPPETS[number]
    exec(compile(code, f"README.md, snippet {number + 1}", "exec"), names)
    assert all(p.isfinite().all() for p in names["model"].parameters())
