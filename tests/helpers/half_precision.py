"""A small network, its minibatches, and their gradients in half precision under a loss scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def network():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )
    nn.init.normal_(model[1].weight, 1.0, 0.3)
    nn.init.normal_(model[4].weight, 1.0, 0.3)
    return model


def batches(count=4):
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(8, 1, 8, 8, generator=generator),
            torch.randint(10, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def gradients(model, optimizer, scaler, batch, dtype=torch.float16):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    scaler.scale(loss).backward()
