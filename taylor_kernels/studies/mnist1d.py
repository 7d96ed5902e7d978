"""MNIST-1D: ten shapes as signals of 40 samples, shifted, sheared and noisy, made on the machine.

Greydanus and Kobak, "Scaling Down Deep Learning with MNIST-1D" (ICML 2024); package `mnist1d`.
Signals are float32 [N, 1, 1, 40], images of one row, so that networks for images take them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from taylor_kernels.studies.data import Split

SIGNAL_SHAPE = (1, 1, 40)


@dataclass(frozen=True)
class Signals:
    """A training and a test split that share no signal."""

    train: Split
    test: Split


def load_mnist1d(seed: int = 0, examples: int = 5000) -> Signals:
    """Signals drawn by `seed`: four fifths to train on, the rest to test.

    The generators of `random` and NumPy, which the package seeds, are left as they were.
    """
    from mnist1d.data import get_dataset_args, make_dataset  # takes a second to import

    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        arguments = get_dataset_args()
        arguments.seed, arguments.num_samples = seed, examples
        made = make_dataset(arguments)
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)

    def split(kind: str) -> Split:
        signals = torch.from_numpy(made["x" + kind]).float().view(-1, *SIGNAL_SHAPE)
        return Split(signals, torch.from_numpy(made["y" + kind]).long())

    return Signals(split(""), split("_test"))
