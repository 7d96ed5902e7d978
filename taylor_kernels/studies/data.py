"""The digits that scikit-learn ships: 1,797 real scanned digits of 8x8 pixels, nothing to download.

Images are float32 [N, 1, 8, 8], normalised with the mean and deviation of the training split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 10
IMAGE_SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Split:
    """Images [N, 1, 8, 8] float32 and their labels [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Digits:
    """A training and a test split that share no image, and where each row came from.

    `train_rows` and `test_rows` are row numbers in scikit-learn's table; `mean` and `std` are those
    of the training pixels, whose raw values are 0 to 16.
    """

    train: Split
    test: Split
    train_rows: Tensor
    test_rows: Tensor
    mean: float
    std: float

    def to(self, device: torch.device | str) -> Digits:
        return Digits(
            self.train.to(device),
            self.test.to(device),
            self.train_rows,
            self.test_rows,
            self.mean,
            self.std,
        )


def load_digits(seed: int = 0, test_fraction: float = 0.25) -> Digits:
    """The digits, shuffled by `seed` and split.

    Raises:
        ValueError: `test_fraction` leaves no image for one of the splits.
    """
    from sklearn.datasets import load_digits as load  # takes a second to import

    pixels, targets = load(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, *IMAGE_SHAPE)
    labels = torch.from_numpy(targets).long()
    held_out = round(len(labels) * test_fraction)
    if not 0 < held_out < len(labels):
        raise ValueError(f"test_fraction: {test_fraction} leaves a split empty; try 0.25")

    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test_rows, train_rows = rows[:held_out], rows[held_out:]
    mean, std = images[train_rows].mean().item(), images[train_rows].std().item()
    images = (images - mean) / std
    return Digits(
        Split(images[train_rows], labels[train_rows]),
        Split(images[test_rows], labels[test_rows]),
        train_rows,
        test_rows,
        mean,
        std,
    )


def minibatches(
    split: Split, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in an order drawn from `generator` (a CPU one); a last short batch is left out.

    Short batches are dropped because BatchNorm and per-minibatch scores would weigh them alike.
    """
    order = torch.randperm(len(split), generator=generator).to(split.labels.device)
    for start in range(0, len(split) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield split.images[chosen], split.labels[chosen]
