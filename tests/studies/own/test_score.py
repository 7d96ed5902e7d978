"""`taylor-kernels score`: the scores are those of the criterion, and the files hold them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib", reason="score needs matplotlib")
pytest.importorskip("safetensors", reason="score needs safetensors")

from matplotlib.image import imread
from safetensors import safe_open
from safetensors.torch import load_file

from taylor_kernels.studies.own.parts import Minibatches
from tests.helpers.user_models import MODEL_AND_DATA, command

pytestmark = pytest.mark.usefixtures("one_thread")

SCORE = (*MODEL_AND_DATA, "--out", "out")


@pytest.fixture
def saved(folder):
    """A module whose model and minibatches are the same whenever they are asked for."""
    with open(folder / "mynets.py", "a") as file:
        file.write(
            "def same():\n"
            "    torch.manual_seed(3)\n"
            "    made = make_model()\n"
            "    made.one[1].running_var.uniform_(0.5, 2)\n"
            "    return made\n"
            "def those():\n"
            "    torch.manual_seed(4)\n"
            "    return [(torch.randn(7, 1, 6, 6), torch.randint(0, 4, (7,))) for _ in range(4)]\n"
        )
    return folder


@pytest.mark.usefixtures("weights_alone")
@pytest.mark.parametrize("criterion", ["taylor_fo", "magnitude_l2", "taylor_abs"])
def test_scores_are_those_of_the_criterion(criterion, saved, capsys):
    arguments = ("--model", "mynets:same", "--data", "mynets:those", "--batches", "3")
    code, _, err = command(
        capsys, "score", *arguments, "--criterion", criterion, "--out", "out", "--json"
    )
    assert code == 0, err
    got = load_file(saved / "out/scores.safetensors")
    mynets = sys.modules["mynets"]
    model, batches = mynets.same().double().eval(), mynets.those()[:3]
    model.one[0].weight.requires_grad_(True)  # it is frozen, and scored
    layers = {"one.0": model.one[0], "two.0": model.two[0], "head": model.head}
    rows = {name: [] for name in layers}
    for x, y in batches:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x.double()), y).backward()
        for name, layer in layers.items():
            products = (layer.weight * layer.weight.grad).detach().flatten(1)
            squares = layer.weight.detach().flatten(1).square()
            rows[name].append({
                "taylor_fo": products.square().sum(1),
                "taylor_abs": products.abs().sum(1),
                "magnitude_l2": squares.sum(1),
            }[criterion])  # fmt: skip
    for name, found in rows.items():
        expected = torch.stack(found).mean(0)
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-4, atol=1e-12)
        error = torch.stack(found).std(0) / 3**0.5
        if criterion != "magnitude_l2":  # of the weights alone there is one observation
            torch.testing.assert_close(
                got[f"{name}.standard_error"].double(), error, rtol=1e-2, atol=1e-9
            )
    with safe_open(saved / "out/scores.safetensors", "pt") as file:
        about = json.loads(file.metadata()["taylor_kernels.scores"])
    assert about["criterion"] == criterion


def test_tables_and_page_say_what_was_found(folder, capsys):
    code, out, err = command(capsys, "score", *SCORE, "--batches", "3")
    assert code == 0, err
    result = json.loads((folder / "out/result.json").read_text())
    assert {n: layer["filters"] for n, layer in result["layers"].items()} == {
        "one.0": 8, "two.0": 10, "head": 4
    }  # fmt: skip
    assert result["skipped"] == {"head": "reaches the output of the model"}
    assert result["minibatches"] == 3
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    scores = load_file(folder / "out/scores.safetensors")
    for name, layer in result["layers"].items():
        assert rows[name][1:3] == [str(layer["filters"]), f"{scores[name].min().item():.3g}"] or (
            name == "head"  # it has a row in the table of what stays, too
        )
    page = (folder / "out/report.html").read_text()
    assert "reaches the output of the model" in page
    assert imread(folder / "out/scores.png")[..., :3].std() > 0.02
    sizes = result["layers"].values()
    assert sum(layer["sum"] for layer in sizes) == pytest.approx(
        sum(v.sum().item() for n, v in scores.items() if not n.endswith("error")), rel=1e-4
    )


LOADERS = """
import numpy as np, random, torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset
from torch.utils.data import WeightedRandomSampler
class Noisy(Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, i):
        return torch.tensor([float(i), np.random.rand(), random.random(), torch.rand(()).item()])
rows = TensorDataset(torch.arange(12.0))
shuffled = lambda: DataLoader(Noisy(), batch_size=2, shuffle=True)
own = DataLoader(Noisy(), 3, shuffle=True, generator=torch.Generator())
weighted = lambda: DataLoader(rows, 2, sampler=WeightedRandomSampler(torch.ones(12), 12))
replaced = lambda: DataLoader(rows, 2, sampler=RandomSampler(rows, replacement=True))
stream = lambda: ((torch.randn(2), k) for k in range(5))
"""


@pytest.mark.parametrize("name", ["shuffled", "own", "weighted", "replaced", "stream"])
def test_an_epoch_is_the_same_from_the_middle_on(name, folder):
    (folder / "myloaders.py").write_text(LOADERS)
    sys.modules.pop("myloaders", None)
    kinds = dict(seed=5, limit=None, device=torch.device("cpu"))
    loader = Minibatches("--data", f"myloaders:{name}", **kinds)
    whole = [list(loader.epoch(number)) for number in range(3)]

    def same(one, other) -> bool:
        flat = torch.utils._pytree.tree_leaves
        return len(one) == len(other) and all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(flat(one), flat(other), strict=True)
        )

    assert not same([b for _, b in whole[0]], [b for _, b in whole[1]])
    again = Minibatches("--data", f"myloaders:{name}", **kinds)
    torch.manual_seed(99)
    for number in (2, 0, 1):
        torch.rand(3)  # what the run draws in between does not matter
        assert same(whole[number][2:], list(again.epoch(number, 2)))
    assert same(whole[1][:2], list(Minibatches("--data", f"myloaders:{name}", **(
        kinds | {"limit": 2})).epoch(1)))  # fmt: skip
    assert not same(
        whole[0], list(Minibatches("--data", f"myloaders:{name}", **(kinds | {"seed": 6})).epoch(0))
    )


@pytest.mark.usefixtures("weights_alone")
@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_float16_neither_loses_gradients_nor_overflows(size, saved, capsys, monkeypatch):
    from taylor_kernels.studies.own.settings import ScoreSettings

    with open(saved / "mynets.py", "a") as file:
        file.write(
            "def sized(outputs, targets):\n"
            f"    return {size} * nn.functional.cross_entropy(outputs.float(), targets)\n"
        )
    arguments = ("--model", "mynets:same", "--data", "mynets:those", "--loss", "mynets:sized",
                 "--batches", "2", "--criterion", "taylor_fo_bn")  # fmt: skip
    code, _, err = command(capsys, "score", *arguments, "--out", "single")
    assert code == 0, err
    monkeypatch.setattr(ScoreSettings, "amp_dtype", lambda self: torch.float16)
    code, _, err = command(capsys, "score", *arguments, "--out", "half")
    assert code == 0, err
    single, half = (load_file(saved / n / "scores.safetensors") for n in ("single", "half"))
    for name in ("one.0", "two.0"):
        assert half[name].isfinite().all()
        error = (half[name] - single[name]).abs().max() / single[name].max()
        assert error < 0.05, (name, error)


@pytest.mark.usefixtures("weights_alone")
def test_gradients_that_are_there_already_do_not_count(saved, capsys):
    with open(saved / "mynets.py", "a") as file:
        file.write(
            "def used():\n"
            "    made = same()\n"
            "    for parameter in made.parameters():\n"
            "        parameter.grad = torch.full_like(parameter, 10.0)\n"
            "    return made\n"
        )
    found = []
    for model in ("same", "used"):
        code, _, err = command(
            capsys, "score", "--model", f"mynets:{model}", "--data", "mynets:those", "--batches",
            "1", "--criterion", "taylor_fo", "--out", model,
        )  # fmt: skip
        assert code == 0, err
        found.append(load_file(saved / model / "scores.safetensors"))
    assert all(found[0][name].equal(found[1][name]) for name in ("one.0", "two.0", "head"))


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.tensor([float(i), torch.rand(()).item()])


@pytest.mark.parametrize("workers", [0, 1])
def test_parts_of_processes_have_one_order_and_noise_of_their_own(monkeypatch, workers):
    def load():
        return torch.utils.data.DataLoader(Noisy(), 4, shuffle=True, num_workers=workers)

    monkeypatch.setitem(sys.modules, "noisy", SimpleNamespace(load=load))
    kinds = {"seed": 0, "limit": None, "device": torch.device("cpu")}
    alone = [b for _, b in Minibatches("--data", "noisy:load", **kinds).epoch(1)]
    teams = [SimpleNamespace(rank=rank, size=2, first=not rank) for rank in range(2)]
    parts = [
        [b for _, b in Minibatches("--data", "noisy:load", **kinds).of_process(team).epoch(1)]
        for team in teams
    ]
    for whole, *ours in zip(alone, *parts, strict=True):
        assert sorted(torch.cat(ours)[:, 0].tolist()) == sorted(whole[:, 0].tolist())
        assert not set(ours[0][:, 1].tolist()) & set(ours[1][:, 1].tolist())
