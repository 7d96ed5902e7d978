"""Plain training, evaluation and measuring: what knows nothing of pruning."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taylor_kernels.studies.data import Split, minibatches
from taylor_kernels.tracing.run.running import call, tensors_in


@dataclass(frozen=True)
class Schedule:
    """How a network is trained: momentum SGD under a cosine that falls from `lr` to 0."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float


def train(
    model: nn.Module,
    data: Split,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
    on_epoch: Callable[[str], None] = lambda note: None,
) -> float:
    """Train a model in place; the last epoch's mean loss.

    Args:
        generator: draws the order of the examples.
        optimizer: goes on with this one, state included; its learning rate is overwritten.
        on_epoch: called after each epoch with a short note.
    """
    optimizer = optimizer or sgd(model, schedule.lr, schedule.weight_decay)
    per_epoch = len(data) // schedule.batch_size
    cosine = _restarted_cosine(optimizer, schedule.lr, schedule.epochs * per_epoch)
    model.train()
    loss_sum = torch.zeros((), device=data.labels.device)
    for _ in range(schedule.epochs):
        loss_sum.zero_()
        for images, labels in minibatches(data, schedule.batch_size, generator):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            cosine.step()
            loss_sum += loss.detach()
        on_epoch(f"loss {loss_sum.item() / per_epoch:.3f}")
    return loss_sum.item() / max(per_epoch, 1)


def sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.SGD:
    """The optimizer of the studies; decay reaches weights only, not BatchNorm or biases."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay)


def _restarted_cosine(
    optimizer: torch.optim.Optimizer, lr: float, steps: int
) -> torch.optim.lr_scheduler.CosineAnnealingLR:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))


@torch.no_grad()
def evaluate(model: nn.Module, data: Split) -> float:
    """Top-1 accuracy, 0 to 1, in eval mode; the model's mode is put back."""
    training = model.training
    model.eval()
    hits = (model(data.images).argmax(1) == data.labels).sum().item()
    model.train(training)
    return hits / len(data)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Output filters, or neurons, of each convolution and linear layer by name."""
    return {
        name: module.weight.size(0)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def count_flops(model: nn.Module, example: Tensor) -> int:
    """FLOPs of a forward pass on `example`, two per multiply-add, by torch.utils.flop_counter."""
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    model.train(training)
    return counter.get_total_flops()


@torch.no_grad()
def latencies(
    models: Mapping[str, nn.Module],
    inputs: Any,
    *,
    repeats: int,
    on_repeat: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of each model on `inputs`: median and quartiles.

    Inputs are a tensor, a tuple of arguments or a dict of keyword arguments. Each round times every
    model once, in alternating order, so that a machine that slows down slows all of them alike.
    """
    for model in models.values():
        model.eval()
        for _ in range(3):
            call(model, inputs)
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats):
        for name in list(models)[:: 1 if repeat % 2 == 0 else -1]:
            times[name].append(_milliseconds(models[name], inputs))
        on_repeat()
    return {name: _quartiles(values) for name, values in times.items()}


def _milliseconds(model: nn.Module, inputs: Any) -> float:
    device = next((tensor.device for tensor in tensors_in(inputs)), torch.device("cpu"))
    _wait_for(device)
    start = time.perf_counter()
    call(model, inputs)
    _wait_for(device)
    return (time.perf_counter() - start) * 1e3


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high}
