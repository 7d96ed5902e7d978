"""Layers without a norm behind them whose gates are read off the gradients of weight and bias.

A linear layer or convolution y = W x + b is linear in both, so over all of its runs

    Σ y·dy = Σ_j w_j g_{w,j} + b g_b

for each channel, and no hook has to stand behind it. That is so unless something else has a part in
these gradients (a penalty on the weight in the loss, code that multiplies by it elsewhere) or in
the output (hooks of others). So both are computed in one update, and the hook goes if they agree.
It is worth it where outputs are small, as of a squeezed image, and weights are: their gradients are
held until the pass is over, and autograd makes `.grad` of a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from taylor_kernels.statistics.hooks.gate_tables import Packed
from taylor_kernels.statistics.hooks.norm_slopes import NormSlopes, Read
from taylor_kernels.statistics.hooks.sites import Site
from taylor_kernels.statistics.layers import channel_dim

#: Elements of a weight that is small.
SMALL_WEIGHT = 1 << 16
#: The difference of all slopes of a layer over their size; sums in another order differ by less.
_AGREEMENT = 1e-3
_LINEAR = frozenset([nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d])


class LinearOutputs:
    """Finds out which layers may be read so.

    Args:
        slopes: reads them.

    Attributes:
        agreeing: of each that may, the key of its site.
    """

    def __init__(self, slopes: NormSlopes) -> None:
        self._slopes = slopes
        self._tried: set[str] = set()
        self._on_trial: dict[Read, str] = {}
        self.agreeing: dict[Read, str] = {}

    def compare(self, small: Sequence[Packed], earlier: Mapping[str, Tensor]) -> None:
        """Compare what came of outputs in an update with what their layers' gradients say.

        Args:
            small: the sums of the last pass.
            earlier: of passes before that, by the keys of sites, which are not compared.
        """
        if not self._on_trial:
            return
        outputs, weights = _by_key(small), _by_key(self._slopes.take(self._on_trial))
        for layer, key in list(self._on_trial.items()):
            if key not in outputs or key in earlier:
                continue
            del self._on_trial[layer]
            if key in weights and _agree(weights[key], outputs[key]):
                self.agreeing[layer] = key
            else:
                self._slopes.unwatch(layer)

    def put_on_trial(self, keys: Iterable[str], at: Mapping[str, Site], model: nn.Module) -> None:
        """Read the gradients of the layers at these sites too, from the next update on.

        Args:
            at: the sites by their keys.
        """
        for key in keys:
            if key in self._tried:
                continue
            self._tried.add(key)
            layer = model.get_submodule(at[key].module)
            if _is_small(layer, at[key]):
                self._on_trial[layer] = key  # type: ignore[index]
                self._slopes.watch(layer)  # type: ignore[arg-type]


def _is_small(layer: nn.Module, site: Site) -> bool:
    held = layer._parameters
    return (
        type(layer) in _LINEAR
        and all(type(held.get(n)) is nn.Parameter for n in ("weight", "bias"))
        and all(one is not None and one.requires_grad for one in held.values())
        and held["weight"] is not None
        and held["weight"].numel() <= SMALL_WEIGHT
        and held["weight"].size(0) == site.classes.numel()
        and channel_dim(layer) == site.dim  # type: ignore[arg-type]
    )


def _by_key(packed: Iterable[Packed]) -> dict[str, Tensor]:
    return {key: slopes for some in packed for key, slopes in some.each()}


def _agree(weights: Tensor, outputs: Tensor) -> bool:
    difference, size = (weights.to(outputs) - outputs).norm(), outputs.norm()
    return bool(difference <= _AGREEMENT * size) and bool(size > 0)
