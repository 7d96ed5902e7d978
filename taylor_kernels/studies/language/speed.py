"""Speed and memory of the dense model and of pruned ones that were kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.studies.language.training import byte_loss
from taylor_kernels.studies.memory import peak_bytes
from taylor_kernels.studies.training import count_parameters, latencies

if TYPE_CHECKING:
    from taylor_kernels.studies.language.measure import Cell, Measurement
    from taylor_kernels.studies.results import Json


def measure_speed(measured: Measurement, dense: nn.Module, cells: Sequence[Cell]) -> Json:
    """Forward passes and training steps: tokens a second, and bytes at their peaks.

    The models are timed in turns, in one process, so that a machine that slows down slows all of
    them alike.

    Args:
        cells: whose models were kept.

    Returns:
        `tokens` of a pass, and for each name ("dense", or kind and fraction) the figures.
    """
    models = {"dense": dense}
    for cell in cells:
        fresh, file = measured.untrained(), measured.pruned_file(cell)
        models[f"{cell.kind} {cell.fraction:g}"] = tk.load_pruned(fresh, file)
    recipe = measured.recipe
    windows = measured.windows(recipe.recovery.windows)
    with measured.log.task("tokens a second", recipe.repeats) as advance:
        times = latencies(models, windows[:, :-1], repeats=recipe.repeats, on_repeat=advance)
    tokens = windows[:, :-1].numel()
    found: Json = {}
    for name, model in models.items():
        model.zero_grad()
        weights = sum(p.nbytes for p in model.parameters())
        found[name] = {
            "parameters": count_parameters(model),
            "milliseconds": times[name],
            "tokens_per_second": 1e3 * tokens / times[name]["median"],
            "ratio": times["dense"]["median"] / times[name]["median"],
            "weights": weights,
            "forward": weights + _forward_peak(model, windows),
            "step": weights + _step_peak(model, windows),
        }
        model.zero_grad()
    return {"tokens": tokens, "models": found}


def _forward_peak(model: nn.Module, windows: Tensor) -> int:
    def forward() -> None:
        with torch.no_grad():
            model(windows[:, :-1])

    return peak_bytes(forward)


def _step_peak(model: nn.Module, windows: Tensor) -> int:
    return peak_bytes(lambda: byte_loss(model, windows).backward())
