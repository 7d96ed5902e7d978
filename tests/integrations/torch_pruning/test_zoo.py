"""What pruners keep of networks of all kinds: in strict mode, the channels of Torch-Pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from taylor_kernels.integrations.torch_pruning import (
    GroupHessianImportance,
    GroupTaylorImportance,
)
from tests.zoo.language import llama
from tests.zoo.packages import missing
from tests.zoo.vision import pytorchcv

Built = tuple[nn.Module, Tensor, dict[str, Any]]


def _image_network(name: str) -> Callable[[], Built]:
    def build() -> Built:
        model, x = pytorchcv(name, 32)
        head = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
        return model.eval(), x, dict(ignored_layers=[head])

    return build


class Attention(nn.Module):
    """Attention of a ViT, written out: its heads are not pruned, what is in them is."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        found = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class ViT(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


def _vit() -> Built:
    model = ViT()
    heads = {f: 4 for b in model.blocks for f in (b.attention.q, b.attention.k, b.attention.v)}
    return model, torch.randn(1, 3, 16, 16), dict(ignored_layers=[model.head], num_heads=heads)


def _llama() -> Built:
    """Its rotary embedding must not be traced: Torch-Pruning does not come to an end of it."""
    model, inputs = llama("eager")
    heads = {}
    for module in model.modules():
        if hasattr(module, "q_proj"):
            heads |= {module.q_proj: 4, module.k_proj: 2, module.v_proj: 2}
    model.config.use_cache = False
    options = dict(
        ignored_layers=[model.lm_head], num_heads=heads, prune_num_heads=True,
        prune_head_dims=False, head_pruning_ratio=0.5, output_transform=lambda out: out.logits,
    )  # fmt: skip
    return model, inputs["input_ids"], options


ZOO: dict[str, tuple[str, Callable[[], Built]]] = {
    "resnet": ("pytorchcv", _image_network("resnet20_cifar10")),
    "densenet": ("pytorchcv", _image_network("densenet40_k12_cifar10")),
    "mobilenet": ("pytorchcv", _image_network("mobilenetv2_wd4")),
    "resnext": ("pytorchcv", _image_network("resnext20_16x4d_cifar10")),
    "vit": ("", _vit),
    "llama": ("transformers", _llama),
}


@pytest.fixture(params=ZOO)
def built(request, monkeypatch) -> Built:
    package, build = ZOO[request.param]
    if why := missing(package):
        pytest.skip(why)
    if request.param == "llama":
        from transformers.models.llama import modeling_llama

        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
    return build()


def kept(model: nn.Module, x: Tensor, options: dict[str, Any], importance: Any) -> list[Any]:
    """What is pruned of each group, by the channels of its root."""
    pruner = tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, **options)
    pruned = []
    for group in pruner.step(interactive=True):
        pruned.append((pruner.DG._module2name[group[0].dep.target.module], group[0].idxs))
        group.prune()
    transform = options.get("output_transform", lambda out: out)
    assert transform(model(x)).isfinite().all()
    return pruned


@pytest.mark.sample
@pytest.mark.parametrize("kind", ["taylor", "hessian"])
def test_the_same_channels_are_kept(built, kind):
    model, x, options = built
    transform = options.get("output_transform", lambda out: out)
    transform(model(x)).square().mean().backward()
    ours, theirs = {
        "taylor": (GroupTaylorImportance, tp.importance.GroupTaylorImportance),
        "hessian": (GroupHessianImportance, tp.importance.GroupHessianImportance),
    }[kind]
    found = []
    for importance in (ours(strict_compat=True), theirs()):
        mine, mine_x, mine_options = copy.deepcopy((model, x, options))
        for parameter, own in zip(mine.parameters(), model.parameters(), strict=True):
            parameter.grad = None if own.grad is None else own.grad.clone()
        if kind == "hessian":
            importance.accumulate_grad(mine)
        found.append(kept(mine, mine_x, mine_options, importance))
    assert found[0]
    assert found[0] == found[1]
