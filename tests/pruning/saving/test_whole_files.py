"""Models that are saved whole: what their files name of this package, and that they come back.

A file that `torch.save(model)` has written finds classes by their places in the package. Those of
`NAMED` are in files of users: a class that moves leaves its name where it was.
"""

from __future__ import annotations

import io
import pickletools
import zipfile

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from tests.helpers import ROOT
from tests.helpers.programs import run_program
from tests.pruning.masks.test_called_norms import Block, Network
from tests.pruning.mixtures import Model
from tests.pruning.test_pooled_channels import Net

MASKS = "taylor_kernels.pruning.masks"
HOOK = "taylor_kernels.hooks.Hook"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.enter(x)).mean(1))


def called() -> nn.Module:
    return Network(Block(8, 8, ("scaled", "bare"), nn.Identity()), 8)


#: Model and input, options of the pruner, and what the file of it names masked and compacted.
MODELS = {
    "norms and heads": (
        Attention, (4, 5, 6), {"params": 0.4},
        {f"{MASKS}.kept_norms.KeptAgain"},
        {"taylor_kernels.tracing.multihead.PrunedMultiheadAttention"},
    ),
    "pools": (
        lambda: Net(["mean", "max"], False, True, False), (4, 3, 6, 6), {},
        {f"{MASKS}.kept_norms.KeptInput", f"{MASKS}.kept_norms.KeptOutput"}, set(),
    ),
    "called norms": (called, (4, 5, 3), {}, {f"{MASKS}.called_norms.KeptCalls"}, set()),
    "experts": (
        Model, (6, 4), {"ignore": ("enter",), "params": 0.3},
        {f"{MASKS}.kept_experts.KeptExperts"}, set(),
    ),
    "blocks": (
        Attention, (4, 5, 6), {"blocks": True, "min_filters": 99},
        {"taylor_kernels.pruning.blocks.Zeroing"}, {"taylor_kernels.tracing.blocks.Zeros"},
    ),
}  # fmt: skip
#: With no pruner, and so at one place alone.
LOWERED = {f"taylor_kernels.methods.lowered.Lowered{kind}" for kind in ("Linear", "Conv")}
NAMED = {HOOK, *LOWERED}.union(*(masked | compacted for *_, masked, compacted in MODELS.values()))


def named(content: bytes) -> set[str]:
    """What a file of torch.save names of this package."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (entry,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        pickled = archive.read(entry)
    found = {
        str(argument).replace(" ", ".")
        for operation, argument, _ in pickletools.genops(pickled)
        if operation.name in ("GLOBAL", "STACK_GLOBAL")
    }
    return {name for name in found if name.startswith("taylor_kernels.")}


def saved(model: nn.Module, x: torch.Tensor, path) -> set[str]:
    with torch.no_grad():
        torch.save({"model": model, "x": x, "y": model(x)}, path)
    return named(path.read_bytes())


def check_loads(*paths) -> None:
    """In a process that has not seen the models."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
for path in {[str(path) for path in paths]!r}:
    found = torch.load(path, weights_only=False)
    with torch.no_grad():
        assert torch.equal(found["model"](found["x"]), found["y"]), path
"""
    run = run_program(code)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_that_is_saved_whole_comes_back(name, tmp_path):
    make, shape, options, masked, compacted = MODELS[name]
    model, x = make(), torch.randn(shape)
    options = {"params": 0.6, "every": 1, "per_step": 0.1} | options
    pruner = tk.Pruner(model, x, "taylor_fo", **options)
    while not pruner.done:
        model.zero_grad()
        model(x).square().mean().backward()
        pruner.step()
    model.eval()
    paths = [tmp_path / name for name in ("open", "closed", "compacted")]
    assert masked <= saved(model, x, paths[0]) <= NAMED
    pruner.close()
    assert masked <= saved(model, x, paths[1]) <= NAMED
    pruner.compact()
    assert saved(model, x, paths[2]) == compacted
    check_loads(*paths)


def test_a_lowered_model_that_is_saved_whole_comes_back(tmp_path):
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 2))
    for layer, size in ((model[0], 6), (model[2], 8 * 4)):
        layer.weight.data[:, torch.randperm(size)[: size // 2]] = 0
    tk.methods.lower_columns(model)
    assert saved(model, torch.randn(4, 6, 4, 4), tmp_path / "lowered") == LOWERED
    check_loads(tmp_path / "lowered")
