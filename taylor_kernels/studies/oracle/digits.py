"""The networks of the study: trained on digits, from the start or from an earlier run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from taylor_kernels.progress import ProgressLog
from taylor_kernels.studies.oracle.pieces import Pieces, digest_source
from taylor_kernels.studies.oracle.problem import Problem, inner_layers
from taylor_kernels.studies.oracle.settings import Recipe
from taylor_kernels.studies.pruning.data import (
    CLASSES,
    IMAGE_SHAPE,
    Split,
    load_digits,
    minibatches,
)
from taylor_kernels.studies.pruning.model import DigitsResNet
from taylor_kernels.studies.pruning.store import load_weights, save_weights
from taylor_kernels.studies.pruning.training import evaluate, train

#: Images that the oracle evaluates at once: few enough that activations stay in the cache.
_CHUNK = 256


class DigitsCnn(nn.Sequential):
    """Three 3x3 convolutions of 16, 32 and 48 filters with BatchNorm, and a linear classifier.

    Takes [N, 1, 8, 8] and gives logits [N, 10].
    """

    def __init__(self) -> None:
        def block(channels_in: int, channels_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

        super().__init__(
            *block(IMAGE_SHAPE[0], 16),
            *block(16, 32),
            nn.MaxPool2d(2),
            *block(32, 48),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(48, CLASSES),
        )


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
    recipe: Recipe,
    device: torch.device,
    pieces: Pieces,
    log: ProgressLog,
) -> tuple[Problem, dict[str, float]]:
    """A trained network with its data; and its accuracy on the training images, as a fact.

    The criteria see one epoch of minibatches, the oracle all training images at once, and the
    pruning curves are measured on the test images.
    """
    data = load_digits(seed).to(device)
    name = f"{architecture}, seed {seed}"
    model = _trained(architecture, seed, data.train, recipe, pieces, log)
    batches = list(minibatches(data.train, recipe.batch_size, _generator(seed)))
    layers, _ = inner_layers(model, batches[0][0])
    problem = Problem(
        name,
        model,
        layers,
        batches,
        whole=list(
            zip(data.train.images.split(_CHUNK), data.train.labels.split(_CHUNK), strict=True)
        ),
        test=[(data.test.images, data.test.labels)],
        loss=F.cross_entropy,
        classifies=True,
    )
    return problem, {"train_accuracy": evaluate(model, data.train)}


def fine_tune(model: nn.Module, seed: int, recipe: Recipe, device: torch.device) -> None:
    """Train the network further, as it is to be after pruning."""
    train(
        model,
        load_digits(seed).to(device).train,
        epochs=recipe.finetune_epochs,
        batch_size=recipe.batch_size,
        lr=recipe.finetune_lr,
        weight_decay=recipe.weight_decay,
        generator=_generator(seed),
    )


def _trained(
    architecture: str, seed: int, data: Split, recipe: Recipe, pieces: Pieces, log: ProgressLog
) -> nn.Module:
    torch.manual_seed(seed)
    make, _ = ARCHITECTURES[architecture]
    model = make().to(data.images.device)
    decides = ("threads", "epochs", "batch_size", "lr", "weight_decay")
    settings = {name: getattr(recipe, name) for name in decides} | {
        "architecture": architecture,
        "seed": seed,
        "device": data.images.device.type,
        "torch": torch.__version__,
        "code": digest_source(model, train, load_digits),
    }
    file = pieces.file("network", settings, "safetensors")
    try:
        known = load_weights(model, file)
    except ValueError as error:
        log.say(f"{error}; training again")
        known = False
    if not known:
        with log.task(f"{architecture}, seed {seed}: train", recipe.epochs) as advance:
            train(
                model,
                data,
                epochs=recipe.epochs,
                batch_size=recipe.batch_size,
                lr=recipe.lr,
                weight_decay=recipe.weight_decay,
                generator=_generator(seed),
                on_epoch=advance,
            )
        save_weights(model, file)
    return model.eval()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
