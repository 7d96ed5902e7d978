"""Processes that torchrun starts prune a model of the user's as one process does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("matplotlib", reason="prune needs matplotlib")
pytest.importorskip("safetensors", reason="prune needs safetensors")

from safetensors.torch import load_file

from taylor_kernels import cli
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.own import processes
from taylor_kernels.studies.own.processes import check_alone
from tests.distributed.launch import outcomes, ran
from tests.helpers import ROOT
from tests.helpers.user_models import command

pytestmark = pytest.mark.usefixtures("one_thread", "weights_alone")

#: Seconds that torchrun may take, the imports of its processes on a busy machine among them.
LIMIT = 150
MODULE = """
import os, signal
class Plain(nn.Module):
    calls = 0
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(10, 4)
        self.idle = nn.Linear(3, 3)
        self.scale = 1.5
    def forward(self, x):
        Plain.calls += self.training and torch.is_grad_enabled()
        if os.environ.get("STOP") == f"{os.environ.get('RANK')} {Plain.calls}":
            os.kill(os.getpid(), getattr(signal, os.environ.pop("SIGNAL")))
        return self.head(self.two(self.one(x)).mean((2, 3)))
def forward(model, batch):  # an attribute of the model, inside whatever it is
    return nn.functional.cross_entropy(model(batch[0]) * model.scale, batch[1])
class Skipping(Plain):  # a layer at random, on each process another time
    def __init__(self):
        super().__init__()
        self.extra = nn.Conv2d(10, 10, 3, padding=1)
        del self.idle
    def forward(self, x):
        x = self.two(self.one(x))
        if not self.training or torch.rand(()) < 0.5:
            x = x + self.extra(x)
        return self.head(x.mean((2, 3)))
odd = lambda: DataLoader(TensorDataset(torch.randn(60, 1, 6, 6), torch.zeros(60).long()), 15)
def own(rank, world_size):  # of which the second has a minibatch less
    return [(torch.randn(6, 1, 6, 6) + rank, torch.randint(0, 4, (6,))) for _ in range(5 - rank)]
def val(rank, world_size):  # all of which every process judges on
    return own(rank, world_size) if (rank, world_size) == (0, 1) else 1 / 0
def missing(rank, world_size):
    if rank:
        raise OSError("shard-1.tar is not there")
    return own(rank, world_size)
def sampled():
    data = make_loader().dataset
    return DataLoader(data, 15, sampler=torch.utils.data.DistributedSampler(data))
"""
PRUNE = ("--model", "mynets:Plain", "--data", "mynets:make_loader", "--batches", "3",
         "--forward", "mynets:forward", "--flops", "0.6", "--epochs", "2", "--finetune", "1",
         "--lr", "0.02")  # fmt: skip


def leave_out_what_takes_seconds():
    """No drawings and no exports."""
    from taylor_kernels.studies.own import artifacts, pages
    from taylor_kernels.studies.report import Text

    def refuse(*_):
        raise RuntimeError("not in this test")

    pages.draw = lambda *_, **__: Text("not in this test")
    artifacts.exported = refuse


def in_process(rank, size, folder, ports, commands, stop=None):
    """Exit code and what was said of commands, each as torchrun starts it; a port has the store at
    which the processes meet for it."""
    leave_out_what_takes_seconds()
    dist.destroy_process_group()
    os.chdir(folder)
    if stop is not None:
        os.environ["STOP"], os.environ["SIGNAL"] = stop
    found = []
    for number, arguments in enumerate(commands):
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[number]),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        sys.modules.pop("mynets", None)
        said, complained, code = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            try:
                cli.main([arguments[0], "--device", "cpu", *arguments[1:]])
            except SystemExit as end:
                code = end.code
        found.append((code, said.getvalue(), complained.getvalue()))
    return found


def in_folder(rank, size, folder, ports, commands):
    """The same, with a folder of its own for the second process."""
    sys.path.insert(0, str(folder))
    return in_process(rank, size, folder / "empty" if rank else folder, ports, commands)


@pytest.fixture
def ports():
    """count -> ports. As torchrun does, this process holds what is there."""
    held = []

    def listen(count):
        stores = [
            dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            for _ in range(count)
        ]
        held.extend(stores)
        return [store.port for store in stores]

    return listen


@pytest.fixture
def alone(folder, capsys, weights_alone):
    """One process's result."""
    with open(folder / "mynets.py", "a") as file:
        file.write(MODULE)
    if not _ALONE:  # it is the same for all tests
        code, _, err = command(capsys, "prune", *PRUNE, "--out", "alone")
        assert code == 0, err
        _ALONE.append(outcome(folder, "alone"))
    return _ALONE[0]


_ALONE: list[tuple[dict, dict]] = []


def outcome(folder, name):
    result = json.loads((folder / name / "result.json").read_text())
    return result, load_file(folder / name / "pruned.safetensors")


def alike(found, wanted):
    (ours, weights), (theirs, whole) = found, wanted
    for key in ("widths", "removed", "pruned_at", "minibatches", "layers"):
        assert ours.get(key) == theirs.get(key), key
    assert [p["minibatch"] for p in ours["course"]] == [p["minibatch"] for p in theirs["course"]]
    for one, other in zip(ours["course"], theirs["course"], strict=True):
        assert one["flops"] == other["flops"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert weights.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("alone")
def test_loaders_that_cannot_be_split_and_those_of_a_part(folder, ports):
    runs = [
        ("prune", *PRUNE, "--data", "mynets:pairs", "--out", "no"),
        ("prune", *PRUNE, "--data", "mynets:odd", "--out", "no"),
        ("score", *PRUNE[:6], "--out", "no"),
        ("prune", *PRUNE, "--val", "mynets:sampled", "--out", "no"),
        ("prune", *PRUNE, "--data", "mynets:own", "--val", "mynets:val", "--out", "own",
         "--criterion", "taylor_fo"),
    ]  # fmt: skip
    first, second = ran(2, in_process, folder, ports(len(runs)), runs)
    for number, begins in enumerate(
        (
            "error: --data: mynets:pairs gave a list, of which 2 processes cannot each read",
            "error: --data: mynets:odd has batch_size=15, which 2 processes cannot share equally",
            "error: torchrun: it has started 2 processes, and score is of one",
            "error: --val: mynets:sampled has a DistributedSampler, which gives each of 2",
        )
    ):
        for code, said, complained in (first[number], second[number]):
            assert (code, said) == (2, "")
            assert complained.splitlines()[-1].startswith(begins)
    # Loaders of their own parts: an epoch ends with the shortest.
    assert first[-1][0] == second[-1][0] == 0, (first[-1], second[-1])
    own = outcome(folder, "own")[0]
    assert own["course"][-1]["minibatch"] - own["pruned_at"] == 4  # an epoch of fine-tuning


@pytest.mark.usefixtures("alone")
def test_layers_that_are_skipped_at_random(folder, ports):
    given = ("--model", "mynets:Skipping", "--criterion", "taylor_fo", "--out", "skipping")
    run = [("prune", *PRUNE, *given)]
    for ((code, _, complained),) in ran(2, in_process, folder, ports(1), run):
        assert code == 0, complained
    result, weights = outcome(folder, "skipping")
    assert result["final"]["flops_fraction"] <= 0.6
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.usefixtures("alone")
def test_an_error_of_one_is_told_though_the_others_meet_elsewhere(folder, ports):
    run = [("prune", *PRUNE, "--data", "mynets:missing", "--out", "no")]
    (first,), (second,) = ran(2, in_process, folder, ports(1), run)
    assert (first[0], second[0]) == (2, 2)
    assert second[2].startswith("error: --data: ")
    assert "shard-1.tar is not there" in second[2]
    assert first[2].splitlines()[-1].startswith("error: torchrun: ")


def test_killed_stopped_and_resumed_by_two_and_by_one(folder, ports, alone, capsys):
    broken = [("prune", *PRUNE, "--out", "broken", "--save-every", "0", "--resume")]
    first, second = outcomes(2, in_process, folder, ports(1), broken, ("1 4", "SIGKILL"))
    assert not second
    ((code, said, complained),) = first["result"]
    assert (code, said) == (2, "")
    assert re.search(r"^error: .*RuntimeError|^error: torchrun: process 0 of 2 cannot go on",
                     complained, re.MULTILINE)  # fmt: skip
    assert "Traceback" not in complained

    both = ran(2, in_process, folder, ports(1), broken, ("1 5", "SIGTERM"))
    assert [run[0][0] for run in both] == [130, 130]
    assert "after minibatch 3" in both[0][0][2]
    assert "go on with, by torchrun with any number of processes: taylor" in both[0][0][2]
    assert both[1][0][1] == ""

    (folder / "empty").mkdir()
    code, _, err = ran(2, in_folder, folder, ports(1), broken)[0][0]
    assert code == 2
    assert "--resume: process 1 of 2 does not see broken/checkpoint.pt, which others do" in err

    code, _, err = command(capsys, *broken[0])
    assert code == 0, err
    assert "going on from broken/checkpoint.pt, after minibatch 8" in err
    alike(outcome(folder, "broken"), alone)


def test_two_that_torchrun_starts_prune_as_one_does(folder, alone):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*start, "-m", "tests.studies.own.test_processes", "prune", "--device", "cpu", *PRUNE]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*line, "--out", "run"], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"torchrun took over {LIMIT} s: {process.communicate()[0]}")
    assert process.returncode == 0, said
    assert said.count("run/report.html") == 1  # one prints
    assert not (folder / "run/checkpoint.pt").exists()
    alike(outcome(folder, "run"), alone)
    assert outcome(folder, "run")[0]["processes"] == 2


@pytest.mark.parametrize("size", ["", "two", "4"])
def test_world_size_says_nothing_where_torchrun_has_started_nothing(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    check_alone("score")
    monkeypatch.setattr(processes, "started_by_torchrun", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(Mistake, match=r"^torchrun: it has started 4 processes, and score is of on"):
        check_alone("score")


if __name__ == "__main__":  # as torchrun starts it
    leave_out_what_takes_seconds()
    cli.main(sys.argv[1:])
