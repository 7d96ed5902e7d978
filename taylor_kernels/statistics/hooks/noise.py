"""Gates whose gradient is rounding noise: a sum of terms that undo each other.

A normalisation that divides a channel by its own scale makes the loss blind to a gate in front of
it: Σ y·dy over what it normalises is 0, and a float holds the rounding of its terms. What is no
more than that in most filters of a layer says nothing of them, and must not be ranked as small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from taylor_kernels.layout import accumulator

#: Updates in which terms are summed up, from the first on and after each change of mode.
_UPDATES = 3
#: |Σ| ≤ so many eps · Σ|terms| is noise,
_ROUNDING = 256
#: but no less than the first of these, since a norm adds its own eps to a variance and so leaves
#: eps / variance of a gate's gradient; and no more than the second, for half types. In float32 the
#: median over a layer's filters was 1e-5 at most in front of a norm, 0.02 at least behind it.
_TOLERANCE = (1e-4, 1e-3)
#: So many filters of a layer over all updates must be noise, and most of them in each update: one
#: with hardly any variance has all the more of the norm's eps.
_EVIDENCE = 4


class Noise:
    """Watches the first updates of gates.

    Attributes:
        layers: those whose gates were noise; they stay so.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self._left = _UPDATES
        self._training: bool | None = None
        self._evidence: dict[str, int] = {}
        self._cleared: set[str] = set()
        # [C, 3] of the update: Σ, what is noise, Σ|terms|.
        self._sums: dict[str, Tensor] = {}

    @property
    def watches(self) -> bool:
        """Whether terms are wanted."""
        return self._left > 0

    def add(self, name: str, y: Tensor, dy: Tensor, channel_dim: int) -> None:
        """Note the terms y·dy of one use of gates."""
        dtype = accumulator(y.dtype)
        terms = y.detach().to(dtype) * dy.detach().to(dtype)
        others = [dim for dim in range(y.dim()) if dim != channel_dim]
        total, extent = terms.sum(others), terms.abs_().sum(others)
        tolerance = min(max(_ROUNDING * torch.finfo(y.dtype).eps, _TOLERANCE[0]), _TOLERANCE[1])
        sums = torch.stack((total, tolerance * extent, extent), 1)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def close_update(
        self, training: bool, layers: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    ) -> None:
        """The update is over.

        Args:
            training: the model's mode.
            layers: makes the [F, 3] sums of layers of those that were noted.
        """
        if self._sums:
            found = layers(self._sums)
            for name, sums in found.items():
                seen = (sums[:, 2] > 0) & sums[:, 2].isfinite()  # an overflow shows nothing
                noise = seen & (sums[:, 0].abs() <= sums[:, 1])
                if 2 * int(noise.sum()) <= int(seen.sum()) > 0:
                    self._cleared.add(name)
                self._evidence[name] = self._evidence.get(name, 0) + int(noise.sum())
            for name, agreeing in self._evidence.items():
                if agreeing >= _EVIDENCE and name not in (*self._cleared, *self.layers):
                    self.layers.append(name)
            self._left -= 1
        if training != self._training:
            if self._training is not None:
                self._left, self._evidence, self._cleared = _UPDATES, {}, set()
            self._training = training
        self._sums = {}

    def discard(self) -> None:
        """Forget the update."""
        self._sums = {}
