"""What a network has come to when filters or blocks of it are gone, and how long a batch takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import nn

from taylor_kernels.pruning.blocks import remove_blocks
from taylor_kernels.pruning.removing.removal import remove
from taylor_kernels.studies.methods.problems import DATA, NETWORKS
from taylor_kernels.studies.methods.study import Trial
from taylor_kernels.studies.training import (
    count_flops,
    count_parameters,
    evaluate,
    latencies,
    layer_widths,
)
from taylor_kernels.tracing import trace

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json

BATCH = 64


def facts_of_shape(trial: Trial, model: nn.Module, blocks: Sequence[str] = ()) -> Json:
    """Accuracy, shares of parameters and FLOPs that are left, and the filters of each layer but
    the last, which has the outputs.

    Args:
        blocks: names of the residual blocks that are gone.
    """
    whole = trial.untrained()
    example = trial.data.test.images[:1]
    left = layer_widths(model)
    widths = list(layer_widths(whole).items())[:-1]
    return {
        "accuracy": evaluate(model, trial.data.test),
        "params": count_parameters(model) / count_parameters(whole),
        "flops": count_flops(model, example) / count_flops(whole, example),
        "blocks": list(blocks),
        "filters": [[name, left.get(name, 0), count] for name, count in widths],
    }


def rebuilt(run: Json) -> nn.Module:
    """A network of the shape that a run has come to, untrained: all that its latency depends on."""
    images = DATA[run["data"]](run["seed"]).test.images[:1]
    model = NETWORKS[run["network"]](images.shape[1:])
    blocks, _ = trace(model, images, blocks=True).find_blocks(model)
    remove_blocks(model, [block for block in blocks if block.name in run["blocks"]])
    channels = trace(model, images)
    left = {name: kept for name, kept, _ in run["filters"]}
    dead = [torch.arange(group.size) >= left[group.producers[0].owner] for group in channels.groups]
    remove(model, channels, dead)
    return model


def milliseconds(runs: Sequence[Json], repeats: int = 25) -> list[float]:
    """Of each run's network the median time of a batch, in turns with all others' in one process.

    The runs are of one problem.
    """
    images = DATA[runs[0]["data"]](0).test.images[:BATCH]
    models = {str(number): rebuilt(run) for number, run in enumerate(runs)}
    return [
        quartiles["median"] for quartiles in latencies(models, images, repeats=repeats).values()
    ]


def latency_words(result: Json, runs: Sequence[Json]) -> str:
    """Of a way's runs on a problem, over the dense networks' mean; for a table."""
    speed = result.get("speed", {}).get("relative", {})
    found = speed.get(", ".join((runs[0]["network"], runs[0]["data"])), {}).get(runs[0]["way"])
    return f"{mean(found):.2f} ({min(found):.2f}–{max(found):.2f})" if found else "–"


def speed_words(relative: Mapping[str, Mapping[str, Sequence[float]]], way: str) -> str:
    """How much faster a batch is, where that is more than dense networks of one shape differ by.

    Args:
        relative: problem -> way -> latency of each seed's network over the dense ones' mean.
    """
    # Noise is the machine's and not a network's, so that the noisiest of all is asked.
    noise = max(max(each["dense"]) - min(each["dense"]) for each in relative.values())
    gains = {name: mean(each[way]) for name, each in relative.items()}
    said = [f"{1 / left:.2f}× ({name})" for name, left in gains.items() if 1 - left > noise]
    return f"a batch faster by {', '.join(said)}" if said else "–"


#: What the caption of a table with `latency_words` says of them.
LATENCY_CAPTION = (
    "Latency: of a batch of 64 on one CPU thread, over the mean of the dense networks in the same "
    "process; mean and range of three seeds. Dense networks are all of one shape, so that their "
    "range is what the machine adds."
)
