"""Opacus's fast gradient clipping without the gradients of examples, convolutions included."""

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from taylor_kernels.integrations.opacus import register_norm_samplers

register_norm_samplers()
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
data = DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,))), 16)
private, optimizer, criterion, data = PrivacyEngine().make_private(
    module=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), data_loader=data,
    criterion=nn.CrossEntropyLoss(), noise_multiplier=1, max_grad_norm=1, grad_sample_mode="ghost",
)  # fmt: skip
for x, y in data:
    optimizer.zero_grad()
    criterion(private(x), y).backward()
    optimizer.step()
