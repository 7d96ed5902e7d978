"""`taylor-kernels language`: what it measures, that it goes on where it was, what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the study draws")
pytest.importorskip("safetensors", reason="the study keeps models")

import taylor_kernels as tk
from taylor_kernels.statistics import Random
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.language import findings, measure, settings
from taylor_kernels.studies.language.kinds import KINDS, Scoring, prune
from taylor_kernels.studies.language.measure import Cell, Measurement, Recipe
from taylor_kernels.studies.language.network import ByteLlama, Sizes
from taylor_kernels.studies.language.text import Text
from taylor_kernels.studies.language.training import Schedule, bits_per_byte, minibatches
from tests.helpers.problems import quiet
from tests.helpers.user_models import command

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(r"ignore:compact\(\) has put new parameters"),
]

#: More than half of the parameters are in the layers, so that these alone can reach any target.
SIZES = Sizes(width=20, hidden=80, layers=3, heads=4, groups=2, head_dim=4, context=24)
SCORED = Schedule(steps=0, lr=0.0, windows=2, length=12)
TINY = Recipe(
    sizes=SIZES,
    dense=Schedule(steps=6, lr=1e-2, windows=2, length=24),
    recovery=Schedule(steps=2, lr=1e-3, windows=2, length=24),
    scored=SCORED,
    scoring=Scoring(rounds=2, minibatches=1),
    judged=3,
    repeats=3,
)
CRITERIA = ("taylor_fo", "taylor_fo_gate", "magnitude_l2", "random")


def text() -> Text:
    data = torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(5))
    data = data.to(torch.uint8)
    return Text(data[:3000], data[3000:], 9, 1)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The command with a model of some thousand parameters, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "QUICK", TINY)
    return tmp_path


def units(model) -> dict[str, int]:
    """How many there are of each kind."""
    return {
        "feed-forward": sum(layer.feed_forward.gate.out_features for layer in model.layers),
        "heads": sum(layer.attention.key.out_features for layer in model.layers) // SIZES.head_dim,
        "width": model.embed.weight.size(1),
    }


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["feed-forward", "heads", "width"])
def test_a_kind_loses_its_fraction_and_the_others_nothing(kind, criterion):
    model = ByteLlama(SIZES)
    before = units(model)
    windows = minibatches(text().train, SCORED, 0)
    example = torch.zeros(2, 8, dtype=torch.int64)
    pruner, gone = prune(model, KINDS[kind], 0.5, criterion, example, windows, TINY.scoring)
    pruner.compact()
    assert units(model) == before | {kind: before[kind] // 2}
    assert gone == 0.5
    assert model(torch.zeros(1, 24, dtype=torch.int64)).shape == (1, 24, 256)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_blocks_go_by_number_and_all_by_parameters(criterion):
    windows = minibatches(text().train, SCORED, 0)
    example = torch.zeros(2, 8, dtype=torch.int64)
    model = ByteLlama(SIZES)
    whole = sum(p.numel() for p in model.parameters())
    before = units(model)
    pruner, gone = prune(model, KINDS["blocks"], 0.5, criterion, example, windows, TINY.scoring)
    assert gone == 0.5
    assert len(pruner.blocks) == 3
    pruner.compact()
    left = [m for m in model.modules() if type(m).__name__ in ("Attention", "FeedForward")]
    assert len(left) == 3
    assert model.embed.weight.size(1) == before["width"]
    model = ByteLlama(SIZES)
    pruner, gone = prune(model, KINDS["all"], 0.3, criterion, example, windows, TINY.scoring)
    pruner.compact()
    assert gone == pytest.approx(1 - sum(p.numel() for p in model.parameters()) / whole)
    assert gone >= 0.3


def test_criteria_of_weights_draw_no_minibatch():
    def none():
        raise AssertionError("a minibatch was drawn")
        yield

    example = torch.zeros(2, 8, dtype=torch.int64)
    for criterion in ("magnitude_l2", "random"):
        prune(ByteLlama(SIZES), KINDS["heads"], 0.5, criterion, example, none(), TINY.scoring)


def run(capsys, *arguments: str) -> tuple[dict, str, str]:
    code, out, err = command(capsys, "language", "--quick", *arguments)
    assert code == 0, err
    return json.loads(Path("runs/language/result.json").read_text()), out, err


def test_the_study_from_end_to_end(tiny, capsys):
    result, out, _ = run(capsys, "--draws", "2", "--fractions", "0.5")
    fractions = (0.5,)
    wanted = [
        (kind, fraction, criterion, draw)
        for kind, fraction, criterion in itertools.product(KINDS, fractions, CRITERIA)
        for draw in range(2 if criterion == "random" else 1)
    ]
    cells = result["cells"]
    assert [(c["kind"], c["fraction"], c["criterion"], c["draw"]) for c in cells] == wanted
    for cell in cells:
        assert cell["difference"] <= measure.SAME
        assert cell["parameters"] < result["dense"]["parameters"]
        assert 0 < cell["bits"] < 20
        assert 0 < cell["recovered"] < 20
    one, other = findings.chosen(result, "feed-forward", 0.5, "random")
    assert one["bits"] != other["bits"]  # other neurons have gone
    models = result["speed"]["models"]
    assert len(models) == 1 + len(KINDS) * len(fractions)
    for name, one in models.items():
        assert one["weights"] == 4 * one["parameters"]
        assert one["weights"] < one["forward"] < one["step"]
        if name != "dense":
            assert one["step"] < models["dense"]["step"]
            kind, fraction = name.rsplit(" ", 1)
            (cell,) = findings.chosen(result, kind, float(fraction), "taylor_fo")
            assert one["parameters"] == cell["parameters"]
    page = (tiny / "runs/language/report.html").read_text()
    for words in ("Perplexity against what is gone", "tokens/s", "feed-forward", "magnitude_l2"):
        assert words in page
    assert "trained on" in out
    assert (tiny / "runs/language/language.png").stat().st_size > 10_000


def test_a_kept_model_is_the_one_that_was_judged(tmp_path):
    measured = Measurement(text(), TINY, 3, Cache(tmp_path), quiet())
    dense, facts = measured.dense()
    windows = measured.windows(TINY.judged)
    assert facts["bits"] == pytest.approx(bits_per_byte(dense, windows), rel=1e-12)
    logits = dense(windows[:, :-1]).log_softmax(-1)
    each = logits.gather(-1, windows[:, 1:, None])
    assert facts["bits"] == pytest.approx(-each.mean().item() / math.log(2), rel=1e-5)
    for kind in KINDS:
        cell = Cell(kind, 0.5, "taylor_fo")
        found = measured.cell(dense, cell, keep=True)
        model = tk.load_pruned(measured.untrained(), measured.pruned_file(cell))
        assert sum(p.numel() for p in model.parameters()) == found["parameters"]
        assert bits_per_byte(model, windows) == pytest.approx(found["bits"], rel=1e-12)


def test_a_run_that_was_stopped_goes_on_to_the_same_result(tiny, capsys, monkeypatch):
    few = ("--kinds", "blocks", "--fractions", "0.5", "--draws", "3")
    whole, _, _ = run(capsys, *few)
    (tiny / "runs/language").rename(tiny / "runs/whole")
    calls = []
    plain = measure.prune

    def counted(*arguments):
        calls.append(arguments[1].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(measure, "prune", counted)
    code, _, err = command(capsys, "language", "--quick", *few)
    assert code == 130, err
    assert not (tiny / "runs/language/result.json").exists()
    again, _, _ = run(capsys, *few)
    assert len(calls) == 4 + 6 - 3  # all but the three that were finished

    def timeless(result):
        return [{k: v for k, v in cell.items() if k != "seconds"} for cell in result["cells"]]

    assert timeless(again) == timeless(whole)
    assert again["dense"] == whole["dense"]
    calls.clear()
    run(capsys, *few)
    assert not calls


def test_a_model_that_changes_when_it_is_cut_is_an_error(tmp_path, monkeypatch):
    measured = Measurement(text(), TINY, 0, Cache(tmp_path), quiet())
    dense, _ = measured.dense()
    exact = iter(
        (torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 1.0 + 1e-6], dtype=torch.float64))
    )
    monkeypatch.setattr(Measurement, "_exact", lambda self, model: next(exact))
    with pytest.raises(RuntimeError, match=r"heads 50%, random: logits differ by 1\.0e-06"):
        measured.cell(dense, Cell("heads", 0.5, "random"))
    assert not list(tmp_path.glob("cell-*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kinds", "neurons"], "--kinds: 'neurons' is not one of 'feed-forward', 'heads'"),
        (["--fractions", "50"], "--fractions: 50 is not in (0, 0.9]; 0.5 removes half; for 50%"),
        (["--fractions", "nan"], "--fractions: nan is not in (0, 0.9]"),
        (["--draws", "0"], "--draws: 0 is below 1"),
        (["--criteria", "taylor_f0"], "did you mean 'taylor_fo'"),
        (["--criteria", "taylor_so_diag"], "--criteria: 'taylor_so_diag' runs the model itself"),
        (["--criteria", "bn_scale"], "--criteria: 'bn_scale' reads gates of channels"),
        (["--seed", "-1"], "--seed: -1 is not between"),
    ],
)
def test_a_mistake_is_one_line(tiny, capsys, arguments, says):
    code, out, err = command(capsys, "language", *arguments)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert says in line
    assert not (tiny / "runs/language/result.json").exists()


def test_draws_are_others_under_another_seed():
    model = ByteLlama(SIZES)

    def drawn() -> torch.Tensor:
        importance = tk.Importance(model, "random")
        importance.update()
        scores = importance.compute()
        importance.close()
        return torch.cat(list(scores.values()))

    first = drawn()
    with Random.seeded(1):
        assert not torch.equal(drawn(), first)
    assert torch.equal(drawn(), first)
