"""What can be read off a meter: scores, their errors, and the state that another goes on from."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.criteria import Criterion
from taylor_kernels.hooks import OnModel
from taylor_kernels.importance.together import Alone, Together
from taylor_kernels.importance.totals import Totals
from taylor_kernels.mixed_precision import Scaling
from taylor_kernels.statistics import Layers, Statistic, held_weight


class Readout(OnModel):
    """What a meter tells of the minibatches that it has seen; `Importance` lets it see them."""

    criterion: Criterion
    _device: torch.device
    _layers: Layers
    _minibatches: Alone | Together
    _scaling: Scaling | None
    _sizes: dict[str, int]
    _statistic: Statistic
    _totals: Totals

    @property
    def needs_closure(self) -> bool:
        """Whether update() is to be called with a closure; otherwise it takes none."""
        return self._statistic.reads == "closure"

    @property
    def overflowed(self) -> int:
        """Minibatches that did not count, since the scaler skips the optimizer's steps of them."""
        return 0 if self._scaling is None else self._scaling.overflowed

    @property
    def dropped(self) -> int:
        """Minibatches that did not count on any of the `ranks`, since one of them had gradients
        that were not finite, or called skip()."""
        return self._minibatches.dropped

    def compute(self) -> dict[str, Tensor]:
        """{layer name: [filters] float32}: the mean score over observations, larger matters more.

        An observation is an update; for `taylor_fo_gate` it is an example. A layer that could not
        be read in any, as where no gradient reaches it, has nan.

        A layer whose gates have no gradient but rounding noise has nan, and a warning names it: a
        norm that was not seen divides them out. Noise would rank it below all others, whatever its
        filters matter; the scores of other layers are right, so that this is no error.

        Raises:
            RuntimeError: there was no update yet.
        """
        self.sync()
        self._require_updates("compute")
        found = self._minibatches.noise
        if noise := [name for name in self._sizes if name in found]:
            remedy = (
                "pass example_inputs, which puts its gates behind the norm, or use taylor_fo"
                if self._statistic.sites is None
                else "use taylor_fo"
            )
            warnings.warn(
                f"{', '.join(noise)}: the gradients of its gates are rounding noise, since what "
                f"comes later normalises each channel, and its scores are nan; {remedy}",
                stacklevel=2,
            )
        return self._totals.mean()

    def standard_error(self) -> dict[str, Tensor]:
        """Standard error of every score of compute(): sqrt(sample variance / observations).

        Same keys and shapes; nan where there was but one observation.
        """
        self.sync()
        self._require_updates("standard_error")
        return self._totals.standard_error()

    def sync(self) -> None:
        """Exchange what the ranks have seen since they did so last; a collective.

        compute() and standard_error() do it; state_dict() does not, and asks for it. Without
        `ranks`, or if nothing came since, it does nothing.

        Raises:
            RuntimeError: a rank did not come in time, or the ranks do not fit together.
        """
        for seen, updates in self._minibatches.exchange(self._totals, self._device):
            self._totals.add(seen, updates)

    def reset(self) -> None:
        """Forget all updates, and what was gathered since the last."""
        self._statistic.discard()
        self._minibatches.clear()
        self._zero()

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict() needs to go on: sums, counts, and what they belong to.

        It is the same on all `ranks`, and holds for any number of them.

        Raises:
            RuntimeError: there are minibatches that the ranks have not exchanged yet.
        """
        if waiting := len(self._minibatches):
            raise RuntimeError(
                f"state_dict: {waiting} minibatches are this rank's alone yet; call "
                "sync() on every rank first"
            )
        return self._totals.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict() of the same criterion on the same layers.

        Raises:
            ValueError: the state is not one, or of another criterion, model or version; nothing
                is changed then.
        """
        self._totals.check(state)
        self._statistic.discard()
        self._minibatches.clear()
        self._totals.load(state)
        self._statistic.updates = self._totals.updates
        self._minibatches.seen = self._totals.updates

    def _zero(self) -> None:
        self._totals = Totals(self.criterion, self._sizes)
        self._device = held_weight(next(iter(self._layers.values()))).device
        self._statistic.updates = 0

    def _require_updates(self, method: str) -> None:
        if not self._totals.updates:
            raise RuntimeError(f"{method}: there was no update() yet")
