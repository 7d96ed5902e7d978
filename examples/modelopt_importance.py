"""Model-Optimizer's search space with Taylor scores: channels are sorted by them, and cut."""

import modelopt.torch.nas as mtn
import torch
from modelopt.torch.nas.utils import sort_parameters
from torch import nn

import taylor_kernels as tk
from taylor_kernels.integrations.modelopt import use_importance

model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 4, 3))
importance = tk.Importance(model, "taylor_fo_bn")
model(torch.randn(8, 3, 16, 16)).square().mean().backward()
importance.update()
importance.close()
model = mtn.convert(model, "fastnas")
print(use_importance(model, importance))
sort_parameters(model)  # as mtn.search does, which also picks the widths
model[0].get_hparam("out_channels").active = 32
model = mtn.export(model)
