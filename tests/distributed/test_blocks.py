"""Ranks score whole residual blocks as one process would, and remove the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import taylor_kernels as tk
from taylor_kernels.shards import whole
from tests.distributed.launch import ran
from tests.distributed.prunings import (
    STEPS,
    alike,
    alone,
    ended,
    minibatch,
    part,
    same_bits,
    sharded,
    started,
    step_of,
)
from tests.distributed.threads import Averaged, ThreadRanks, in_threads

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(r"ignore:compact\(\) has put new parameters"),
]
CRITERIA = ["taylor_fo_bn", "taylor_fo_gate", "taylor_fo", "magnitude_l2"]
#: No layer can lose more than one filter, so that blocks have to go.
OPTIONS = {"filters": None, "params": 0.3, "per_step": 3, "min_filters": 5, "blocks": True}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).tanh())


def network() -> nn.Module:
    """Four residual blocks of branches that add ever less; examples do not meet in it."""
    generator = torch.Generator().manual_seed(2)
    blocks = [Block(6) for _ in range(4)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *blocks, *head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for number, block in enumerate(blocks):
            for parameter in block.conv2.parameters():
                parameter.mul_(0.3**number)
    return model


def by_one_process(criterion):
    found = alone(criterion, model=network(), **OPTIONS)
    assert any(record.blocks for record in found["history"])
    return found


def in_thread(rank, size, meeting, criterion, window):
    ranks = ThreadRanks(meeting, rank, window=window)
    model, optimizer, pruner = started(criterion, ranks, network(), **OPTIONS)
    wrapped = Averaged(model, ranks)
    for step in range(STEPS):
        step_of(pruner, optimizer, model, wrapped, part(step, rank, size))
    return ended(model, pruner)


@pytest.mark.sample
@pytest.mark.parametrize("window", [64, 2])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_blocks_that_one_process_prunes(criterion, window):
    found = in_threads(2, in_thread, criterion, window)
    alike(found[0], by_one_process(criterion))
    same_bits(found)


def in_process(rank, size, criterion):
    ranks = tk.distributed.Ranks(timeout=60)
    model, optimizer, pruner = started(criterion, ranks, network(), **OPTIONS)
    wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        step_of(pruner, optimizer, model, wrapped, part(step, rank, size))
    found = ended(model, pruner)
    before = model(torch.ones(2, 3, 5, 5)).detach()
    pruner.compact()
    torch.testing.assert_close(model(torch.ones(2, 3, 5, 5)).detach(), before)
    wrapped = tk.distributed.rewrapped(wrapped)
    for step in range(2):
        step_of(pruner, optimizer, model, wrapped, part(step, rank, size))
    return found | {"trained": torch.cat([p.detach().flatten() for p in model.parameters()])}


@pytest.mark.parametrize(("size", "criterion"), [(2, "taylor_fo_bn"), (4, "taylor_fo_gate")])
def test_under_ddp(size, criterion):
    found = ran(size, in_process, criterion)
    alike(found[0], by_one_process(criterion))
    same_bits(found)
    for one in found[1:]:
        assert torch.equal(one["trained"], found[0]["trained"])


def under_a_plan(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    branch = Residual(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    model = nn.Sequential(nn.Linear(6, 6), branch, nn.Linear(6, 3))
    pruner = tk.Pruner(
        model, torch.zeros(1, 6), "taylor_fo_gate", filters=0.5, blocks=True,
        ranks=tk.distributed.Ranks(timeout=60),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (size,))
    parallelize_module(model, mesh, {"1.0": ColwiseParallel(), "1.2": RowwiseParallel()})
    with pytest.raises(ValueError, match="blocks: 'taylor_fo_gate' reads gates of whole blocks"):
        pruner.use_optimizer(torch.optim.SGD(model.parameters(), 0.1))
    return pruner.blocks


def test_gates_of_blocks_under_a_plan():
    assert ran(2, under_a_plan) == [("1",)] * 2


def test_a_rank_that_ends_early():
    def run(rank, size, meeting):
        ranks = ThreadRanks(meeting, rank)
        model, optimizer, pruner = started("taylor_fo_gate", ranks, network(), **OPTIONS)
        wrapped = Averaged(model, ranks)
        for step in range(STEPS):
            gone = rank == 1 and step >= 4
            batch = None if gone else part(step, rank, size)
            step_of(pruner, optimizer, model, wrapped, batch)
        return ended(model, pruner)

    found = in_threads(2, run)
    same_bits(found)
    assert any(record.blocks for record in found[0]["history"])


def test_a_rank_that_has_lost_another_block_is_found_out():
    def run(rank, size, meeting):
        ranks = ThreadRanks(meeting, rank)
        model, optimizer, pruner = started("magnitude_l2", ranks, network(), **OPTIONS)
        worth = pruner._minibatches.blocks.worth

        def reversed_later(*given):
            found = worth(*given)
            return found[::-1] if rank and pruner.history else found

        pruner._minibatches.blocks.worth = reversed_later
        for step in range(STEPS):
            step_of(pruner, optimizer, model, Averaged(model, ranks), part(step, rank, size))

    # Of 9 layers and 4 blocks.
    with pytest.raises(RuntimeError, match=r"on rank 1 are others than .* of 13 layers"):
        in_threads(2, run)


def test_the_state_is_that_of_one_process(tmp_path):
    """Blocks' scores are in a checkpoint, whatever the number of ranks."""

    def run(rank, size, meeting):
        ranks = ThreadRanks(meeting, rank)
        model, optimizer, pruner = started("taylor_fo_gate", ranks, network(), **OPTIONS)
        for step in range(7):
            step_of(pruner, optimizer, model, Averaged(model, ranks), part(step, rank, size))
        path = tmp_path / "run.pt"
        tk.save_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
        return pruner.state_dict()["blocks"]["scores"]

    first, second = in_threads(2, run)
    assert first["count"] == second["count"] == 1
    model, optimizer, pruner = started("taylor_fo_gate", None, network(), **OPTIONS)
    tk.load_checkpoint(tmp_path / "run.pt", model=model, optimizer=optimizer, pruner=pruner)
    held = pruner.state_dict()["blocks"]["scores"]
    for key in ("sum", "average"):
        for other in (second, held):  # nan is that of a block that is gone
            assert torch.equal(first[key].nan_to_num(-1.0), other[key].nan_to_num(-1.0))


def in_parts(rank, size, folder, criterion):
    """Parameters are sharded; what is masked is removed from the model that a file is read into."""
    path = Path(folder) / "run.pt"
    model, old, pruner = started(criterion, tk.distributed.Ranks(timeout=60), network(), **OPTIONS)
    optimizer = sharded(model, pruner, old)
    for step in range(8):
        step_of(pruner, optimizer, model, model, part(step, rank, size))
    with pytest.raises(ValueError, match="in parts on several ranks and cannot be cut there"):
        pruner.compact()
    tk.save_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
    pruner.close()

    model, old, pruner = started(criterion, tk.distributed.Ranks(timeout=60), network(), **OPTIONS)
    tk.load_checkpoint(path, model=model, optimizer=old, pruner=pruner)
    pruner.compact()
    optimizer = sharded(model, pruner, old)
    for step in range(8, STEPS):
        step_of(pruner, optimizer, model, model, part(step, rank, size))
    found = ended(model, pruner)
    return found | {"weights": {name: whole(value) for name, value in found["weights"].items()}}


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn"])
def test_sharded_is_whole(tmp_path, criterion):
    found = ran(2, in_parts, tmp_path, criterion)
    model, optimizer, pruner = started(criterion, None, network(), **OPTIONS)
    for step in range(STEPS):
        step_of(pruner, optimizer, model, model, minibatch(step))
        if step == 7:
            pruner.compact()
    for one in found:
        assert one["history"] == found[0]["history"]
        alike(one, ended(model, pruner))
