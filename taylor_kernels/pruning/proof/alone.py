"""Functions that hide what they are given where it is the only one of its dimension.

The softmax of one number is 1 whatever the number is, and one number less its mean is 0. A run in
which an attention sees a single key, as an image that was cut down may leave, says nothing of how
its scores are scaled, and would prove what is wrong for two keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: An argument of a call by its place and its name, None where it is not given.
_Given = Callable[[int, str], Any]


def _along(values: Tensor, given: _Given) -> int:
    dim = given(1, "dim")
    return values.size(dim) if isinstance(dim, int) and values.dim() else 0


def _unit(values: Tensor, given: _Given) -> int:
    dim = given(2, "dim")
    return values.size(1 if dim is None else dim)


def _keys(_: Tensor, given: _Given) -> int:
    return given(1, "key").size(-2)


def _keys_first(_: Tensor, given: _Given) -> int:
    return given(1, "key").size(0)


def _of_a_group(values: Tensor, given: _Given) -> int:
    return values.size(1) // given(1, "num_groups") * prod(values.shape[2:])


def _places(values: Tensor, _: _Given) -> int:
    return prod(values.shape[2:])


#: Function -> how many numbers it normalises together.
_COUNTS: dict[Any, Callable[[Tensor, _Given], int]] = {
    torch.softmax: _along,
    torch.log_softmax: _along,
    Tensor.softmax: _along,
    Tensor.log_softmax: _along,
    F.softmax: _along,
    F.log_softmax: _along,
    F.normalize: _unit,
    F.scaled_dot_product_attention: _keys,
    F.multi_head_attention_forward: _keys_first,
    F.group_norm: _of_a_group,
    F.instance_norm: _places,
}
#: Those functions.
HIDING = frozenset(_COUNTS)


def is_alone(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether one of these functions is given single numbers here, which it hides."""

    def given(place: int, name: str) -> Any:
        return args[place] if place < len(args) else kwargs.get(name)

    values = given(0, "query" if "query" in kwargs else "input")
    return isinstance(values, Tensor) and _COUNTS[func](values, given) == 1
