"""Torch-Pruning with the drop-in importance: one import differs."""

import torch
import torch_pruning as tp
from torch import nn

from taylor_kernels.integrations.torch_pruning import GroupTaylorImportance

model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 4, 3))
x = torch.randn(8, 3, 16, 16)
pruner = tp.pruner.BasePruner(
    model, x, GroupTaylorImportance(), pruning_ratio=0.5, ignored_layers=[model[3]]
)
model(x).square().mean().backward()
pruner.step()
print(model)
