"""Torch-Pruning's dependency graph of a model, from a run on its example inputs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.pruning.model_run import call, tensors_in


def trace(model: nn.Module, example_inputs: Any) -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "tk.Pruner needs Torch-Pruning for the dependency graph: pip install torch-pruning"
        ) from error
    model.requires_grad_(True)

    def forward(model: nn.Module, inputs: Any) -> list[Tensor]:
        # Multiplied by one, every output becomes a node of its own: Torch-Pruning marks an
        # output as such only if no layer computes it directly.
        outputs = tensors_in(call(model, inputs))
        return [out * 1 for out in outputs if out.requires_grad]

    graph = torch_pruning.DependencyGraph()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return graph.build_dependency(model, example_inputs, forward_fn=forward, verbose=False)
