"""Examples of the proof: smaller where they are images, repeated where they say too little."""

from __future__ import annotations

from itertools import cycle
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from taylor_kernels.tracing.run.running import tensors_in

#: Numbers of a channel that show what code does to it, or so many images; and so many numbers in an
#: example at most.
_ROWS, _IMAGES, _FEW = 16, 7, 2**12
#: Of a prime number of rows no reshape(-1, width, ...) makes as many others of a wrong width: it
#: fails where it stands, which says what to look at.
_TIMES = (2, 3, 5, 7, 11, 13, 17)
_FACTORS = (1.0, -1.0, 3.0, -3.0)


def cut_down(example_inputs: Any) -> Any:
    """An example of images with two of them, and a sixteenth of their area."""
    tensors = list(tensors_in(example_inputs))
    batches = {tensor.shape[:1] for tensor in tensors}
    images = len(batches) == 1 and any(tensor.dim() > 3 for tensor in tensors)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value[:2] if images else value
        for dim in range(2, value.dim() if value.dim() > 3 else 0):
            size = value.size(dim)
            # Networks halve images up to five times, and small ones three times or so.
            step = 32 if size >= 128 else 8 if 16 < size <= 32 and value.dim() == 4 else 16
            value = value.narrow(dim, 0, min(size, -(-size // (4 * step)) * step))
        return value

    return tree_map(cut, example_inputs)


def repeated(example_inputs: Any) -> Any:
    """A small example again and again along its first dimension, other ways round and greater; any
    other as it is.

    Of three rows a ReLU says nothing where they are all above zero: in one case of eight, and in
    more where a bias is greater than what comes of the example.
    """
    tensors = list(tensors_in(example_inputs))
    sizes = {tensor.shape[:1] for tensor in tensors}
    numbers = sum(tensor.numel() for tensor in tensors)
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if len(sizes) != 1 or not floating or not numbers or not floating[0].dim():
        return example_inputs
    first = floating[0]
    images = first.dim() == 4
    rows, enough = (len(first), _IMAGES) if images else (prod(first.shape[:-1]), _ROWS)
    fitting = [times for times in _TIMES if times * numbers <= _FEW]
    if rows >= enough or not fitting:
        return example_inputs
    times = next((times for times in fitting if times * rows >= enough), fitting[-1])

    def repeat(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copies = [value] * times
        if value.is_floating_point():
            copies = [value * factor for factor, _ in zip(cycle(_FACTORS), copies, strict=False)]
        return torch.cat(copies)

    return tree_map(repeat, example_inputs)
