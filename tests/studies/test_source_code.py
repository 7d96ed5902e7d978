"""A kept figure's key changes with the code that computes it, and with no other."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="compare needs SciPy")
pytest.importorskip("sklearn", reason="the studies need scikit-learn")

import taylor_kernels as tk
from taylor_kernels.studies import source_code, training
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.data import load_digits
from taylor_kernels.studies.networks import DigitsResNet
from taylor_kernels.studies.oracle import curves, digits, oracle, scores
from taylor_kernels.studies.oracle.measure import identity
from taylor_kernels.studies.source_code import code_digest, deciding_files, imported_files
from taylor_kernels.studies.training import Schedule
from taylor_kernels.studies.weights import trained_network
from tests.helpers.problems import quiet, small_problem

pytestmark = pytest.mark.usefixtures("one_thread")

#: What each kind of piece is computed by.
BY = {
    "network": [trained_network, DigitsResNet(2, 1)],
    "oracle": [oracle.loss_changes],
    "scores": [scores.score],
    "one_shot": [curves.mean_one_shot],
    "rescored": [curves.rescored],
    "finetuned": [curves.rescored, digits.fine_tune],
    "runtimes": [scores.timings],
}
#: Runs while figures are computed, and decides none: bars on the terminal, and the cache.
SHOWN_OR_KEPT = {
    f"studies/{name}.py" for name in ("progress", "cache", "source_code", "digest")
} | {"files.py"}
#: What no figure depends on.
BESIDE = (
    "cli", "system.py", "studies/report.py", "studies/results.py", "studies/plotting.py",
    "studies/progress.py", "studies/options.py", "studies/settings.py", "studies/export.py",
    "studies/pruning", "studies/oracle/pages.py", "studies/oracle/plots.py",
    "studies/oracle/tables.py", "studies/oracle/findings.py", "studies/oracle/remarks.py",
    "studies/oracle/settings.py", "pruning/pruner.py", "pruning/saving/checkpoint.py",
)  # fmt: skip


def names(files) -> set[str]:
    return {file.relative_to(source_code.ROOT).as_posix() for file in files}


@pytest.fixture(scope="module")
def copy_of_sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources") / "taylor_kernels"
    shutil.copytree(source_code.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def keys_before(copy_of_sources) -> dict[str, str]:
    """The keys of the copy as it is, which takes a second."""
    with read_from(copy_of_sources):
        return keys()


@pytest.fixture
def copied(copy_of_sources) -> Iterator[Path]:
    """A copy of the package's sources, which the keys are made of."""
    with read_from(copy_of_sources):
        yield copy_of_sources


@contextmanager
def read_from(root: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_code, "ROOT", root)
        imported_files.cache_clear()
        yield
        imported_files.cache_clear()


def keys() -> dict[str, str]:
    """Kind of a piece -> the key of its code."""
    return {kind: code_digest(*by) for kind, by in BY.items()}


def keys_with(*changed: Path) -> dict[str, str]:
    """The same while these files have another byte, at which nothing is imported."""
    before = [file.read_bytes() for file in changed]
    try:
        for file, content in zip(changed, before, strict=True):
            file.write_bytes(content + b"\n")
        return keys()
    finally:
        for file, content in zip(changed, before, strict=True):
            file.write_bytes(content)


@pytest.mark.parametrize(
    ("module", "changed"),
    [
        ("studies/data.py", ["network", "finetuned"]),
        ("studies/training.py", ["network", "finetuned"]),
        ("studies/networks.py", ["network", "finetuned"]),
        ("statistics/loss_change.py", [kind for kind in BY if kind != "network"]),
        ("studies/oracle/curves.py", ["one_shot", "rescored", "finetuned"]),
        ("criteria/*.py", ["scores", "one_shot", "rescored", "finetuned", "runtimes"]),
        ("backends/native.py", ["scores", "one_shot", "rescored", "finetuned", "runtimes"]),
        ("_native.*.so", ["scores", "one_shot", "rescored", "finetuned", "runtimes"]),
    ],
)
def test_a_byte_of_what_decides_a_figure_is_another_key(copied, keys_before, module, changed):
    if module.startswith("_native") and not list(copied.glob(module)):
        pytest.skip("the native module is not built")
    files = sorted(copied.glob(module))
    assert files
    after = keys_with(*files)
    assert [kind for kind in BY if keys_before[kind] != after[kind]] == changed


def test_no_byte_of_a_page_a_plot_or_a_command_is_another_key(copied, keys_before):
    files = []
    for name in BESIDE:
        path = copied / name
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        assert found
        files += found
    assert keys_with(*files) == keys_before


def code_that_runs(function) -> set[str]:
    """The files of this package of which anything is called while a function runs."""
    seen: set[str] = set()

    def note(frame, event, _):
        if event == "call":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    root = str(source_code.ROOT) + os.sep
    return names(Path(file) for file in seen if file.startswith(root))


def test_all_code_that_runs_while_a_figure_is_computed_is_in_its_key(tmp_path, monkeypatch):
    """Whatever way it was reached: by an import inside a function, or by a name."""
    # Pruners of other tests that live on would run at every optimizer's step.
    optimizers = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizers, "_global_optimizer_post_hooks", OrderedDict())
    problem, log, cache = small_problem(), quiet(), Cache(tmp_path)
    settings, schedule = identity(problem), Schedule(1, 64, 0.1, 0.0)
    data = load_digits(0).test
    scored = [name for name in tk.criterion_names() if name not in ("oracle", "random")]
    runs = {
        "network": lambda: trained_network(
            lambda: DigitsResNet(2, 1), 0, data, schedule, cache, log, label="it"
        ),
        "oracle": lambda: oracle.loss_changes(problem, problem.filters, settings, cache, log),
        "scores": lambda: [scores.score(problem, name) for name in scored],
        "rescored": lambda: curves.rescored(problem, "taylor_fo_bn", [3, 9]),
        "finetuned": lambda: training.train(
            DigitsResNet(2, 1), data, schedule, generator=torch.Generator().manual_seed(0)
        ),
        "runtimes": lambda: scores.timings(problem, scored, log, rounds=1, seconds=9),
    }
    for kind, function in runs.items():
        known = names(deciding_files(*BY[kind]))
        ran = code_that_runs(function)
        assert len(ran) > 1
        assert not ran - known - SHOWN_OR_KEPT, kind


def test_imports_for_type_checking_do_not_count(copied):
    file = copied / "studies" / "probe.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from taylor_kernels.studies.report import Table\n"
        "else:\n    from taylor_kernels.studies import digest\n"
        "def inside():\n    import taylor_kernels.labels\n"
        "    from importlib import import_module\n"
        "    import_module('taylor_kernels.files')\n"
        "    from ..studies.data import Split\n"
    )
    found = names(imported_files("taylor_kernels.studies.probe"))
    assert found == {
        "studies/probe.py", "studies/digest.py", "labels.py", "files.py", "studies/data.py",
    }  # fmt: skip


def test_a_users_file_brings_what_it_imports(tmp_path, monkeypatch):
    """One through another, in packages and out of them; not what is installed."""
    (tmp_path / "users_parts").mkdir()
    sources = {
        "users_net.py": "import json\nimport torch\nfrom users_parts.layers import WIDTH\n"
        "class Net(torch.nn.Module):\n    pass\n",
        "users_parts/__init__.py": "",
        "users_parts/layers.py": "from . import sizes\nWIDTH = sizes.WIDTH\n",
        "users_parts/sizes.py": "WIDTH = 3\n",
        "users_loss.py": "def loss(outputs, targets):\n    return 0\n",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    net, loss = importlib.import_module("users_net"), importlib.import_module("users_loss")
    files = {tmp_path / name for name in sources}
    assert deciding_files(net.Net()) == files - {tmp_path / "users_loss.py"}
    assert deciding_files(partial(print, loss=loss.loss, model=net.Net())) == files
    before = code_digest(net.Net())
    (tmp_path / "users_parts/sizes.py").write_text("WIDTH = 4\n")
    assert code_digest(net.Net()) != before


def test_pytorch_stands_for_its_version():
    class Own(nn.Module):
        pass

    assert Path(__file__) in deciding_files(nn.Sequential(Own(), nn.ReLU()))
    assert deciding_files(nn.functional.cross_entropy, torch.sum) == set()
    assert Path(__file__) in deciding_files(partial(lambda scores: scores))
