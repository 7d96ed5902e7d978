"""`taylor-kernels compare` on a model and a loader of one's own, as a user would type it."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

pytest.importorskip("scipy", reason="compare needs SciPy")
pytest.importorskip("matplotlib", reason="compare needs matplotlib")

from matplotlib.image import imread
from scipy.stats import spearmanr

from taylor_kernels import cli
from taylor_kernels.cli import common

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        with open("calls", "a") as file:
            file.write(".")
        return self.head(self.two(self.one(x)).mean((2, 3)))

def make_model():
    model = Net()
    model.one[0].weight.requires_grad_(False)  # frozen layers are compared too
    return model

def make_loader():
    images, labels = torch.randn(60, 1, 6, 6), torch.randint(0, 4, (60,))
    return DataLoader(TensorDataset(images, labels), batch_size=12, shuffle=True)

model, pairs = make_model(), [(torch.randn(3, 1, 6, 6), torch.randint(0, 4, (3,)))]
headless, number = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), 3
nothing, single, triple = (lambda: []), (lambda: [torch.ones(3)]), (lambda: [(1, 2, 3)])
broken_loader = lambda: (1 / 0 for _ in range(3))
wide = lambda: [(torch.randn(3, 5, 6, 6), torch.randint(0, 4, (3,)))]
later_nan = lambda: pairs + [(pairs[0][0] * torch.nan, pairs[0][1])]
floats = lambda: [(torch.randn(3, 1, 6, 6), torch.randn(3))]

def regression(outputs, targets):
    return nn.functional.mse_loss(outputs, nn.functional.one_hot(targets, 4).float())
def vector(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")
def detached(outputs, targets):
    return nn.functional.cross_entropy(outputs.detach(), targets)
def infinite(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) / 0
def needs_arguments(width):
    return Net()
def raises():
    raise OSError("weights.pt is not there")
def exits():
    raise SystemExit(3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the user's module, imported anew for every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mynets.py").write_text(MODULE)
    (tmp_path / "faulty.py").write_text("import torch\nraise RuntimeError('no licence')\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit('usage: script.py')\n")
    (tmp_path / "needy.py").write_text("import a_library_that_is_not_there\n")
    yield tmp_path
    for name in ("mynets", "faulty", "script", "needy"):
        sys.modules.pop(name, None)


def compare(capsys, *arguments: str) -> tuple[int, str, str]:
    sys.modules.pop("mynets", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


MODEL_AND_DATA = ("--model", "mynets:make_model", "--data", "mynets:make_loader", "--batches", "3")
FEW = ("--criteria", "taylor_fo_bn", "--criteria", "magnitude_l2", "--criteria", "random")


def calls(folder) -> int:
    return len((folder / "calls").read_text())


@pytest.fixture
def compared(folder, capsys):
    """A whole run with every criterion: its result, its page and what it printed."""
    code, out, err = compare(capsys, *MODEL_AND_DATA, "--out", "out")
    assert code == 0, err
    result = json.loads((folder / "out/result.json").read_text())
    return result, (folder / "out/report.html").read_text(), out, err


def test_a_users_model_is_compared_whole(compared, folder):
    result, page, out, err = compared
    (network,) = result["networks"]
    assert network["widths"] == {"one.0": 8, "two.0": 10}
    assert result["settings"]["left_out"] == {"head": "its filters are the model's outputs"}
    assert "layer head is left out: its filters are the model's outputs" in err
    assert "Layers left out: <code>head</code>: its filters" in page
    assert "as it is by then, over 3 minibatches" in page
    assert network["oracle"]["filters"] == network["oracle"]["total"] == 18
    assert network["data"] == {
        "minibatches": 3, "minibatch": 12, "oracle_examples": 36, "test_examples": 36
    }  # fmt: skip
    rows = [line.split() for line in out.splitlines() if line.split()]
    for name in ("taylor_fo_bn", "taylor_so_diag", "obd_bn", "magnitude_l1", "random"):
        found = network["criteria"][name]
        assert -1 <= found["all"]["spearman"] <= 1
        assert found["one_shot"][0]["accuracy"] == network["dense"]["accuracy"]
        row = next(row for row in rows if row[0] == name)
        assert row[1] == f"{found['all']['spearman']:.3f}"
        assert f"<code>{name}</code>" in page or f">{name}<" in page
    for name in ("magnitude_l1", "magnitude_l2"):
        scaled, plain = (network["criteria"][n] for n in (name, f"{name}, unscaled"))
        ratios = np.divide(plain["scores"], scaled["scores"])
        assert np.ptp(ratios[:8]) < 1e-4 * ratios[0] > np.ptp(ratios[8:])  # two layers
        assert scaled["within"]["spearman"] == pytest.approx(plain["within"]["spearman"])
        assert abs(ratios[0] / ratios[8] - 1) > 1e-3
        changes = np.square(np.concatenate(list(network["oracle"]["changes"].values())))
        for one in (scaled, plain):  # the scores that are shown are those that are correlated
            found = spearmanr(one["scores"], changes).statistic
            assert found == pytest.approx(one["all"]["spearman"], abs=0.01)
    l2 = network["criteria"]["magnitude_l2, unscaled"]
    assert l2["rescored"] == l2["one_shot"]
    assert network["criteria"]["bn_scale"]["filters"] == 8  # where a BatchNorm follows
    assert "`bn_scale`" not in page
    assert "has a score for 8 of them" in page
    assert network["runtimes"]["forward + backward"]["ratio"] == 1
    assert "targets" not in result
    assert "NaN" not in (folder / "out/result.json").read_text()


def test_pages_and_plots_are_there_and_show_something(compared, folder):
    _, page, _, _ = compared
    for section in ("Agreement with the oracle", "Score against oracle", "Pruning curves"):
        assert section in page
    assert not re.search(r"https?://|url\(|@import", re.sub(r'"data:[^"]*"', "", page))
    for name in ("correlation.png", "score_against_oracle.png", "pruning_curves.png"):
        picture = imread(folder / "out" / name)[..., :3]
        assert picture.std() > 0.02
        drawn = (picture != picture[0, 0]).any(2)
        assert drawn.mean() > 0.02
        for half in (drawn[:, : drawn.shape[1] // 2], drawn[:, drawn.shape[1] // 2 :]):
            assert half.any()


def test_a_second_run_evaluates_next_to_nothing(folder, capsys):
    compare(capsys, *MODEL_AND_DATA, *FEW, "--out", "out")
    before, first = calls(folder), json.loads((folder / "out/result.json").read_text())
    compare(capsys, *MODEL_AND_DATA, *FEW, "--out", "out")
    # To try the model, to look for its outputs, and for the loss with all filters.
    again = calls(folder) - before
    assert again <= 10
    second = json.loads((folder / "out/result.json").read_text())
    assert first["networks"] == second["networks"]
    compare(capsys, *MODEL_AND_DATA, *FEW, "--out", "out", "--force")
    assert calls(folder) - before - again > 18 * 3


def test_another_loss_or_other_data_is_measured_anew(folder, capsys):
    compare(capsys, *MODEL_AND_DATA, *FEW, "--out", "out")
    first = json.loads((folder / "out/result.json").read_text())["networks"][0]
    for change in (["--loss", "mynets:regression"], ["--seed", "1"], ["--batches", "2"]):
        compare(capsys, *MODEL_AND_DATA, *FEW, "--out", "out", *change)
        other = json.loads((folder / "out/result.json").read_text())["networks"][0]
        assert other["oracle"]["changes"] != first["oracle"]["changes"], change


def test_a_sample_says_how_many(folder, capsys):
    code, out, err = compare(
        capsys, *MODEL_AND_DATA, *FEW, "--sample", "7", "--seed", "5", "--out", "out"
    )
    assert code == 0
    assert "the oracle removes 7 of 18 filters, chosen at random (seed 5)" in err
    assert "7 of 18 filters, chosen at random (seed 5)" in " ".join(out.split())
    assert "7 of 18 filters, chosen at random (seed 5)" in (folder / "out/report.html").read_text()
    network = json.loads((folder / "out/result.json").read_text())["networks"][0]
    known = [c for layer in network["oracle"]["changes"].values() for c in layer if c is not None]
    assert len(known) == 7
    assert "oracle" not in network["criteria"]  # it has no order of all filters


def test_a_loss_is_known_by_its_settings_too(folder, capsys):
    """Those of functools.partial and of loss modules are in the user's file alone, or beside it."""
    arguments = (*MODEL_AND_DATA, *FEW, "--loss", "mylosses:smooth", "--out", "out")
    found = []
    for amount in (0.1, 0.4):
        (folder / "settings.py").write_text(f"amount = {amount}\n")
        (folder / "mylosses.py").write_text(
            "from settings import amount\nfrom torch import nn\n"
            "smooth = nn.CrossEntropyLoss(label_smoothing=amount)\n"
        )
        code, _, err = compare(capsys, *arguments)
        assert code == 0, err
        network = json.loads((folder / "out/result.json").read_text())["networks"][0]
        found.append(network["oracle"]["changes"])
        for name in ("mylosses", "settings"):
            sys.modules.pop(name)
    assert found[0] != found[1]


@pytest.mark.parametrize("width", [1, 2, 15])
def test_layers_of_any_width_have_a_report(width, folder, capsys):
    with open(folder / "mynets.py", "a") as file:
        file.write(
            f"odd = nn.Sequential(nn.Flatten(), nn.Linear(36, {width}), nn.ReLU(), "
            f"nn.Linear({width}, 4))\n"
        )
    code, _, err = compare(
        capsys, "--model", "mynets:odd", "--data", "mynets:pairs", *FEW, "--out", "out"
    )
    assert code == 0, err
    curve = json.loads((folder / "out/result.json").read_text())["networks"][0]["criteria"][
        "magnitude_l2"
    ]["one_shot"]
    assert curve[-1]["removed"] == min(round(0.9 * width), width - 1)


def test_a_loss_that_is_no_number_later_on_says_where(folder, capsys):
    arguments = ("--model", "mynets:model", "--data", "mynets:later_nan", *FEW, "--out", "out")
    code, out, err = compare(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "error: --data: the loss is nan on minibatch 1" in err


def test_filters_without_which_there_is_no_loss_are_counted(folder, capsys):
    with open(folder / "mynets.py", "a") as file:
        file.write(
            "class Guarded(Net):\n"
            "    def forward(self, x):\n"
            "        y = self.one(x)\n"
            "        return Net.forward(self, x) / (y[:, 0].abs().sum() > 0)\n"
        )
    guarded = ("--model", "mynets:Guarded", "--data", "mynets:pairs")
    code, _, err = compare(capsys, *guarded, *FEW, "--out", "out")
    assert code == 0, err
    assert "without 1 of them, one at a time, the loss is not finite" in err
    network = json.loads((folder / "out/result.json").read_text())["networks"][0]
    assert network["oracle"]["changes"]["one.0"][0] is None
    assert network["oracle"]["not_finite"] == 1
    assert network["criteria"]["taylor_fo_bn"]["filters"] == 17
    page = (folder / "out/report.html").read_text()
    assert "Without some the loss is not finite: 17 are compared." in page


def test_the_threads_are_those_that_the_users_module_set(folder, capsys):
    with open(folder / "mynets.py", "a") as file:
        file.write("torch.set_num_threads(2)\n")
    compare(capsys, "--model", "mynets:model", "--data", "mynets:pairs", *FEW, "--out", "out")
    assert json.loads((folder / "out/result.json").read_text())["machine"]["threads"] == 2


def test_what_is_finished_needs_a_folder(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out/cache").write_text("")
    code, _, err = compare(capsys, *MODEL_AND_DATA, *FEW, "--out", "out")
    assert code == 2
    assert err.startswith("error: --out: cannot write to 'out/cache'")


def test_a_small_budget_takes_a_sample_and_leaves_curves_out(folder, capsys):
    code, _, err = compare(capsys, *MODEL_AND_DATA, *FEW, "--budget", "1e-6", "--out", "out")
    assert code == 0
    assert "2 of 18 filters" in err
    assert "no pruning curves, the budget is too small" in err
    assert "Pruning curves" not in (folder / "out/report.html").read_text()


def test_models_and_loaders_that_are_there_already_and_losses_without_accuracy(folder, capsys):
    code, _, err = compare(
        capsys,
        *("--model", "mynets:model", "--data", "mynets:pairs", "--loss", "mynets:regression"),
        *(*FEW, "--out", "out"),
    )
    assert code == 0, err
    network = json.loads((folder / "out/result.json").read_text())["networks"][0]
    assert network["data"]["minibatches"] == 1


MISTAKES = {
    "no path": ("mynets", "mynets:make_loader", [], "is not an import path"),
    "no module": ("mynet:model", "mynets:pairs", [], "there is no module 'mynet'"),
    "no submodule": ("mynets.a:b", "mynets:pairs", [], "there is no module 'mynets.a'"),
    "no attribute": ("mynets:make_mdel", "mynets:pairs", [], "did you mean 'make_model'"),
    "import fails": ("faulty:model", "mynets:pairs", [], "no licence (", "faulty.py, line 2"),
    "import needs": ("needy:model", "mynets:pairs", [], "No module named 'a_library_that_is_not"),
    "import exits": ("script:model", "mynets:pairs", [], "SystemExit: usage", "script.py, line 2"),
    "no part": ("mynets:number.foo", "mynets:pairs", [], "mynets has no 'number.foo'"),
    "exits": ("mynets:exits", "mynets:pairs", [], "mynets:exits() raised SystemExit: 3"),
    "no model": ("mynets:number", "mynets:pairs", [], "is a int, neither a torch.nn.Module"),
    "makes none": ("mynets:nothing", "mynets:pairs", [], "gave a list, not a torch.nn.Module"),
    "arguments": ("mynets:needs_arguments", "mynets:pairs", [], "missing 1 required"),
    "raises": ("mynets:raises", "mynets:pairs", [], "OSError: weights.pt is not there"),
    "no layers": ("mynets:headless", "mynets:pairs", [], "it has no layer whose filters can be"),
    "no loader": ("mynets:model", "mynets:number", [], "--data: mynets:number gave a int"),
    "empty": ("mynets:model", "mynets:nothing", [], "yields no minibatch"),
    "no pair": ("mynets:model", "mynets:single", [], "minibatch 0 of mynets:single is a Tensor"),
    "three": ("mynets:model", "mynets:triple", [], "is a tuple of 3, not a pair"),
    "loader fails": ("mynets:model", "mynets:broken_loader", [], "ZeroDivisionError"),
    "wrong shape": ("mynets:model", "mynets:wide", [], "--model: the model, on the first"),
    "wrong loss": ("mynets:model", "mynets:floats", [], "cross_entropy; give another one with"),
    "no scalar": ("mynets:model", "mynets:pairs", ["--loss", "mynets:vector"], "shape (3,)"),
    "detached": ("mynets:model", "mynets:pairs", ["--loss", "mynets:detached"], "do not detach"),
    "infinite": ("mynets:model", "mynets:pairs", ["--loss", "mynets:infinite"], "it is inf on"),
    "no loss": ("mynets:model", "mynets:pairs", ["--loss", "mynets:number"], "not a function"),
    "criterion": ("mynets:model", "mynets:pairs", ["--criteria", "taylor_bn"], "'taylor_fo_bn'"),
    "oracle alone": ("mynets:model", "mynets:pairs", ["--criteria", "oracle"], "name another"),
    "sample": ("mynets:model", "mynets:pairs", ["--sample", "0"], "--sample: 0 is below 1"),
    "batches": ("mynets:model", "mynets:pairs", ["--batches", "0"], "--batches: 0 is below 1"),
    "budget": ("mynets:model", "mynets:pairs", ["--budget", "nan"], "--budget: nan is not a"),
    "device": ("mynets:model", "mynets:pairs", ["--device", "tpu"], "use auto, cpu or cuda"),
    "quick": ("mynets:model", "mynets:pairs", ["--quick"], "use --sample and --batches"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, folder, capsys):
    model, data, more, *says = MISTAKES[name]
    code, out, err = compare(capsys, "--model", model, "--data", data, *more, "--out", "out")
    assert code == 2
    assert out == ""
    assert err.startswith("error: --")
    assert err.count("\n") == 1
    assert all(part in err for part in says), err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "mynets:model"], "--model: needs --data beside it"),
        (["--data", "mynets:pairs"], "--data: needs --model beside it"),
        (["--loss", "mynets:regression"], "--loss: is for --model and --data"),
    ],
)
def test_options_that_belong_together_say_so(arguments, says, folder, capsys):
    code, _, err = compare(capsys, *arguments, "--out", "out")
    assert code == 2
    assert says in err


def test_a_named_criterion_that_does_not_apply_is_an_error_and_else_a_note(folder, capsys):
    plain = ("--model", "mynets:plain", "--data", "mynets:pairs", "--out", "out")
    with open(folder / "mynets.py", "a") as file:
        file.write(
            "plain = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))\n"
        )
    code, _, err = compare(capsys, *plain, "--criteria", "bn_scale")
    assert code == 2
    assert "error: --criteria: bn_scale cannot score this model; " in err
    code, out, err = compare(capsys, *plain)
    assert code == 0
    assert "bn_scale is left out; " in err
    assert not any(line.split()[:1] == ["bn_scale"] for line in out.splitlines())
    assert "bn_scale" in (folder / "out/report.html").read_text()


def test_what_compare_needs_is_named_if_it_is_missing(capsys, monkeypatch):
    find = common.importlib.util.find_spec
    monkeypatch.setattr(
        common.importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name)
    )
    code, _, err = compare(capsys)
    assert code == 2
    assert err == "error: scipy not installed; pip install 'taylor-kernels[demo]'\n"
