"""What a user can get wrong with `taylor-kernels compare` is said in one line."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", reason="compare needs SciPy")
pytest.importorskip("matplotlib", reason="compare needs matplotlib")

from taylor_kernels.cli import common
from tests.helpers.user_models import compare

pytestmark = pytest.mark.usefixtures("one_thread")

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
    "arguments": ("mynets:needs_arguments", "mynets:pairs", [], "wants arguments (width)"),
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
