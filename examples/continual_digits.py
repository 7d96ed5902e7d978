"""Five pairs of digits, one after the other: what EWC keeps of the earlier ones."""

import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from taylor_kernels.integrations.avalanche import EWCPlugin

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.images).float().flatten(1) / 16, torch.tensor(digits.target)
pairs = [TensorDataset(x[y // 2 == p], y[y // 2 == p] % 2) for p in range(5)]
for pair in pairs:
    pair.targets = pair.tensors[1].tolist()
stream = benchmark_from_datasets(train=[as_classification_dataset(pair) for pair in pairs])
model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 2))
plugin = EWCPlugin(ewc_lambda=10.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
strategy = Naive(
    model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), train_mb_size=32,
    train_epochs=3, plugins=[plugin], evaluator=EvaluationPlugin(),
)  # fmt: skip
for experience in stream.train_stream:
    strategy.train(experience)
with torch.no_grad():
    right = [(model(pair.tensors[0]).argmax(1) == pair.tensors[1]).float().mean() for pair in pairs]
print("accuracy of each pair at the end:", " ".join(f"{float(share):.2f}" for share in right))
