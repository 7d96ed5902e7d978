"""Which attributes of a module count channels: by rule, and as a run shows them.

PyTorch's own classes are in a table that `register_attributes` extends. For other modules the run
itself shows candidates: where a module cuts a dimension into parts of a size that one of its
integer attributes has, that attribute counts them. So does an entry of a list or tuple of integers,
which goes by the name "widths[1]", and else a number in an object of settings ("config.heads").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from taylor_kernels.tracing.model.settings import held_numbers
from taylor_kernels.tracing.multihead import PrunedMultiheadAttention
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.entries import Size

if TYPE_CHECKING:
    from taylor_kernels.tracing.run.calls import Call

#: "inputs", "outputs" and "groups" of the layer, or a tensor's name and dimension.
Counted = str | tuple[str, int]

_RULES: dict[type[nn.Module] | str, dict[str, Counted]] = {
    _ConvNd: {"in_channels": "inputs", "out_channels": "outputs", "groups": "groups"},
    nn.Linear: {"in_features": "inputs", "out_features": "outputs"},
    nn.Bilinear: {
        "in1_features": ("weight", 1),
        "in2_features": ("weight", 2),
        "out_features": ("weight", 0),
    },
    _NormBase: {"num_features": "norm"},
    nn.Embedding: {"embedding_dim": ("weight", 1)},
    nn.EmbeddingBag: {"embedding_dim": ("weight", 1)},
    nn.LayerNorm: {"normalized_shape": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.RMSNorm: {"normalized_shape": ("weight", 0)},
    PrunedMultiheadAttention: {
        "embed_dim": ("query_weight", 1),
        "kdim": ("key_weight", 1),
        "vdim": ("value_weight", 1),
    },
    nn.Transformer: {"d_model": ("encoder.norm.weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
    nn.RNNBase: {
        "input_size": ("weight_ih_l0", 1),
        "hidden_size": ("weight_hh_l0", 1),  # of a projected one it is another number
        "proj_size": ("weight_hr_l0", 0),
    },
    nn.RNNCellBase: {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)},
    "transformers.pytorch_utils.Conv1D": {"nx": "inputs", "nf": "outputs"},
}
#: What has been looked up, by class.
_FOUND: dict[type[nn.Module], Mapping[str, Counted]] = {}
#: Integers that modules keep and that count no channels.
_NO_COUNT = re.compile(
    r"(stride|kernel|padding|dilation|axis|layers?|depth|eps|id|idx|index|count|calls|step)s?$"
    r"|^dim$|kernel_size|^start_|^end_|^max_|(window|patch|image|img|crop|tile|shift)_?size"
    r"|resolution|ratio|factor|_rate$"
)
#: Of two attributes with one value, this one is the width of a part and not how many there are.
_WIDTH = re.compile(r"dim|size|width|channels|planes|features|hidden")

#: So many numbers in a row that a list and a shape share are no chance.
_PLAIN = 3


def register_attributes(module_class: type[nn.Module] | str, **counted: Counted) -> None:
    """Say which attributes of a module class count channels.

    Args:
        module_class: it and its subclasses; a rule for a subclass comes before its parents'. Its
            full dotted name serves as well, and need not be imported.
        counted: attribute -> what it counts: ("weight", 0) for the first dimension of the
            module's parameter `weight`, ("part.weight", 0) for that of a module in it, or "inputs",
            "outputs", "groups" of a layer that multiplies by its weight. An attribute that is a
            tuple gets a tuple.

    Raises:
        TypeError: the class is not a module class, or a rule is something else.

    Example:
        >>> import torch
        >>> from taylor_kernels.tracing import register_attributes, trace
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.width, self.gain = width, torch.nn.Parameter(torch.ones(width))
        ...     def forward(self, x):
        ...         return x * self.gain
        >>> register_attributes(Scale, width=("gain", 0))
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), Scale(8), torch.nn.Linear(8, 2))
        >>> channels = trace(model, torch.randn(1, 4))
        >>> channels.attributes([torch.arange(8) < 3])["1"]
        {'width': 5}
    """
    if not isinstance(module_class, str) and not (
        isinstance(module_class, type) and issubclass(module_class, nn.Module)
    ):
        raise TypeError(f"module_class: expected a subclass of nn.Module, got {module_class!r}")
    for name, what in counted.items():
        pair = isinstance(what, tuple) and len(what) == 2 and isinstance(what[0], str)
        if not pair and what not in ("inputs", "outputs", "groups", "norm"):
            raise TypeError(
                f"{name}: expected ('weight', 0), 'inputs', 'outputs' or 'groups', got {what!r}"
            )
    _RULES.setdefault(module_class, {}).update(counted)
    _FOUND.clear()


def rules_of(module: nn.Module) -> Mapping[str, Counted]:
    """The registered attributes of a module."""
    module_class = type(module)
    if module_class in _FOUND:
        return _FOUND[module_class]
    found: dict[str, Counted] = {}
    for parent in reversed(module_class.__mro__):
        found.update(_RULES.get(parent, {}))
        found.update(_RULES.get(f"{parent.__module__}.{parent.__qualname__}", {}))
    _FOUND[module_class] = found
    return found


def tie(
    call: Call,
    size: int,
    vector: Vector | None,
    index: int = 0,
    weak: bool = False,
    settings: bool = False,
) -> bool:
    """Find the attribute, of the module that holds the code, that counts these atoms.

    Args:
        vector: None only to ask.
        index: which part of the new shape it is; the first parts are counts, the last widths.
        weak: the dimension stays as it is, so that the size may be another's by chance.
        settings: as of `counting`.
    """
    names = counting(call, size, index, weak, settings)
    for attribute in names:
        if vector is not None:
            call.record.sizes.append(Size(call.holder[1], attribute, vector.copy(), weak))
    return bool(names)


def counting(
    call: Call, size: int, index: int = 0, weak: bool = False, settings: bool = False
) -> list[str]:
    """The attributes of the module that holds the code with this size, as `tie` takes them.

    Args:
        settings: else a number in its settings may, as where a dimension is cut into a grid: they
            hold so many that of other sizes some is the same by chance.
    """
    module, _ = call.holder
    if size < 2 or module is None:
        return []
    if isinstance(module, nn.Unflatten):
        return _places(module, size, index)
    if type(module).__module__.startswith("torch.nn."):
        return []
    names = _like(index, holding(module, size))
    if not names and not weak:
        names = _listed(module, size)
    if not names and settings:
        names = _like(index, _in_settings(module, size))
    return names


def guess(call: Call, size: int, vector: Vector, *, inferred: bool = False) -> None:
    """Note where else than in its attributes the running module holds this size, to be tried where
    the model does not run without some channels.

    Args:
        inferred: code has left it to PyTorch, so that it may be in any attribute.
    """
    module, holder = call.holder
    if module is None or size < 2 or type(module).__module__.startswith("torch.nn."):
        return
    names = holding(module, size) if inferred else []
    for name in dict.fromkeys((*names, *_listed(module, size), *_in_settings(module, size))):
        call.record.guesses.append(Size(holder, name, vector.copy(), False))


def _listed(module: nn.Module, size: int) -> list[str]:
    """The entries of a module's lists that hold this integer."""
    return [
        f"{attribute}[{place}]"
        for attribute, values in _lists(module)
        for place, value in enumerate(values)
        if value == size
    ]


def _in_settings(module: nn.Module, size: int) -> list[str]:
    return [name for name, value in held_numbers(module) if value == size]


def _like(index: int, names: list[str]) -> list[str]:
    """Of attributes with one value those that count parts, or that are widths, by the place."""
    names = [name for name in names if not _NO_COUNT.search(re.sub(r".*\.|\[.*", "", name))]
    widths = [name for name in names if _WIDTH.search(name)]
    counts = [name for name in names if name not in widths]
    return (counts or names) if index == 0 else (widths or names)


def holding(module: nn.Module, size: int) -> list[str]:
    """The attributes of a module that hold this integer and may count channels."""
    known = rules_of(module)
    return [
        attribute
        for attribute, value in vars(module).items()
        if type(value) is int
        and value == size
        and attribute not in known
        and not _NO_COUNT.search(attribute)
    ]


def _places(module: nn.Unflatten, size: int, index: int) -> list[str]:
    """The place among its sizes, by its number where several are the same."""
    sizes = module.unflattened_size
    places = [place for place, value in enumerate(sizes) if value == size]
    return [f"unflattened_size[{p}]" for p in places if len(places) == 1 or p == index]


def tie_parts(call: Call, vector: Vector, spans: Sequence[tuple[int, int]]) -> bool:
    """Find the list of the running module that holds the sizes of all parts of a dimension."""
    ends = [0, *(end for _, end in spans)]
    module, holder = call.holder
    if module is None or [start for start, _ in spans] != ends[:-1]:
        return False
    sizes = [end - start for start, end in spans]
    names = [attribute for attribute, values in _lists(module) if list(values) == sizes]
    for attribute in names:
        for place, (start, end) in enumerate(spans):
            part = vector[start:end].copy()
            size = Size(holder, f"{attribute}[{place}]", part, False)
            call.record.sizes.append(size)
    return bool(names)


def tie_shape(call: Call, shape: Sequence[int], dims: Sequence[Vector | None]) -> None:
    """Find the list of the running module that holds several sizes of a new shape in their order,
    as in view(n, *self.shape): beside it an attribute may hold one of them too."""
    module, holder = call.holder
    for attribute, values in [] if module is None else _lists(module):
        starts = [
            start
            for start in range(len(shape) - len(values) + 1)
            if list(shape[start : start + len(values)]) == list(values)
        ]
        if len(values) < _PLAIN or len(starts) != 1:
            continue
        for place, vector in enumerate(dims[starts[0] : starts[0] + len(values)]):
            if vector is not None and vector.any():
                name = f"{attribute}[{place}]"
                call.record.sizes.append(Size(holder, name, vector.copy(), False))


def _lists(module: nn.Module) -> list[tuple[str, Sequence[int]]]:
    """The lists and tuples of integers that a module keeps."""
    if type(module).__module__.startswith("torch.nn."):
        return []
    known = rules_of(module)
    return [
        (attribute, value)
        for attribute, value in vars(module).items()
        if type(value) in (list, tuple, torch.Size)
        and len(value) > 0
        and all(type(item) is int for item in value)
        and attribute not in known
        and not _NO_COUNT.search(attribute)
    ]
