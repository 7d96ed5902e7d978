"""What a meter scores, and where on the model it reads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from taylor_kernels.gate_sites import find_gate_sites
from taylor_kernels.statistics import (
    Layers,
    Statistic,
    find_layers,
    is_layer,
    parts_beside_layers,
)
from taylor_kernels.tracing import trace


def scored_layers(
    model: nn.Module, kind: type[Statistic], names: Sequence[str] | None, example_inputs: Any
) -> Layers:
    """The layers of these names, or all; of weights that no layer holds those that are named.

    Raises:
        ValueError: a name matches nothing that this statistic can be computed of.
    """
    return find_layers(
        model,
        names,
        trainable_only=kind.reads == "weight gradients",
        beside=partial(_beside_layers, model, example_inputs) if kind.reads_bare else None,
    )


def placed(
    model: nn.Module,
    kind: type[Statistic],
    layers: Layers,
    backend: str | None,
    example_inputs: Any,
) -> Statistic:
    """The statistic on these layers of a model; its gates stand where a trace says, if there are
    example inputs."""
    if example_inputs is None or not kind.at_gates:
        return kind(model, layers, backend)
    sites = find_gate_sites(trace(model, example_inputs), model, layers)
    if hidden := sites.hidden:
        warnings.warn(
            f"{', '.join(hidden)}: has filters whose channels no module is given or returns, "
            "so that no gate can stand there; their scores are nan (taylor_fo has some)",
            stacklevel=3,
        )
    return kind(model, layers, backend, sites)


def _beside_layers(
    model: nn.Module, example_inputs: Any
) -> Mapping[str, Sequence[tuple[str, int]]]:
    """What can be scored beside layers; a trace tells how weights that no layer holds are used."""
    known = {} if example_inputs is None else trace(model, example_inputs).bare
    return parts_beside_layers(model, is_layer, known)
