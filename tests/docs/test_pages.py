"""README.md and docs/ are true: their code runs as it stands, their links and blocks hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from tests.helpers import ROOT
from tests.helpers.programs import run_module
from tests.integrations.conftest import library
from tools import docs_picture, language_picture

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def snippets(page: Path) -> list[str]:
    return SNIPPET.findall(page.read_text())


def run(page: Path, **given: object) -> dict[str, object]:
    """A page's snippets, one after the other, from what is given: what they have defined."""
    namespace: dict[str, object] = {"__name__": "__main__", **given}
    for number, code in enumerate(snippets(page), 1):
        exec(compile(code, f"{name_of(page)}, snippet {number}", "exec"), namespace)
    return namespace


#: These have tests of their own: the README's loop needs a model, what comes of the front page's is
#: looked at, and Avalanche's takes a library.
ELSEWHERE = ("README.md", "docs/index.md", "docs/avalanche.md")
RUN = [page for page in PAGES if snippets(page) and name_of(page) not in ELSEWHERE]
#: Libraries that no requirement of the tests names.
NEEDS = {
    "docs/modelopt.md": ["modelopt"],
    "docs/trainers.md": ["accelerate", "lightning", "transformers"],
}


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_snippets_run_as_they_stand(page, tmp_path, monkeypatch):
    for needed in NEEDS.get(name_of(page), ()):
        library(needed)
    monkeypatch.chdir(tmp_path)
    names = run(page)
    models = [value for value in names.values() if isinstance(value, nn.Module)]
    assert all(p.isfinite().all() for model in models for p in model.parameters())


def test_the_loop_of_the_readme_prunes_the_model_of_a_script():
    """One snippet, which takes what every training script has."""
    assert len(snippets(ROOT / "README.md")) == 1
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)]
    model = nn.Sequential(*layers)
    images, labels = torch.randn(40, 1, 6, 6), torch.randint(3, (40,))
    given = {
        "model": model,
        "images": images,
        "loader": list(zip(images.split(8), labels.split(8), strict=True)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "cross_entropy": nn.functional.cross_entropy,
    }
    pruner = run(ROOT / "README.md", **given)["pruner"]
    assert pruner.cost.flops <= 0.5 * pruner.whole.flops
    assert pruner.cost.params == sum(p.numel() for p in model.parameters())


def test_the_front_page_prunes_a_network_that_still_reads(tmp_path, monkeypatch, capsys):
    """One snippet, whole: half of the FLOPs are gone, and most digits are still told apart."""
    monkeypatch.chdir(tmp_path)
    assert len(snippets(ROOT / "docs/index.md")) == 1
    names = run(ROOT / "docs/index.md")
    pruner = names["pruner"]
    assert pruner.cost.flops <= 0.5 * pruner.whole.flops
    assert (tmp_path / "pruned.pt").exists()
    accuracies = re.findall(r"(dense|pruned): ([\d.]+)% right", capsys.readouterr().out)
    assert [name for name, _ in accuracies] == ["dense", "pruned"]
    assert all(float(accuracy) > 90 for _, accuracy in accuracies), accuracies


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    for target in targets:
        if not re.match(r"[a-z]+:", target):
            path = target.split("#")[0]
            assert not path or (page.parent / path).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_files_exist(page):
    text = page.read_text()
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= made
    for path in re.findall(r"`((?:bench|docs|examples|tools|csrc)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_blocks_are_what_their_sources_give():
    """In a process of its own: other tests register criteria."""
    found = run_module("tools.docs_blocks", "--check")
    assert found.returncode == 0, f"{found.stderr}run python -m tools.docs_blocks"


def test_the_picture_is_of_the_kept_study():
    found = docs_picture.curves(json.loads(docs_picture.SOURCE.read_text()))
    for theme in docs_picture.THEMES:
        mark = f"<!-- figures: {docs_picture.digest(found)} -->"
        assert mark in docs_picture.path(theme).read_text(), "run python -m tools.docs_picture"


def test_the_picture_is_of_the_kept_language_models():
    for theme in language_picture.THEMES:
        text = language_picture.path(theme).read_text()
        assert language_picture.mark(language_picture.kept()) in text, (
            "run python -m tools.language_picture"
        )


def test_every_public_name_has_its_place_in_the_reference():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    listed = re.findall(r"^::: taylor_kernels\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(tk.__all__)
