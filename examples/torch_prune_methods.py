"""torch.nn.utils.prune with scores of this package: single weights of all layers, then filters."""

import torch
from torch import nn
from torch.nn.utils import prune

import taylor_kernels as tk
from taylor_kernels.integrations.torch_prune import structured, unstructured

model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
importance = tk.Importance(model, "taylor_fo_bn")
model(torch.randn(8, 3, 16, 16)).square().mean().backward()
importance.update()
weights = [(model[0], "weight"), (model[3], "weight")]
prune.global_unstructured(weights, unstructured(model), amount=0.5)
structured(model, importance).apply(model[0], "weight", amount=4)
prune.remove(model[0], "weight")
print(f"{float((model[0].weight == 0).float().mean()):.0%} of the first weight are 0")
