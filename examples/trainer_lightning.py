"""Prunes a network to half of its FLOPs while Lightning trains it, two batches to a step."""

import torch
from lightning import pytorch as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from taylor_kernels.integrations.lightning import PruningCallback


class Classifier(pl.LightningModule):
    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


model = Classifier()
model.net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3), nn.Flatten())
data = TensorDataset(torch.randn(64, 3, 6, 6), torch.randint(16, (64,)))
pruning = PruningCallback(data[:1][0], model="net", flops=0.5, every=2)
trainer = pl.Trainer(max_epochs=50, callbacks=[pruning], accumulate_grad_batches=2)
trainer.fit(model, DataLoader(data, 8))
