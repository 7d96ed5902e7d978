"""Avalanche: elastic weight consolidation with the Fisher diagonal that it is defined by.

    from taylor_kernels.integrations.avalanche import EWCPlugin

Avalanche squares the gradient of a minibatch's mean, which is the Fisher diagonal for batch size 1
alone. Here each example's gradient is squared, at any batch size, for about the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from taylor_kernels.integrations import absent
from taylor_kernels.parameter_fisher import ParameterFisher

try:
    from avalanche.models.utils import avalanche_forward
    from avalanche.training.plugins import ewc
    from avalanche.training.utils import zerolike_params_dict
except ModuleNotFoundError as error:
    raise absent(error, "avalanche", "avalanche-lib", "0.6.0") from error


class EWCPlugin(ewc.EWCPlugin):
    """Avalanche's `EWCPlugin`, whose importances are mean_n g_n² (Kirkpatrick et al., PNAS 2017).

    g_n is the gradient of example n's own loss; every named parameter has an importance, as with
    Avalanche's own plugin at batch size 1. The constructor, and what else it does, are Avalanche's.
    """

    def compute_importances(
        self,
        model: nn.Module,
        criterion: Any,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        device: Any,
        batch_size: int,
        num_workers: int = 0,
    ) -> dict[str, Any]:
        """mean_n g_n² of every named parameter, over the examples of a dataset.

        Args:
            model: left in train mode, as Avalanche leaves it; measured in eval mode.
            criterion: criterion(output, y), a mean over examples, or a sum where its `reduction`
                says so.
            optimizer: its gradients are cleared.
            dataset, batch_size, num_workers: as of a DataLoader; of a batch, the first is x, the
                second y and the last the task labels.
            device: where x and y are moved.

        Raises:
            ValueError: a criterion with reduction="none".
        """
        reduction: Any = getattr(criterion, "reduction", "mean")
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f"criterion: has reduction={reduction!r}, no scalar; give it 'mean' or 'sum'"
            )
        importances = zerolike_params_dict(model)
        optimizer.zero_grad()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return importances
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=getattr(dataset, "collate_fn", None),
            num_workers=num_workers,
        )
        with _measuring(model, device):
            fisher = ParameterFisher(model, reduction=reduction)
            try:
                for batch in loader:
                    x, y, tasks = batch[0].to(device), batch[1].to(device), batch[-1]
                    fisher.update(
                        closure=lambda x=x, y=y, tasks=tasks: criterion(  # type: ignore[misc]
                            avalanche_forward(model, x, tasks), y
                        )
                    )
                for name, diagonal in fisher.compute().items():
                    importances[name].data = diagonal.to(importances[name].data.dtype)
            finally:
                fisher.close()
        return importances


@contextmanager
def _measuring(model: nn.Module, device: Any) -> Iterator[None]:
    """Eval mode, but for what cuDNN does not differentiate in it; train mode again afterwards."""
    model.eval()
    if torch.device(device).type == "cuda":
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.train()
    try:
        yield
    finally:
        model.train()
