"""The networks of the study: trained on digits, from the start or from an earlier run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from taylor_kernels.studies.data import load_digits, minibatches
from taylor_kernels.studies.networks import DigitsCnn, DigitsResNet
from taylor_kernels.studies.oracle.problem import Problem, inner_layers
from taylor_kernels.studies.training import Schedule, evaluate, train
from taylor_kernels.studies.weights import trained_network

if TYPE_CHECKING:
    from taylor_kernels.studies.cache import Cache
    from taylor_kernels.studies.progress import ProgressLog

#: Images that the oracle evaluates at once: few enough that activations stay in the cache.
_CHUNK = 256

ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "cnn": (DigitsCnn, "a plain CNN of 16-32-48 filters with BatchNorm"),
    "resnet": (
        partial(DigitsResNet, width=16, blocks=1),
        "a ResNet of three blocks with skip connections, 16-32-64 channels",
    ),
}


def digits_problem(
    architecture: str,
    seed: int,
    schedule: Schedule,
    device: torch.device,
    cache: Cache,
    log: ProgressLog,
) -> tuple[Problem, dict[str, float]]:
    """A trained network with its data; and its accuracy on the training images, as a fact.

    The criteria see one epoch of minibatches, the oracle all training images at once, and the
    pruning curves are measured on the test images.
    """
    data = load_digits(seed).to(device)
    name = f"{architecture}, seed {seed}"
    make, _ = ARCHITECTURES[architecture]
    made = trained_network(make, seed, data.train, schedule, cache, log, label=f"{name}: train")
    model = made.model.eval()
    batches = list(minibatches(data.train, schedule.batch_size, _generator(seed)))
    layers, _ = inner_layers(model, batches[0][0])
    problem = Problem(
        name,
        model,
        layers,
        batches,
        oracle_batches=list(
            zip(data.train.images.split(_CHUNK), data.train.labels.split(_CHUNK), strict=True)
        ),
        test_batches=[(data.test.images, data.test.labels)],
        loss=F.cross_entropy,
        classifies=True,
    )
    return problem, {"train_accuracy": evaluate(model, data.train)}


def fine_tune(model: nn.Module, seed: int, schedule: Schedule, device: torch.device) -> None:
    """Train the network further, as it is to be after pruning."""
    train(model, load_digits(seed).to(device).train, schedule, generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
