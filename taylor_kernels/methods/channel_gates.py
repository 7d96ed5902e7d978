"""Gates of channels: γ of the norms behind them, and which of some gates are as good as none."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.pruning.removing.optimizer_state import optimizers_in
from taylor_kernels.pruning.removing.removal import lookup


class ChannelGates:
    """γ of the norms behind the channels of a model's groups, shrunk by a soft threshold.

    Args:
        trained: parameters; a γ that is not among them gates nothing.
    """

    def __init__(self, model: nn.Module, trained: Container[Tensor]) -> None:
        self._model = model
        self._trained = {name for name, p in model.named_parameters() if p in trained}

    def of(self, group: Group) -> list[str]:
        """The scales that gate a group's channels: names of parameters."""
        return [n for norm in group.norms if (n := f"{norm}.weight") in self._trained]

    @torch.no_grad()
    def shrink(
        self, groups: Iterable[Group], rates: Mapping[Tensor, float], strength: float
    ) -> None:
        """Bring every γ nearer to 0 by its learning rate times the strength of the penalty."""
        for name in {name for group in groups for name in self.of(group)}:
            scale = lookup(self._model, name)
            shrunk = scale.abs() - rates[scale] * strength
            scale.copy_(scale.sign() * shrunk.clamp_min(0))

    def shares(self, group: Group, dead: Tensor, tolerance: float) -> Tensor:
        """[U] float64: the share of Σ γ² up to each unit, inf above the tolerance.

        Raises:
            RuntimeError: γ is not finite.
        """
        energy = torch.zeros(group.size, dtype=torch.float64)
        names = self.of(group)
        for entry in group.entries:
            if entry.tensor in names:
                scale = lookup(self._model, entry.tensor).detach().double().cpu()
                if not scale.isfinite().all():
                    raise RuntimeError(f"{entry.tensor}: it is not finite, so nothing was pruned")
                energy += scale[entry.index].square().sum(1)
        found = torch.full_like(energy, torch.inf)
        if names:
            found[~dead] = shares(energy[~dead], tolerance)
        return found


def learning_rates(optimizer: object) -> dict[Tensor, float]:
    """Parameter -> its learning rate, in one optimizer or several."""
    return {
        parameter: float(group["lr"])
        for one in optimizers_in(optimizer)
        for group in one.param_groups
        for parameter in group["params"]
    }


def shares(energies: Tensor, tolerance: float) -> Tensor:
    """[n] float64: the share of the sum that each value and all smaller ones make up; inf above
    the tolerance, and for values that are nan."""
    known = energies.nan_to_num(nan=torch.inf)
    order = known.argsort(stable=True)
    total = energies.nansum()
    found = torch.empty_like(energies)
    found[order] = known[order].cumsum(0) / total if total > 0 else torch.zeros_like(energies)
    return torch.where(known.isinf() | (found > tolerance), torch.inf, found)
