"""Weights of which a rank holds a part: FSDP2, tensor parallel plans, and the two together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import taylor_kernels as tk
from taylor_kernels.shards import local_part
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
    return imp.compute()


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
        for name, value in of_perceptron(criterion, 16).items():
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
        found[criterion] = imp.compute()
    return found


@pytest.mark.parametrize(("size", "replicas", "fsdp"), [(4, 2, False), (4, 2, True)])
def test_tensor_parallel(size, replicas, fsdp):
    found = ran(size, parallel, WEIGHTS, replicas, fsdp)
    for criterion in WEIGHTS:
        same_bits([one[criterion] for one in found])
        close(found[0][criterion], of_perceptron(criterion, 16))


def refused(rank, size):
    from torch.distributed.fsdp import fully_shard

    model = runs.network()
    fully_shard(model)
    said = []
    for criterion, options in (
        ("taylor_fo", None),
        ("taylor_so", {}),
        ("taylor_fo", {"gradients": "local"}),
    ):
        try:
            ranks = None if options is None else tk.distributed.Ranks(**options)
            tk.Importance(model, criterion, ranks=ranks)
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
        beginnings = ("ranks: each rank holds", "criterion: it differ", "ranks: the weights are")
        assert all(s.startswith(b) for s, b in zip(said, (*beginnings, "absent: "), strict=True))
