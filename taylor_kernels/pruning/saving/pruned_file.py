"""The file of a pruned model: its tensors, and in the metadata what cuts a fresh model to fit.

A safetensors file, so that nothing in it can run code. The metadata has one entry, a JSON object:
of several entries the order, and so the bytes of the file, would vary.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.files import write_atomically
from taylor_kernels.pruning.removing.removal import Removal
from taylor_kernels.pruning.saving.state import first_line
from taylor_kernels.tracing.blocks import Place

_KEY, _VERSION = "taylor_kernels.pruned", "1"
#: The version of files of models that whole residual blocks were removed from.
_WITH_BLOCKS = "2"
#: The version of files of models in which channels have changed places.
_WITH_ORDERS = "3"


@dataclass(frozen=True)
class PrunedFile:
    """What the file of a pruned model holds.

    Attributes:
        state: the model's state_dict; a tensor that has several names is one.
        shapes: tensor that is cut -> its shape before.
        removal: what a whole model loses; of attributes that were read from a file, sequences are
            lists.
    """

    state: Mapping[str, Tensor]
    shapes: Mapping[str, list[int]]
    removal: Removal

    def write(self, path: str | bytes | os.PathLike[str]) -> None:
        """Write it, all at once.

        Raises:
            ValueError: the state holds more than tensors.
            ImportError: safetensors is not installed.
            FileNotFoundError: there is no such folder.
        """
        _require_safetensors()
        from safetensors.torch import save

        cuts, attributes, places, orders = self.removal
        tensors, aliases = by_first_name(self.state)
        # Copies: two tensors that share memory, as views of one, are saved on their own.
        content = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        lists: dict[tuple[int, ...], int] = {}  # most lists of indices are those of several tensors

        def table(
            indices: Mapping[str, Mapping[int, Tensor]],
        ) -> dict[str, dict[int, int]]:
            return {
                name: {
                    dim: lists.setdefault(tuple(index.tolist()), len(lists))
                    for dim, index in own.items()
                }
                for name, own in indices.items()
            }

        recipe = {
            "version": _WITH_ORDERS if orders else _WITH_BLOCKS if places else _VERSION,
            "shapes": self.shapes,
            "indices": [],
            "cuts": table(cuts),
            **({"orders": table(orders)} if orders else {}),
            "attributes": attributes,
            "aliases": aliases,
            **({"places": [list(astuple(place)) for place in places]} if places else {}),
        }
        recipe["indices"] = list(lists)
        metadata = {_KEY: json.dumps(recipe, separators=(",", ":"))}
        write_atomically(path, lambda file: file.write(save(content, metadata)))

    @classmethod
    def read(cls, path: str) -> PrunedFile:
        """What a file holds: whatever of it can be judged without the model is right.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another kind, or of a later version.
            ImportError: safetensors is not installed.
        """
        state, metadata = _tensors_and_metadata(path)
        if _KEY not in metadata:
            raise ValueError(f"path: {path!r} was not written by save_pruned")
        try:
            recipe = json.loads(metadata[_KEY])
            version = recipe["version"]
            if version in (_VERSION, _WITH_BLOCKS, _WITH_ORDERS):
                return cls._of(recipe, state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"path: {path!r} is damaged ({first_line(error)})") from error
        raise ValueError(
            f"path: {path!r} has version {version} of the format, this release reads {_VERSION}, "
            f"{_WITH_BLOCKS} and {_WITH_ORDERS}"
        )

    @classmethod
    def _of(cls, recipe: Any, state: dict[str, Tensor]) -> PrunedFile:
        """Out of what JSON gave; an error of any kind if it is damaged."""
        indices = [torch.tensor(entry, dtype=torch.int64) for entry in recipe["indices"]]

        def table(key: str) -> dict[str, dict[int, Tensor]]:
            return {
                name: {int(dim): indices[number] for dim, number in own.items()}
                for name, own in recipe[key].items()
            }

        cuts, orders = table("cuts"), table("orders") if "orders" in recipe else {}
        for name, own in cuts.items():
            _check_indices(name, recipe["shapes"][name], own)
        for name, own in orders.items():
            _check_orders(name, recipe["shapes"][name], cuts[name], own)
        state |= {alias: state[name] for alias, name in recipe["aliases"].items()}
        attributes = {name: dict(own) for name, own in recipe["attributes"].items()}
        places = tuple(_place(*entry) for entry in recipe.get("places", []))
        return cls(state, recipe["shapes"], Removal(cuts, attributes, places, orders))


def by_first_name(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a `state_dict(keep_vars=True)`, each once; and their other names -> the first.

    Raises:
        ValueError: something else is in it.
    """
    firsts: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: {name!r} of its state_dict is a {type(value).__name__}, not a tensor, "
                "which safetensors cannot hold; use save_checkpoint"
            )
        first = firsts.setdefault(id(value), name)
        if first != name:
            aliases[name] = first
    return {name: state[name] for name in firsts.values()}, aliases


def _tensors_and_metadata(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    _require_safetensors()
    from safetensors import SafetensorError, safe_open

    if not os.path.exists(path):
        raise FileNotFoundError(f"path: there is no file {path!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path!r} is damaged or no safetensors file") from error


def _require_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("safetensors is not installed; pip install 'taylor-kernels[demo]'")


def _place(module: Any, like: Any, returned: Any) -> Place:
    """What a file says that a block has left of a module."""
    fits = isinstance(module, str) and (like is None or type(like) in (int, str))
    path = tuple(returned)
    if not fits or any(type(part) is not int for part in path) or len(path) not in (0, 2):
        raise ValueError(f"what is left of module {module!r:.80} is not known")
    return Place(module, like, path)


def _check_indices(name: str, shape: list[int], cuts: Mapping[int, Tensor]) -> None:
    """What the file says goes from a tensor can go; nothing is made of the size of an index."""
    for dim, index in cuts.items():
        if not 0 <= dim < len(shape):
            raise ValueError(f"{name} has no dimension {dim}, its shape is {shape}")
        if index.dim() != 1:
            raise ValueError(f"the indices of {name} are no list of integers")
        if not index.numel():
            continue
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= shape[dim]:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} has {shape[dim]} in dimension {dim}, an index is {wrong}")
        if index.unique().numel() < index.numel():
            raise ValueError(f"an index of {name} is there twice")


def _check_orders(
    name: str, shape: list[int], cuts: Mapping[int, Tensor], orders: Mapping[int, Tensor]
) -> None:
    """What the file says is an order of what is left of a tensor is one."""
    for dim, order in orders.items():
        left = shape[dim] - cuts[dim].numel()
        if order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(left)):
            raise ValueError(f"the order of {name} along {dim} is none of {left} places")
