"""Masks on parameters that FSDP2 has sharded; checkpoints, removal and training on from there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels.shards import is_sharded, whole
from tests.distributed import runs
from tests.distributed.launch import ran
from tests.distributed.prunings import (
    EXAMPLES,
    STEPS,
    alike,
    alone,
    ended,
    minibatch,
    part,
    sgd,
    sharded,
    started,
    step_of,
)
from tests.distributed.test_masks import OF_TOKENS, Tokens

pytestmark = pytest.mark.usefixtures("one_thread")
CRITERIA = ["taylor_fo", "taylor_fo_bn"]


def trained_sharded(rank, size, folder, criterion):
    """Train and prune, go on from a file on a model that is cut, and train that."""
    path = Path(folder) / f"{criterion}.pt"
    model, old, pruner = started(criterion, tk.distributed.Ranks(timeout=60))
    start = 0
    if path.exists():
        extra = tk.load_checkpoint(path, model=model, optimizer=old, pruner=pruner)
        start = extra["step"]
    optimizer = sharded(model, pruner, old)
    assert all(map(is_sharded, model.parameters()))
    for step in range(start, 8):
        step_of(pruner, optimizer, model, model, part(step, rank, size))
        for name, parameter in model.named_parameters():
            layer = name.partition(".")[0]
            gone = pruner.original_widths.get(layer, 0) - pruner.widths.get(layer, 0)
            if gone and name.endswith("weight"):
                off = (whole(parameter).flatten(1) == 0).all(1)
                assert int(off.sum()) == gone
                assert not whole(optimizer.state[parameter]["momentum_buffer"])[off].any()
        if step == 4:
            tk.save_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner, step=step + 1)
    with pytest.raises(ValueError, match="in parts on several ranks and cannot be cut there"):
        pruner.compact()
    model(minibatch(0)[0])  # the root's parameters are whole until they are sharded again
    assert not any(map(is_sharded, model[0].parameters()))
    with pytest.raises(ValueError, match="in parts on several ranks and cannot be cut there"):
        pruner.compact()
    with pytest.raises(ValueError, match=r"load the checkpoint into the model as it was before"):
        tk.load_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
    tk.save_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner, step=8)
    with pytest.raises(ValueError, match=r"load the checkpoint into the model as it was before"):
        tk.load_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
    pruner.close()

    model, old, pruner = started(criterion, tk.distributed.Ranks(timeout=60))
    tk.load_checkpoint(path, model=model, optimizer=old, pruner=pruner)
    pruner.compact()
    optimizer = sharded(model, pruner, old)
    for step in range(8, STEPS):
        step_of(pruner, optimizer, model, model, part(step, rank, size))
    found = ended(model, pruner)
    found["weights"] = {name: whole(value) for name, value in found["weights"].items()}
    return found


@pytest.mark.parametrize("criterion", CRITERIA)
def test_sharded_is_whole(tmp_path, criterion):
    found = ran(2, trained_sharded, tmp_path, criterion)
    model, optimizer, pruner = started(criterion, None)
    for step in range(STEPS):
        step_of(pruner, optimizer, model, model, minibatch(step))
        if step == 7:
            pruner.compact()
    wanted = ended(model, pruner)
    for one in found:
        assert one["history"] == found[0]["history"]
        alike(one, wanted)

    # The file of sharded parameters is one for a process alone.
    model, optimizer, pruner = started(criterion, None)
    path = tmp_path / f"{criterion}.pt"
    assert tk.load_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner) == {"step": 8}
    pruner.compact()
    for step in range(8, STEPS):
        step_of(pruner, optimizer, model, model, minibatch(step))
    alike(ended(model, pruner), wanted)


def sharded_first(rank, size):
    from torch.distributed.fsdp import fully_shard

    model = runs.network()
    fully_shard(model)
    with pytest.raises(ValueError, match="make the pruner first, shard the model then"):
        tk.Pruner(model, torch.zeros(1, 3, 5, 5), filters=0.5)
    return EXAMPLES


def test_a_model_that_is_sharded_already():
    assert ran(1, sharded_first) == [EXAMPLES]


def test_states_that_do_not_fit():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="new: its groups hold parameters of other shapes"):
        tk.distributed.carry_state(sgd(one), sgd(other))


def test_a_rate_that_is_a_tensor_is_of_one_optimizer():
    layer = torch.nn.Linear(3, 2)
    old, new = (
        torch.optim.Adam(layer.parameters(), torch.tensor(rate), foreach=False, capturable=False)
        for rate in (0.1, 1.0)
    )
    tk.distributed.carry_state(old, new)
    old.param_groups[0]["lr"].fill_(5.0)
    assert float(new.param_groups[0]["lr"]) == pytest.approx(0.1)


def tokens_sharded(rank, size):
    """Heads are scored by what they make, and experts by gradients, which are in parts."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for ignore in (["enter", "mixture"], ["enter"]):
        torch.manual_seed(0)
        options = {**OF_TOKENS, "ignore": ignore}
        ranks = tk.distributed.Ranks(timeout=60)
        model, old, pruner = started("taylor_fo_bn", ranks, Tokens(), **options)
        fully_shard(model)
        optimizer = sgd(model)
        tk.distributed.carry_state(old, optimizer)
        pruner.use_optimizer(optimizer)
        if "mixture" in ignore:
            for step in range(STEPS):
                step_of(pruner, optimizer, model, model, part(step, rank, size))
            found.append(pruner.history)
            continue
        with pytest.raises(RuntimeError, match=r"experts\.down: .* in parts; use taylor_fo"):
            step_of(pruner, optimizer, model, model, part(0, rank, size))
    return found


def test_heads_are_pruned_and_experts_say_why_not():
    torch.manual_seed(0)
    options = {**OF_TOKENS, "ignore": ["enter", "mixture"]}
    wanted = alone("taylor_fo_bn", model=Tokens(), **options)["history"]
    assert any("attention.in_proj_weight" in record.removed for record in wanted)
    for (history,) in ran(2, tokens_sharded):
        assert [record.removed for record in history] == [record.removed for record in wanted]
