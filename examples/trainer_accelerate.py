"""Prunes a network to half of its FLOPs in a loop of Accelerate's, two batches to a step."""

import torch
from accelerate import Accelerator
from torch import nn

from taylor_kernels.integrations.accelerate import AcceleratedPruner

accelerator = Accelerator(gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model, optimizer = accelerator.prepare(model, optimizer)
pruner = AcceleratedPruner(accelerator, model, torch.randn(1, 8), optimizer=optimizer, flops=0.5)
while not pruner.done:
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.randn(16, 8, device=accelerator.device)).square().mean())
        pruner.step()  # scores where the optimizer steps
        optimizer.step()
        optimizer.zero_grad()
model = pruner.compact()
