"""Small layers whose gates are read off the gradients of weight and bias, not off their outputs.

With y = W x + b the sum of y·dy over all runs of a layer is Σ W g_W + Σ b g_b for each filter, as
it is γ g_γ + β g_β behind a norm. To look at outputs, as of squeezed images, takes a processor
longer than to compute them. But code that reads a weight elsewhere, a penalty in the loss or a
layer that is tied to it, adds to its gradient, and hooks of others may change the output. So the
first updates go both ways, and a layer is read off only once these agree. A penalty that the loss
gets later counts, as one on γ and β always does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taylor_kernels.statistics.hooks import steady
from taylor_kernels.statistics.hooks.sites import AT_MODULE, OUT, Site
from taylor_kernels.statistics.layers import channel_dim

#: What is linear in its weight and bias, and has an output filter for each row of both. A class of
#: others may compute its weight.
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Elements of a weight: its gradient is held until the update, and autograd makes a copy of it.
_MOST_WEIGHTS = 1 << 17


class SmallLayers:
    """Which of the layers at gate sites are read off.

    Args:
        at: the sites by their keys.
    """

    def __init__(self, at: Mapping[str, Site]) -> None:
        self._at = at
        self._agree: dict[nn.Module, bool] = {}

    def may_be_read(self, key: str, layer: nn.Module, output: Tensor) -> bool:
        """Whether the layer whose output this is has the form, and nothing was found against it.

        One that is read is read in all runs, since gradients say nothing of single ones.
        """
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        site = self._at.get(key)
        return (
            site is not None
            and (site.how, site.side) == (AT_MODULE, OUT)
            and self._agree.get(layer) is not False
            and type(layer) in _LINEAR
            and type(weight) is nn.Parameter  # and no part of one on several ranks
            and type(bias) is nn.Parameter
            and weight.requires_grad
            and bias.requires_grad
            and weight.numel() <= _MOST_WEIGHTS
            and (output.numel() <= steady.SMALL or self.is_read(layer))
            and site.dim == channel_dim(layer)  # type: ignore[arg-type]
        )

    def is_read(self, layer: nn.Module) -> bool:
        """Whether its output need not be looked at."""
        return self._agree.get(layer, False)

    def compare(self, layer: nn.Module, slopes: Tensor, seen: Tensor, dtype: torch.dtype) -> bool:
        """Whether the slopes [C] that were read are those seen at the output, of this dtype; a
        layer of which they are not is not read again.

        Zeros, and what has overflowed, show nothing.
        """
        if bool(seen.any()) and bool((seen.isfinite() & slopes.isfinite()).all()):
            off, size = (slopes - seen).norm(), seen.norm()
            same = bool(off <= torch.finfo(dtype).eps ** 0.5 * size)
            self._agree[layer] = self._agree.get(layer, True) and same
        return self._agree.get(layer, True)
