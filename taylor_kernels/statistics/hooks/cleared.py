"""Gradients that were cleared between the backward passes of one update.

What is gathered in backward() adds up until the next update, as gradients do that accumulate. Where
a training loop has cleared them in between, a pass was not to count: the one through a GAN's
discriminator that trains the generator, the second one of SAM, one that raised.
"""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from taylor_kernels.shards import is_fsdp
from taylor_kernels.statistics.base import version_of

CLEARED = (
    "several backward passes have come since the last update or step, and gradients were cleared "
    "between them, but what this criterion gathers in backward() is added up over all of them; "
    "call skip() after a backward pass that is not to count (that through a GAN's discriminator "
    "for the generator, the second one of SAM, one that failed), or use taylor_fo, which reads "
    "the gradients that are there"
)


class Cleared:
    """Whether the gradients of a model were cleared since its passes began to be gathered.

    Gradients that accumulate stay the tensors that they are, and change. One that is None, or that
    has been replaced as it was, has been cleared. Zeros that are written into it are not seen.

    Args:
        model: whose parameters are looked at, if it runs more than once between two updates.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found = self._warned = False
        self._held: tuple[nn.Parameter, Tensor, int] | None = None

    def note(self) -> None:
        """A pass begins, and another one that has been gathered is over."""
        if self._warned or self._found or self._held is not None:
            return
        trained = [p for p in self._model.parameters() if p.requires_grad]
        if not trained or is_fsdp(self._model):  # FSDP2 keeps accumulated gradients elsewhere
            return
        for parameter in trained:
            if (grad := parameter.grad) is not None:
                self._held = parameter, grad, version_of(grad)
                return
        self._found = True

    def check(self) -> None:
        """Say once that passes count whose gradients were cleared, if it is so."""
        if self._held is not None:
            parameter, grad, version = self._held
            self._found = parameter.grad is not grad and version_of(grad) == version
        if self._found and not self._warned:
            self._warned = True
            warnings.warn(CLEARED, stacklevel=4)

    def forget(self) -> None:
        """What was gathered is forgotten."""
        self._found, self._held = False, None
