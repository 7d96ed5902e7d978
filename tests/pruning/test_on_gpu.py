"""The pruner on a GPU: the same facts, and the same bits on every run."""

from __future__ import annotations

import pytest
import torch

from taylor_kernels.pruning import Pruner, load_checkpoint, save_checkpoint
from tests.helpers import zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def on_gpu(tree):
    return torch.utils._pytree.tree_map(lambda tensor: tensor.cuda(), tree)


def run(name, criterion, directory=None, stop=None):
    torch.manual_seed(0)
    model, inputs = zoo.build(name)
    model, inputs = model.cuda(), on_gpu(inputs)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = Pruner(
        model, inputs, criterion, params=0.55, every=3, per_step=0.1, optimizer=optimizer
    )
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
    start = 0
    if directory and (directory / "c.pt").exists():
        start = load_checkpoint(directory / "c.pt", **parts)["step"]
    for step in range(start, stop or 20):
        torch.manual_seed(step)
        optimizer.zero_grad()
        zoo.loss(model, on_gpu(zoo.fresh(inputs))).backward()
        pruner.step()
        optimizer.step()
    if directory:
        save_checkpoint(directory / "c.pt", **parts, step=stop or 20)
    return model, on_gpu(inputs), pruner


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_masked_is_removed(name, criterion):
    model, inputs, pruner = run(name, criterion)
    assert pruner.history
    model.eval()
    masked = zoo.forward(model, inputs)
    pruner.compact()
    torch.testing.assert_close(zoo.forward(model, inputs), masked, rtol=1e-3, atol=1e-4)
    assert all(p.is_cuda for p in model.parameters())


def test_resumed_and_repeated_runs_remove_the_same(tmp_path):
    whole = run("mobilenet", "taylor_fo")[2]
    assert [r.removed for r in run("mobilenet", "taylor_fo")[2].history] == [
        record.removed for record in whole.history
    ]
    run("mobilenet", "taylor_fo", tmp_path, stop=8)
    resumed = run("mobilenet", "taylor_fo", tmp_path)[2]
    assert [r.removed for r in resumed.history] == [r.removed for r in whole.history]


def test_random_state_of_the_gpu_is_left_alone():
    model, inputs = zoo.build("resnet")
    model, inputs = model.cuda(), inputs.cuda()
    state = torch.cuda.get_rng_state()
    Pruner(model, inputs, params=0.5)
    assert torch.equal(torch.cuda.get_rng_state(), state)
