"""Norms across channels while some of these are masked: run on those that are kept.

A LayerNorm or RMSNorm takes its statistics of all channels, so zeros count in them. While channels
are masked, the module is run on the kept ones with its parameters cut to them, as it will run once
the others are removed, and the masked channels of its output are zeros:

    y[kept] = norm(x[kept], γ[kept], β[kept]),    y[others] = 0

That is what masking and removing a channel of such a norm mean in this package. A copy of the model
does the same, and so does a saved one, since its outputs are made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taylor_kernels.pruning.removal import set_attributes
from taylor_kernels.tracing import Channels


class KeptOnly:
    """A forward hook that runs its module again on the channels that are kept.

    Args:
        dim: the channels' dimension in the module's input and output, from the end.
        kept: their indices, [n] int64.
        attributes: what the module's attributes are once the others are gone.
    """

    def __init__(self, dim: int, kept: Tensor, attributes: Mapping[str, Any]) -> None:
        self._dim, self._kept, self._attributes = dim, kept, dict(attributes)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (input,) = args
        kept = self._kept.to(input.device)
        with self._smaller(module, kept):
            found = module.forward(input.index_select(self._dim, kept))
        return found.new_zeros(output.shape).index_copy(self._dim, kept, found)

    @contextmanager
    def _smaller(self, module: nn.Module, kept: Tensor) -> Iterator[None]:
        tensors, values = (
            dict(module._parameters),
            {n: getattr(module, n) for n in self._attributes},
        )
        try:
            for name, tensor in tensors.items():
                if tensor is not None:
                    dim = max(range(tensor.dim()), key=tensor.size)
                    # The cut one is no leaf: its gradient goes on to the whole one.
                    module._parameters[name] = tensor.index_select(dim, kept)  # type: ignore[assignment]
            set_attributes({"": module}, {"": self._attributes})
            yield
        finally:
            module._parameters.update(tensors)
            set_attributes({"": module}, {"": values})


def keep_only(
    modules: Mapping[str, nn.Module], channels: Channels, dead: Sequence[Tensor]
) -> list[RemovableHandle]:
    """Have the norms across channels run on what the dead units leave; returns the hooks."""
    attributes = channels.attributes(dead)
    return [
        # Before the hooks of others, which see the output as it is.
        modules[name].register_forward_hook(
            KeptOnly(dim, kept, attributes.get(name, {})), prepend=True
        )
        for name, (dim, kept) in channels.kept_by_norms(dead).items()
    ]
