"""What a model returns to its caller, and what to itself."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from taylor_kernels.tracing.notes.atoms import Reason
from taylor_kernels.tracing.run.running import tensors_in

if TYPE_CHECKING:
    from taylor_kernels.tracing.run.recorder import Recorder

_PLAIN = (Tensor, Mapping, list, tuple, set, frozenset, str, bytes, int, float, complex, type(None))

#: One of these is in the name of a cache, or of its type.
_OF_CACHES = ("cache", "past", "state", "mem")

#: What others read of the outputs: names of fields, or places; None for all of them.
Read = Sequence[str | int] | None


class UnknownOutput(ValueError):
    """The caller has named an output that the model does not return."""


def returned_tensors(
    model: nn.Module, example_inputs: Any, outputs: Any, read: Read = None
) -> Iterator[Tensor]:
    """The tensors of a model's outputs that others read.

    A cache that it returns under the name of an optional argument that the example does not give,
    as transformers' models do with `past_key_values`, is state for its next call: no one else
    counts its channels, and a model of fewer heads makes a state of fewer. An object is taken for
    a cache by the argument's name or its own type's.

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
    return tensors_in([v for n, v in named.items() if n not in optional or not _is_cache(n, v)])


def reach_the_output(recorder: Recorder, outputs: Sequence[Tensor]) -> None:
    """The model has returned these to its caller."""
    reason = Reason("reaches the output of the model")
    for tensor in outputs:
        labels = recorder.labels(tensor)
        recorder.flow.reaches_output(tensor, labels)
        if recorder.record.values is not None:
            recorder.record.values.returns(tensor)
        for vector in labels.vectors():
            recorder.record.fix(vector, reason)


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


def _is_cache(name: str, value: object) -> bool:
    if isinstance(value, _PLAIN) or dataclasses.is_dataclass(value):
        return False
    said = f"{name} {type(value).__name__}".lower()
    return any(word in said for word in _OF_CACHES)


def _optional(model: nn.Module, example_inputs: Any) -> set[str]:
    """The arguments that a model takes with None as the default, without those that are given."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # of compiled code
        return set()
    if isinstance(example_inputs, Mapping):
        given = {name for name, value in example_inputs.items() if value is not None}
    else:
        values = example_inputs if isinstance(example_inputs, (list, tuple)) else [example_inputs]
        pairs = zip(parameters, values, strict=False)
        given = {parameter.name for parameter, value in pairs if value is not None}
    return {p.name for p in parameters if p.default is None} - given
