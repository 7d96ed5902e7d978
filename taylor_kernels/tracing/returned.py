"""What a model returns to its caller, and what to itself."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from taylor_kernels.tracing.running import tensors_in

_PLAIN = (Tensor, Mapping, list, tuple, set, frozenset, str, bytes, int, float, complex, type(None))


def returned_tensors(model: nn.Module, example_inputs: Any, outputs: Any) -> Iterator[Tensor]:
    """The tensors of a model's outputs that others read.

    An object that it returns under the name of an optional argument that the example does not
    give, as transformers' models do with `past_key_values`, is state for its next call: no one
    else counts its channels, and a model of fewer heads makes a state of fewer.
    """
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        named = {f.name: getattr(outputs, f.name, None) for f in dataclasses.fields(outputs)}
    else:
        return tensors_in(outputs)
    optional = _optional(model, example_inputs)
    return tensors_in([v for n, v in named.items() if n not in optional or _is_plain(v)])


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or dataclasses.is_dataclass(value)


def _optional(model: nn.Module, example_inputs: Any) -> set[str]:
    """The arguments that a model takes with None as the default, without those that are given."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # of compiled code
        return set()
    given: set[str] = set()
    if isinstance(example_inputs, Mapping):
        given = set(example_inputs)
    else:
        count = len(example_inputs) if isinstance(example_inputs, (list, tuple)) else 1
        given = {p.name for p in parameters[:count]}
    return {p.name for p in parameters if p.default is None} - given
