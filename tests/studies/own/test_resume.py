"""A run of prune or score that is stopped or killed ends, resumed, where a whole one does."""

from __future__ import annotations

import json
import random
import signal

import pytest
import torch

pytest.importorskip("matplotlib", reason="prune needs matplotlib")
pytest.importorskip("safetensors", reason="prune needs safetensors")

from safetensors.torch import load_file

import taylor_kernels as tk
from tests.helpers.programs import run_module
from tests.helpers.user_models import MODEL_AND_DATA, command

pytestmark = pytest.mark.usefixtures("one_thread", "weights_alone")

PRUNE = (*MODEL_AND_DATA, "--flops", "0.6", "--epochs", "3", "--finetune", "2", "--lr", "0.02")
#: Parts of a result that tell when and how fast it came about.
CLOCKED = ("date", "seconds", "command")


def outcome(folder, name: str) -> tuple:
    """All that a run of prune has made, but for what the clock decides."""
    result = json.loads((folder / name / "result.json").read_text())
    for key in CLOCKED:
        del result[key]
    for key in ("dense", "final"):
        del result[key]["ms"]
    return result, *(
        (folder / name / f"{kind}.safetensors").read_bytes() for kind in ("pruned", "scores")
    )


def calls(folder) -> int:
    path = folder / "calls"
    return len(path.read_text()) if path.exists() else 0


#: A thread that kills its process after so many calls of the model.
KILLED = """
import os, signal, sys, threading, time
os.chdir({folder!r})
sys.path.insert(0, {folder!r})
def kill():
    while not os.path.exists("calls") or os.path.getsize("calls") < {stop_at}:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
"""


def test_killed_and_resumed_is_never_killed(folder, capsys):
    code, _, err = command(capsys, "prune", *PRUNE, "--out", "whole")
    assert code == 0, err
    whole = calls(folder)
    (folder / "calls").unlink()
    with open(folder / "mynets.py", "a") as file:
        file.write("torch.set_num_threads(1)\n")
    line = ("prune", "--device", "cpu", *PRUNE, "--out", "broken", "--save-every", "0", "--resume")
    stop_at = random.randint(whole // 3, whole * 2 // 3)
    before = KILLED.format(folder=str(folder), stop_at=stop_at)
    run = run_module("taylor_kernels.cli", *line, before=before, optimizers=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert (folder / "broken/checkpoint.pt").exists()
    assert not (folder / "broken/result.json").exists()
    code, _, err = command(capsys, "prune", *PRUNE, "--out", "broken", "--resume")
    assert code == 0, err
    assert "going on from broken/checkpoint.pt, after minibatch" in err
    assert outcome(folder, "broken") == outcome(folder, "whole")


@pytest.fixture
def interrupted(folder):
    """A model to which Ctrl-C comes at a call: the file "stop" has its number and the mode."""
    with open(folder / "mynets.py", "a") as file:
        file.write(
            "import os, signal\n"
            "class Stopping(Net):\n"
            "    calls = {True: 0, False: 0}\n"
            "    def forward(self, x):\n"
            "        y = Net.forward(self, x)\n"
            "        training = self.training and torch.is_grad_enabled()  # a trace does not\n"
            "        self.calls[training] += 1\n"
            "        mode = 'train' if training else 'eval'\n"
            "        stop, now = Path('stop'), f'{mode} {self.calls[training]}'\n"
            "        Path(f'last_{mode}').write_text(now)\n"
            "        if stop.exists() and stop.read_text() == now:\n"
            "            stop.unlink()\n"
            "            os.kill(os.getpid(), signal.SIGINT)\n"
            "        return y\n"
        )
    return folder


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(interrupted, capsys):
    folder = interrupted
    prune = ("--model", "mynets:Stopping", *PRUNE[2:])
    command(capsys, "prune", *prune, "--out", "whole")
    last = int((folder / "last_train").read_text().split()[1])
    for number, words in (
        (2, "while pruning, after minibatch 2"),
        (last - 3, "while fine-tuning, "),
    ):
        (folder / "stop").write_text(f"train {number}")
        code, out, err = command(capsys, "prune", *prune, "--out", "broken")
        assert (code, out) == (130, "")
        last = err.splitlines()[-1]
        assert last.startswith(f"stopped {words}")
        assert "the checkpoint is broken/checkpoint.pt; go on with: taylor-kernels prune" in last
        again = last.partition("taylor-kernels prune ")[2].split()
        assert again[-1] == "--resume"
        # Without it nothing is lost by accident, and with other options nothing is mixed.
        code, _, err = command(capsys, "prune", *prune, "--out", "broken")
        assert code == 2
        assert "go on with --resume, or start anew with --force" in err
        code, _, err = command(capsys, "prune", *again, "--lr", "0.3")
        assert code == 2
        assert "is of a run with another --lr" in err
        code, _, err = command(capsys, "prune", *again)
        assert code == 0, err
        assert outcome(folder, "broken") == outcome(folder, "whole")


def test_every_epoch_leaves_a_checkpoint(folder, capsys, monkeypatch):
    from taylor_kernels.studies.own import training

    saved, save = [], training.save_checkpoint

    def noting(path, **content):
        saved.append((content["epoch"], content["done"], content["tuning"]))
        save(path, **content)

    monkeypatch.setattr(training, "save_checkpoint", noting)
    code, _, err = command(
        capsys, "prune", "--model", "mynets:make_model", "--data", "mynets:pairs", "--out", "out",
        "--filters", "0.7", "--per-step", "2", "--every", "1", "--finetune", "1",
        "--batches", "1", "--save-every", "1000",
    )  # fmt: skip
    assert code == 0, err
    pruning = [at for at in saved if not at[2]]
    assert pruning == [(number, 0, False) for number in range(1, len(pruning) + 1)]
    assert saved[len(pruning) :] == [(n, 0, True) for n in (len(pruning) + 1, len(pruning) + 2)]
    assert len(pruning) >= 2


def test_a_run_in_bfloat16_goes_on_in_float16(interrupted, capsys, monkeypatch):
    from taylor_kernels.studies.own.settings import PruneSettings

    prune = ("--model", "mynets:Stopping", *PRUNE[2:], "--amp", "--out", "out")
    (interrupted / "stop").write_text("train 2")
    code, _, _ = command(capsys, "prune", *prune)
    assert code == 130
    monkeypatch.setattr(PruneSettings, "amp_dtype", lambda self: torch.float16)
    code, _, err = command(capsys, "prune", *prune, "--resume")
    assert code == 0, err
    assert "going on from out/checkpoint.pt, after minibatch 2" in err


def test_a_score_goes_on_too(interrupted, capsys):
    folder = interrupted
    score = ("--model", "mynets:Stopping", *PRUNE[2:4], "--batches", "5")
    command(capsys, "score", *score, "--out", "whole")
    last = int((folder / "last_eval").read_text().split()[1])
    (folder / "stop").write_text(f"eval {last - 1}")
    code, _, err = command(capsys, "score", *score, "--out", "broken")
    assert code == 130
    assert "stopped after minibatch 4 of 5; the checkpoint is" in err
    code, _, err = command(capsys, "score", *score, "--out", "broken", "--resume")
    assert code == 0, err
    one, other = (load_file(folder / name / "scores.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_a_damaged_checkpoint_is_a_mistake(folder, capsys):
    (folder / "out").mkdir()
    for content, says in (
        (b"what", "is damaged or not a checkpoint"),
        (None, "was not written by"),
    ):
        if content is None:
            tk.save_checkpoint(folder / "out/checkpoint.pt", model=torch.nn.Linear(2, 2))
        else:
            (folder / "out/checkpoint.pt").write_bytes(content)
        code, _, err = command(capsys, "prune", *PRUNE, "--out", "out", "--resume")
        assert code == 2
        assert err.splitlines()[-1].startswith("error: --resume: ")
        assert says in err
