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

from taylor_kernels.studies.oracle import pages
from taylor_kernels.studies.report import Text
from tests.helpers.samples import some
from tests.helpers.user_models import FEW, MODEL_AND_DATA, compare

pytestmark = pytest.mark.usefixtures("one_thread")


def calls(folder) -> int:
    return len((folder / "calls").read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """No drawings, which take longer than a small run: where a test is of something else."""
    monkeypatch.setattr(pages, "draw", lambda *_, **__: Text("not in this test"))


def test_a_users_model_is_compared_whole(folder, capsys):
    code, out, err = compare(capsys, *MODEL_AND_DATA, "--out", "out")  # with every criterion
    assert code == 0, err
    result = json.loads((folder / "out/result.json").read_text())
    page = (folder / "out/report.html").read_text()
    check_page_and_plots(page, folder)
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


def check_page_and_plots(page, folder):
    """They are there and show something."""
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


def test_a_second_run_evaluates_next_to_nothing(folder, capsys, undrawn):
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


def test_another_loss_or_other_data_is_measured_anew(folder, capsys, undrawn):
    compare(capsys, *MODEL_AND_DATA, *FEW, "--out", "out")
    first = json.loads((folder / "out/result.json").read_text())["networks"][0]
    for change in (["--loss", "mynets:regression"], ["--seed", "1"], ["--batches", "2"]):
        compare(capsys, *MODEL_AND_DATA, *FEW, "--out", "out", *change)
        other = json.loads((folder / "out/result.json").read_text())["networks"][0]
        assert other["oracle"]["changes"] != first["oracle"]["changes"], change


def test_a_sample_says_how_many(folder, capsys, undrawn):
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


def test_a_loss_is_known_by_its_settings_too(folder, capsys, undrawn):
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


@pytest.mark.parametrize("width", some([1, 2, 15], 1))
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


def test_filters_without_which_there_is_no_loss_are_counted(folder, capsys, undrawn):
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


def test_the_threads_are_those_that_the_users_module_set(folder, capsys, undrawn):
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


def test_a_small_budget_takes_a_sample_and_leaves_curves_out(folder, capsys, undrawn):
    code, _, err = compare(capsys, *MODEL_AND_DATA, *FEW, "--budget", "1e-6", "--out", "out")
    assert code == 0
    assert "2 of 18 filters" in err
    assert "no pruning curves, the budget is too small" in err
    assert "Pruning curves" not in (folder / "out/report.html").read_text()


def test_models_and_loaders_that_are_there_already_and_losses_without_accuracy(
    folder, capsys, undrawn
):
    code, _, err = compare(
        capsys,
        *("--model", "mynets:model", "--data", "mynets:pairs", "--loss", "mynets:regression"),
        *(*FEW, "--out", "out"),
    )
    assert code == 0, err
    network = json.loads((folder / "out/result.json").read_text())["networks"][0]
    assert network["data"]["minibatches"] == 1
