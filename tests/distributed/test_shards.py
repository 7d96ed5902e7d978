"""Weights of which a rank holds a part: FSDP2, tensor parallel plans, and the two together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import taylor_kernels as tk
from taylor_kernels.shards import local_part, whole
from tests.distributed import runs
from tests.distributed.launch import ran

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = ["taylor_fo", "taylor_fo_joint", "snip", "magnitude_l1", "magnitude_l2"]
OTHERS = ["taylor_fo_bn", "taylor_fo_gate", "obd_fisher", "bn_scale"]


def close(found, wanted, rtol=2e-5):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = float(value.nan_to_num().abs().max())
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * scale, equal_nan=True)


def same_bits(found):
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value.nan_to_num(7.0), other[name].nan_to_num(7.0))


def sharded(rank, size, criteria):
    """Scores under FSDP2; 4 outputs and 10 filters on 3 ranks are uneven shards."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for criterion in [*criteria, "streamed"]:
        model = runs.network()
        for layer in (model[3], model[7]):
            fully_shard(layer)
        fully_shard(model)
        ranks = tk.distributed.Ranks(timeout=60)
        stream = criterion == "streamed"
        name = "taylor_fo" if stream else criterion
        imp = tk.Importance(model, name, ranks=ranks, stream=stream)
        for batch in runs.minibatches(2, 4 * size):
            runs.update(imp, model, runs.part(batch, rank, [4] * size))
        found[criterion] = imp.compute()
        assert ranks.collectives == 1
    return found


def test_fsdp2():
    size, criteria = 3, [*WEIGHTS, *OTHERS]
    found = ran(size, sharded, criteria)
    for criterion in criteria:
        same_bits([one[criterion] for one in found])
        wanted = runs.alone(criterion, runs.minibatches(2, 4 * size))
        close(found[0][criterion], wanted["scores"])
    for one in found:
        same_bits([one["taylor_fo"], one["streamed"]])


def perceptron():
    generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def examples(count):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(9))


def of_perceptron(criterion, count):
    model = perceptron()
    imp = tk.Importance(model, criterion)
    for x in examples(count).split(8):
        model.zero_grad()
        model(x).square().mean().backward()
        imp.update()
    return {"scores": imp.compute(), "error": imp.standard_error()}


HALF = ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate", "obd_fisher"]


def in_half_precision(rank, size):
    """Scores under FSDP2 that computes in bfloat16, of float32 shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {}
    for criterion in HALF:
        model = perceptron()
        fully_shard(model[2], mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        imp = tk.Importance(model, criterion, ranks=tk.distributed.Ranks(timeout=60))
        for x in examples(16).split(8):
            model.zero_grad()
            model(x.chunk(size)[rank]).float().square().mean().backward()
            imp.update()
        found[criterion] = imp.compute()
    return found


def test_fsdp2_in_half_precision():
    found = ran(2, in_half_precision)
    for criterion in HALF:
        same_bits([one[criterion] for one in found])
        for name, value in of_perceptron(criterion, 16)["scores"].items():
            assert (found[0][criterion][name] - value).norm() < 0.05 * value.norm()


def averaged_over(group, size, model):
    """What a data parallel engine does where it does not shard: local parts are averaged."""
    for parameter in model.parameters():
        grad = local_part(parameter.grad)
        dist.all_reduce(grad, group=group)
        grad.div_(size)


def parallel(rank, size, criteria, replicas, fsdp):
    """Scores under colwise and rowwise plans on size / replicas ranks, the replicas of which see
    parts of the minibatch and hold all of it, or parts (FSDP2) too."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh(
        "cpu", (replicas, size // replicas), mesh_dim_names=("replica", "tensor")
    )
    found = {}
    for criterion in criteria:
        model = perceptron()
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}  # the last layer stays whole
        parallelize_module(model, mesh["tensor"], plan)
        if fsdp:
            fully_shard(model, mesh=mesh["replica"])
        imp = tk.Importance(model, criterion, ranks=tk.distributed.Ranks(timeout=60))
        for x in examples(16).split(8):
            model.zero_grad()
            mine = x.chunk(replicas)[mesh["replica"].get_local_rank()]
            model(mine).square().mean().backward()
            if not fsdp:
                averaged_over(mesh["replica"].get_group(), replicas, model)
            imp.update()
        found[criterion] = {"scores": imp.compute(), "error": imp.standard_error()}
    return found


GATES = ["taylor_fo_bn", "taylor_fo_gate"]


@pytest.mark.parametrize(("size", "replicas", "fsdp"), [(2, 1, False), (4, 2, False), (4, 2, True)])
def test_tensor_parallel(size, replicas, fsdp):
    criteria = WEIGHTS if fsdp else [*WEIGHTS, *GATES]
    found = ran(size, parallel, criteria, replicas, fsdp)
    for criterion in criteria:
        ours = [one[criterion] for one in found]
        wanted = of_perceptron(criterion, 16)
        for key in ("scores", "error") if criterion in GATES else ("scores",):
            same_bits([one[key] for one in ours])
            close(ours[0][key], wanted[key])


def pruned_in_parts(rank, size):
    """Masks of a pruner whose model a plan spreads over the ranks."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    return trained(
        tk.distributed.Ranks(timeout=60),
        lambda model: parallelize_module(
            model,
            init_device_mesh("cpu", (size,)),
            {
                "0": ColwiseParallel(),
                "2": RowwiseParallel(),
            },
        ),
    )


def trained(ranks, spread):
    model = perceptron()
    pruner = tk.Pruner(
        model, torch.zeros(1, 6), "taylor_fo_gate", filters=0.5, every=2, per_step=3, ranks=ranks
    )
    spread(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruner.use_optimizer(optimizer)
    for x in examples(64).split(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        pruner.step()
        optimizer.step()
    return pruner.history, {name: whole(p.detach()) for name, p in model.named_parameters()}


def test_pruned_under_a_plan():
    found = ran(2, pruned_in_parts)
    history, weights = trained(None, lambda model: None)
    assert len(history) == 3
    for ours, values in found:
        assert [one.removed for one in ours] == [one.removed for one in history]
        close(values, weights)


def of_no_plan(rank, size):
    """What is said of gates where ranks hold parts that are not channels."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    ranks, said = tk.distributed.Ranks(timeout=60), []

    def refused(model, criterion="taylor_fo_gate", x=None):
        try:
            imp = tk.Importance(model, criterion, ranks=ranks)
            model(torch.ones(4, 6) if x is None else x).square().mean().backward()
            imp.update()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))

    mesh = init_device_mesh("cpu", (size,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    refused(parallelize_module(perceptron(), mesh, plan), "obd_fisher")
    kept = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    refused(parallelize_module(perceptron(), mesh, kept))
    both = init_device_mesh("cpu", (1, size), mesh_dim_names=("replica", "tensor"))
    model = parallelize_module(perceptron(), both["tensor"], plan)
    fully_shard(model, mesh=both["replica"])
    refused(model)
    # Positions of a sequence are in parts, all channels of each are there.
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6))
    sequence = {
        "0": ColwiseParallel(), "2": RowwiseParallel(output_layouts=Shard(1)),
        "3": SequenceParallel(use_local_output=True),
    }  # fmt: skip
    refused(parallelize_module(model, mesh, sequence), x=torch.randn(3, 4, 6))
    return said


def test_gates_of_what_is_no_channel():
    for said in ran(2, of_no_plan):
        beginnings = (
            "criterion: it puts weight gradients together", "0: its output is a DTensor here",
            "model: FSDP2 lies over a tensor parallel plan", "2: the ranks of the tensor parallel",
        )  # fmt: skip
        assert len(said) == len(beginnings), said
        assert all(s.startswith(b) for s, b in zip(said, beginnings, strict=True)), said


def refused(rank, size):
    from torch.distributed.fsdp import fully_shard

    model = runs.network()
    fully_shard(model)
    said = []
    closures = [n for n in tk.criterion_names() if runs.reads(n) == "closure"]
    for criterion, options in (
        ("taylor_fo", None),
        ("taylor_fo", {"gradients": "local"}),
        *((name, {}) for name in closures),
    ):
        try:
            ranks = None if options is None else tk.distributed.Ranks(**options)
            tk.Importance(model, criterion, ranks=ranks)
        except ValueError as error:
            said.append(str(error))
    later = runs.network()
    pruner = tk.Pruner(
        later, torch.zeros(1, 3, 5, 5), "taylor_so_diag", filters=0.5,
        ranks=tk.distributed.Ranks(),
    )  # fmt: skip
    fully_shard(later)
    for _ in range(2):
        try:
            pruner.step(closure=lambda: pytest.fail("it ran the model"))
        except ValueError as error:
            said.append(str(error))
    imp = tk.Importance(model, "taylor_fo", ranks=tk.distributed.Ranks())
    batch = runs.minibatches(1, 4)[0]
    runs.loss_of(model, batch).backward()
    imp.absent() if rank else imp.update()
    try:
        imp.compute()
    except RuntimeError as error:
        said.append(str(error))
    return said


def test_what_cannot_be():
    for said in ran(2, refused):
        closures = len(said) - 3  # of meters, and of a pruner whose model is sharded later, twice
        known = sum(runs.reads(name) == "closure" for name in tk.criterion_names())
        assert closures == known + 2 > 7
        beginnings = ("ranks: each rank holds", "ranks: the weights are")
        beginnings += ("criterion: it differentiates",) * closures
        assert all(s.startswith(b) for s, b in zip(said, (*beginnings, "absent: "), strict=True))
