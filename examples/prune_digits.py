"""Trains a small network on scikit-learn's digits, then prunes it to half its FLOPs."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import taylor_kernels as tk

torch.manual_seed(0)
images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16  # 1797 of them
loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=32, shuffle=True)

body: list[nn.Module] = []
for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
    body += [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()]
model = nn.Sequential(*body, nn.Flatten(), nn.Linear(64 * 2 * 2, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(pruner=None):
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if pruner:
            pruner.step()  # after backward(), before optimizer.step()
        optimizer.step()


def report(name):
    with torch.no_grad():
        right = (model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean()
    print(f"{name}: {right:.1%} right, {sum(p.numel() for p in model.parameters()):,} parameters")


for _ in range(6):
    train()
report("dense")

pruner = tk.Pruner(model, images[:1], criterion="taylor_fo_bn", flops=0.5, optimizer=optimizer)
while not pruner.done:
    train(pruner)
model = pruner.compact()  # the filters are gone for good; the optimizer is cut to match
train()  # training goes on
report("pruned")
torch.save(model, "pruned.pt")
