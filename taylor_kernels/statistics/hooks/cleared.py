"""Gradients that were cleared between the backward passes of one update.

What is gathered in backward() adds up until the next update, as gradients do that accumulate. Where
a training loop has cleared them in between, a pass was not to count: the one through a GAN's
discriminator that trains the generator, the second one of SAM, one that raised.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from taylor_kernels.shards import is_fsdp
from taylor_kernels.statistics.base import version_of

CLEARED = (
    "several backward passes have come since the last update or step, and gradients were cleared "
    "between them, but what this criterion gathers in backward() is added up over all of them. "
    "Call skip() after a backward pass that is not to count (that through a GAN's discriminator "
    "for the generator, the second one of SAM, one that failed), or use taylor_fo, which reads "
    "the gradients that are there. If all of them are to count (gradients are added up in buffers "
    "of their own, LBFGS runs its closure several times), all is well: filter this warning by "
    "warnings.filterwarnings('ignore', 'several backward passes')"
)


class Cleared:
    """Whether the gradients of a model were cleared since its passes began to be gathered.

    Gradients that accumulate stay the tensors that they are, and change. One that has been replaced
    as it was has been cleared, and so have those that are all None behind a pass, if passes leave
    any: torch.autograd.grad() leaves none. Zeros that are written into a gradient are not seen.
    backward(create_graph=True) adds up into new tensors, which have a graph, as may passes whose
    gradients are sparse: of those nothing is known.

    Args:
        model: whose parameters are looked at, if it runs more than once between two updates.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._none = self._warned = False
        self._held: tuple[nn.Parameter, Tensor, int] | None = None

    def note(self) -> None:
        """A pass begins, and another one that has been gathered is over."""
        if self._warned or self._none or self._held is not None:
            return
        trained = self._trained()
        if not trained or is_fsdp(self._model):  # FSDP2 keeps accumulated gradients elsewhere
            return
        self._none = True
        for parameter in trained:
            if (grad := parameter.grad) is not None:
                self._none = False
                if grad.layout == torch.strided and not grad.requires_grad:
                    self._held = parameter, grad, version_of(grad)
                    return

    def check(self) -> None:
        """Say once that passes count whose gradients were cleared, if it is so."""
        if self._were_cleared() and not self._warned:
            self._warned = True
            warnings.warn(CLEARED, stacklevel=4)

    def _were_cleared(self) -> bool:
        if self._held is None:
            return self._none and any(p.grad is not None for p in self._trained())
        parameter, grad, version = self._held
        now = parameter.grad
        added_up = now is grad or version_of(grad) != version
        return not added_up and (now is None or not now.requires_grad)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def forget(self) -> None:
        """What was gathered is forgotten."""
        self._none, self._held = False, None
