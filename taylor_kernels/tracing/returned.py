"""What a model returns to its caller, and what to itself."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from taylor_kernels.tracing.running import tensors_in

_PLAIN = (Tensor, Mapping, list, tuple, set, frozenset, str, bytes, int, float, complex, type(None))

#: What others read of the outputs: names of fields, or places; None for all of them.
Read = Sequence[str | int] | None


class UnknownOutput(ValueError):
    """The caller has named an output that the model does not return."""


def returned_tensors(
    model: nn.Module, example_inputs: Any, outputs: Any, read: Read = None
) -> Iterator[Tensor]:
    """The tensors of a model's outputs that others read.

    An object that it returns under the name of an optional argument that the example does not
    give, as transformers' models do with `past_key_values`, is state for its next call: no one
    else counts its channels, and a model of fewer heads makes a state of fewer.

    Args:
        read: what else is returned is not read by anyone, and may change its width.

    Raises:
        UnknownOutput: the model returns no such output.
        TypeError: `read` is no sequence of names and places.
    """
    if read is not None:
        return tensors_in([_entry(outputs, key) for key in checked_outputs(read)])
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        named = {f.name: getattr(outputs, f.name, None) for f in dataclasses.fields(outputs)}
    else:
        return tensors_in(outputs)
    optional = _optional(model, example_inputs)
    return tensors_in([v for n, v in named.items() if n not in optional or _is_plain(v)])


def checked_outputs(read: object) -> Sequence[str | int]:
    """The argument `outputs`, where it is given.

    Raises:
        TypeError: it is no sequence of names and places.
        ValueError: nothing is in it.
    """
    if isinstance(read, (str, bytes)) or not isinstance(read, Sequence):
        raise TypeError(
            f"outputs: expected a sequence of names or places, such as ('logits',), got {read!r}"
        )
    if not all(isinstance(key, (str, int)) and not isinstance(key, bool) for key in read):
        raise TypeError(f"outputs: entries are names or places of what is returned, got {read!r}")
    if not read:
        raise ValueError("outputs: nothing is in it; name what is read, or pass None for all")
    return read


def _entry(outputs: Any, key: str | int) -> Any:
    """One of the values that a model returns, by its name or its place."""
    try:
        if isinstance(key, int) or isinstance(outputs, Mapping):
            return outputs[key]
        return getattr(outputs, key)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        fields = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", ())
        there = ", ".join(map(str, fields)) or f"a {type(outputs).__name__}"
        raise UnknownOutput(
            f"outputs: the model returns no {key!r}; what it returns is {there}"
        ) from error


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
