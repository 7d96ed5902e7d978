"""Pruning inside of the trainers that people use, against a loop of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import taylor_kernels as tk
from tests.distributed.launch import ran
from tests.helpers.docstrings import run_examples
from tests.helpers.programs import run_program
from tests.integrations import trainer_runs as runs
from tests.integrations.conftest import library
from tests.integrations.trainer_ranks import after_load, on_rank
from tests.integrations.trainer_runs import KINDS, Trained, trained

pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_accelerator"),
    pytest.mark.filterwarnings("ignore"),
]


def state(of: Trained) -> dict[str, Any]:
    return {
        "net": of.net.state_dict(),
        "optimizer": of.optimizer.state_dict(),
        "masks": of.pruner.state_dict(),
        "scores": of.pruner.scores(),
        "rate": of.scheduler.get_last_lr(),
    }


def same(one: Any, other: Any) -> None:
    """Equal bits, all the way down."""
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            same(value, other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


def prunings(pruner: tk.Pruner) -> list[tuple[Any, ...]]:
    """What went when; names of layers begin with that of the part in a whole module."""
    return [(r.step, r.threshold, list(r.removed.values())) for r in pruner.history]


Batches = Sequence[tuple[Tensor, Tensor]]


def own_loop(epochs: Sequence[Batches], divisor: Callable[[int], int], schedule: str) -> Trained:
    """What the trainers do, up to the end of pruning, with `tk.Pruner` and nothing else."""
    model = runs.network()
    optimizer, scheduler = runs.sgd(model)
    pruner = tk.Pruner(model, runs.examples()[0][:1], optimizer=optimizer, **runs.OPTIONS)
    for batches in epochs:
        for first in range(0, len(batches), runs.ACCUMULATED):
            part = batches[first : first + runs.ACCUMULATED]
            for x, y in part:
                (cross_entropy(model(x), y) / divisor(len(part))).backward()
            pruner.step()
            optimizer.step()
            optimizer.zero_grad()
            if schedule == "step":
                scheduler.step()
            if pruner.done:
                pruner.compact()
                return Trained(model, pruner, optimizer, scheduler, None)
        if schedule == "epoch":
            scheduler.step()
    raise AssertionError("the target was not reached")


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_as_in_a_loop_of_ones_own(kind, tmp_path):
    """Each optimizer step is a minibatch: also the last of an epoch, which is a smaller one.

    The training ends at the target, is compacted, and optimizer and scheduler go on.
    """
    got = trained(kind, tmp_path)
    if kind == "accelerate":
        got.pruner.compact()
    epochs = [list(runs.loader())] * runs.EPOCHS
    if kind == "transformers":  # which shuffles
        seen = got.trainer.model.seen
        epochs = [seen[i : i + runs.BATCHES] for i in range(0, len(seen), runs.BATCHES)]
    own = own_loop(
        epochs,
        (lambda there: there) if kind == "transformers" else (lambda _: runs.ACCUMULATED),
        "epoch" if kind == "lightning" else "step",
    )
    same(prunings(got.pruner), prunings(own.pruner))
    assert got.pruner.done
    assert sum(m.out_channels for m in got.net if isinstance(m, nn.Conv2d)) == 12
    same(got.net.state_dict(), own.net.state_dict())
    same(got.scheduler.get_last_lr(), own.scheduler.get_last_lr())
    x, y = runs.examples()
    for one in (got, own):
        one.net.train()
        one.optimizer.zero_grad()
        cross_entropy(one.net(x), y).backward()
        one.optimizer.step()
        one.scheduler.step()
    same(got.net.state_dict(), own.net.state_dict())
    same(got.scheduler.get_last_lr(), own.scheduler.get_last_lr())


KILL = """
import torch, warnings
from pathlib import Path
from tests.integrations import trainer_runs
torch.set_num_threads(1)
warnings.simplefilter("ignore")
trainer_runs.{kind}(Path({folder!r}), kill_at={kill_at}, **{options})
"""


@pytest.mark.parametrize(
    ("kind", "kill_at", "options"),
    [
        ("lightning", 5, {}),
        ("transformers", 9, {"max_grad_norm": 0.01}),
        ("accelerate", 9, {"compact_at": 4}),
    ],
)
def test_killed_and_resumed_it_is_as_never_killed(kind, kill_at, options, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    expected = trained(kind, whole, **options)
    program = KILL.format(kind=kind, folder=str(broken), kill_at=kill_at, options=options)
    run = run_program(program, 60.0, optimizers=True)
    assert run.returncode == -9, run.stderr
    resume = str(broken / "epoch=0.ckpt") if kind == "lightning" else True
    got = trained(kind, broken, resume=resume, **options)
    assert 1 < len(got.pruner.history) == len(expected.pruner.history)
    same(state(got), state(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_docstrings_run(kind):
    library(kind)
    module = importlib.import_module(f"taylor_kernels.integrations.{kind}")
    run_examples(module, kind, own=True)


def test_several_processes_prune_as_one_and_one_goes_on(tmp_path):
    library("accelerate")
    one, other = ran(2, on_rank, "accelerate", str(tmp_path))
    assert one["ranks"]
    assert sum(one["widths"]) == 12
    same(one, other)
    got = trained("accelerate", tmp_path, resume=True)
    assert got.pruner.ranks is None
    before = [entry for entry in one["prunings"] if entry[0] <= 5]  # what was saved last
    assert len(before) == 2
    same(prunings(got.pruner)[:2], before)
    assert got.pruner.done


def test_several_processes_train_together_after_the_model_was_cut(tmp_path):
    """A second train() wraps the cut model anew: ranks that see other examples stay the same."""
    library("transformers")
    one, other = ran(2, on_rank, "transformers", str(tmp_path))
    assert sum(one["widths"]) == 12
    same(one, other)


def test_several_processes_go_on_from_the_state_of_a_model_that_was_cut(tmp_path):
    """The wrapper over the old parameters says so; with a new one the run goes on to equal bits."""
    library("accelerate")
    one, other = ran(2, after_load, str(tmp_path))
    assert one["True"]["0.weight"].size(0) < 12 or one["True"]["3.weight"].size(0) < 12
    same(one, other)
    same(one["True"], one["False"])
