"""BackPACK's second moment and norms of single gradients: one import differs."""

import torch
from backpack import backpack, extend
from torch import nn

from taylor_kernels.integrations.backpack import BatchL2Grad, SumGradSquared

model = extend(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)))
loss = nn.functional.cross_entropy(model(torch.randn(16, 3, 8, 8)), torch.randint(0, 4, (16,)))
with backpack(SumGradSquared(), BatchL2Grad()):
    loss.backward()
for name, parameter in model.named_parameters():
    print(name, parameter.sum_grad_squared.shape, parameter.batch_l2.shape)
