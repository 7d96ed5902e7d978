"""obd_fisher by a loop over examples that forms every weight gradient, and by Importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk
from tests.helpers import nets

Batch = tuple[Tensor, Tensor]


def by_loop(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor] = nets.loss_of,
) -> dict[str, Tensor]:
    """½ Σ_k w_k² · mean_n (gradient of example n's own loss)², every example alone."""
    layers = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    }
    ones = [(x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)]
    total = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for one in ones:
        weights = [layer.weight for layer in layers.values()]
        grads = torch.autograd.grad(loss(model, one), weights, allow_unused=True)
        for name, grad in zip(layers, grads, strict=True):
            total[name] += 0 if grad is None else grad.square()
    return {
        name: nets.filters_first(layer, total[name] * layer.weight.square()).sum(1).detach()
        / (2 * len(ones))
        for name, layer in layers.items()
    }


def metered(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor] = nets.loss_of,
    **options,
) -> dict[str, Tensor]:
    """One update over all batches, whose mean is the mean over their examples."""
    imp = tk.Importance(model, "obd_fisher", **options)
    for batch in batches:
        loss(model, batch).backward()
    imp.update()
    scores = imp.compute()
    imp.close()
    return scores


def close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert want.abs().max() > 0, name
        torch.testing.assert_close(got[name].double(), want.double(), rtol=rtol, atol=0)


def half_squares(model: nn.Module, batch: Batch) -> Tensor:
    """A loss that is a mean over examples, of a model with any output."""
    out = model(batch[0])
    weights = torch.linspace(-1, 2, out[0].numel(), dtype=out.dtype).view(out[0].shape)
    return ((out * weights - batch[1].view(-1, *[1] * (out.dim() - 1))).square() / 2).sum() / len(
        out
    )


def random_batch(*shape: int, n: int = 5) -> Batch:
    return torch.randn(n, *shape, dtype=torch.float64), torch.randn(n, dtype=torch.float64)


class Twice(nn.Module):
    """Every layer is used twice, on inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.deep = nn.Conv3d(1, 1, 2)
        self.up = nn.ConvTranspose1d(4, 4, 3, groups=2)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.max_pool2d(self.conv(x).sigmoid(), 2)).tanh()
        x = self.deep(self.deep(x.unsqueeze(1)).sigmoid()).flatten(1)
        x = x.view(len(x), 4, -1)
        x = self.up(self.up(x).tanh()).transpose(1, 2)
        return self.fc(self.fc(x).tanh().mean(1))
