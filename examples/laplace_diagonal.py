"""A Laplace approximation of all weights with laplace-torch: the backend is ours."""

import torch
from laplace import Laplace
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from taylor_kernels.integrations.laplace import TKGGN

data = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,)))
body = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()
model = nn.Sequential(*body, nn.Linear(16 * 36, 4))

la = Laplace(model, "classification", "all", "diag", backend=TKGGN)
la.fit(DataLoader(data, batch_size=16))
print(la.log_marginal_likelihood(), la(data[:2][0]))
