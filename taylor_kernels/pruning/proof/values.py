"""The values that a proof tries a model with: in double precision, and no two alike.

A proof that finds no fault masks and removes once, and needs no values twice. So large tensors are
masked where they lie instead of being copied, and are given up as channels are removed: what is in
memory at a time is the model once in double precision. Where a further trial asks for them, they
are made anew from the model's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import torch
from torch import Tensor, nn

from taylor_kernels.pruning.proof.defaults import widened
from taylor_kernels.pruning.proof.noise import Noise
from taylor_kernels.tracing.model.caches import modules_by_name
from taylor_kernels.tracing.run.running import tensors_of_modules

#: Tensors of fewer numbers are copied, which takes less time than to make them anew.
_LARGE = 2**16


class Values:
    """Gives a copy of a model values in double precision, with noise on its parameters.

    Zeros and ones (a fresh norm, a last layer that starts at zero, an empty example) would hide
    what a channel does.

    Args:
        modules: dict(copy.named_modules()).
        model: what the copy is of. Its tensors are read again where values are made anew.
    """

    def __init__(self, modules: Mapping[str, nn.Module], model: nn.Module, noise: Noise) -> None:
        parameters, buffers = tensors_of_modules(modules)
        self._tensors = parameters | buffers
        theirs: dict[str, Tensor] = {}
        for table in tensors_of_modules(modules_by_name(model)):
            theirs |= table
        self._sources = {name: _source(t, theirs.get(name)) for name, t in self._tensors.items()}
        self._noise, self._exact = noise, True
        # Places and scales of the noise, so that values made anew are the same ones.
        self._noisy = {
            name: (place, max(prod(tensor.shape[1:]) if tensor.dim() > 1 else 10, 1) ** -0.5)
            for (name, tensor), place in zip(
                parameters.items(), noise.places(len(parameters)), strict=True
            )
        }
        self._signs: dict[str, Tensor] = {}
        self._without: set[str] = set()
        self._spent: set[str] = set()
        known = {id(tensor) for tensor in self._tensors.values()}
        self._others = [
            (module, name, value)
            for module in modules.values()
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and id(value) not in known
        ]
        for name in self._tensors:
            self._make(name)
        for module, name, value in self._others:
            setattr(module, name, widened(value.detach()))

    def set_exact(self, exact: bool) -> None:
        """Give the copy, from now on, values in double precision, or in the model's."""
        self._exact = exact
        for name in self._tensors:
            self._make(name)
        self._spent.clear()
        for module, name, value in self._others:
            setattr(module, name, widened(value.detach()) if exact else value)

    def models_own(self) -> dict[str, Tensor]:
        """The model's own tensors by name, which share its memory; of parameters, parameters. Those
        that are other attributes of the copy's modules are put in their places."""
        for module, name, value in self._others:
            setattr(module, name, value)
        return {
            name: nn.Parameter(source, False)
            if isinstance(self._tensors[name], nn.Parameter)
            else source
            for name, source in self._sources.items()
        }

    def to_mask(self, name: str) -> Tensor:
        """A tensor to be masked in place, that needs no gradient; of a parameter, a parameter.

        The model has its own values still, or `make_anew` gives them to it.
        """
        tensor = self._tensors[name]
        values = tensor.detach()
        if tensor.numel() < _LARGE or tensor.layout != torch.strided:
            values = values.clone()
        else:
            self._spent.add(name)
        return nn.Parameter(values, False) if isinstance(tensor, nn.Parameter) else values

    def give_up(self, name: str) -> None:
        """The memory of a tensor that was masked in place is wanted no more by the model."""
        if name in self._spent:
            tensor = self._tensors[name]
            tensor.data = tensor.data.new_zeros(()).expand(tensor.shape)

    def make_anew(self) -> None:
        """Give back to the model what masking has changed."""
        for name in self._spent:
            self._make(name)
        self._spent.clear()

    def make_all_anew(self) -> None:
        """Give it values with noise of another kind."""
        self._spent.update(self._tensors)
        self.make_anew()

    def turn(self, layers: Collection[str], number: int) -> None:
        """Give the filters of these layers random signs, and biases that are nothing but noise.

        Args:
            number: says which signs; 0 for the model's, and its biases.
        """
        generator = torch.Generator().manual_seed(number)
        weights = (f"{name}.weight" for name in layers)
        self._signs = {
            name: torch.randint(2, self._tensors[name].shape[:1], generator=generator) * 2 - 1
            for name in weights
            if number and name in self._tensors
        }
        self._without = {f"{name}.bias" for name in layers} if number else set()
        self.make_all_anew()

    def _make(self, name: str) -> None:
        source = self._sources[name]
        made = widened(source)
        if made is source:
            made = source.clone()
        if name in self._without:
            made.zero_()
        if name in self._noisy:
            self._noise.add_to(made, *self._noisy[name])
        if name in self._signs:
            made *= self._signs[name].to(made).view(-1, *[1] * (made.dim() - 1))
        self._tensors[name].data = made if self._exact else made.to(source.dtype)


def _source(own: Tensor, other: Tensor | None) -> Tensor:
    """The model's tensor, or the copy's own where that one is not held in the same way."""
    if (
        other is not None
        and type(other) is type(own)
        and other.shape == own.shape
        and (other.dtype, other.device, other.layout) == (own.dtype, own.device, own.layout)
    ):
        return other.detach()
    return own.detach()
