"""The config of a pruned model of transformers: the numbers that make such a model anew.

A config has one number for all layers of a kind, and its class may compute widths from others, so
that not every pruned model has one. What a number means is not asked: numbers are tried that would
explain what has become of the tensors' shapes, and the model that the config makes is held against
the pruned one, first by its shapes and then by what it returns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.pruning.saving.config_numbers import (
    Path,
    get_number,
    integers,
    is_config,
    left_out,
    set_number,
    set_numbers,
    shown,
)
from taylor_kernels.statistics.layers import eval_mode
from taylor_kernels.tracing.run.running import call, copied, quiet, tensors_in

#: How far outputs of the same network may lie apart, relative to the greatest.
_CLOSE = 1e-5
#: How many sets of changes are followed at a time.
_WAYS = 4


def update_config(model: nn.Module, example_inputs: Any) -> dict[str, tuple[int | None, int]]:
    """Give a pruned model of transformers the config that makes a model of its shape.

    `model.save_pretrained()` and `from_pretrained()` of its class then keep it like any other. Call
    it after `compact()`. Where no config makes such a model, as where layers have lost different
    numbers of filters, nothing is changed: `tk.save_pruned` keeps those.

    Args:
        model: has a `config`, from which its class makes it.
        example_inputs: what both are run on, in eval mode, as those of `tk.Pruner`.

    Returns:
        Attribute of the config -> its old value, None where it was left to the class, and its new
        one; empty if the config fits already.

    Raises:
        TypeError: the model has no config.
        ValueError: no config makes a model of these shapes, or the one that does returns something
            else; the message says which tensors differ.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> class Config:  # as those of transformers
        ...     def __init__(self, width):
        ...         self.width = width
        ...     def to_dict(self):
        ...         return dict(vars(self))
        >>> class Net(torch.nn.Sequential):
        ...     def __init__(self, config):
        ...         super().__init__(torch.nn.Linear(4, config.width), torch.nn.Tanh())
        ...         self.append(torch.nn.Linear(config.width, 2))
        ...         self.config = config
        >>> model, x = Net(Config(8)), torch.randn(1, 4)
        >>> pruner = tk.Pruner(model, x, "magnitude_l2", filters=0.5, every=1)
        >>> while not pruner.done:
        ...     _ = pruner.step()
        >>> tk.update_config(pruner.compact(), x)
        {'width': (8, 4)}
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not is_config(config):
        raise TypeError(
            f"model: expected a model of transformers with a config, got {type(model).__name__}"
        )
    search = _Search(model, config)
    changes = search.found()
    made = search.made(changes, "cpu")  # with the buffers that are not saved
    assert made is not None
    if not _same_outputs(model, made, example_inputs):
        raise ValueError(
            "model: a config makes a model of the same shapes that does not return the same; keep "
            "this one by tk.save_pruned"
        )
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        if is_config(own):
            set_numbers(own, getattr(made.get_submodule(name), "config", own))
    return {
        shown(path): (get_number(search.config, path), value) for path, value in changes.items()
    }


class _Search:
    """Tries configs for a model."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self._class, self.config = type(model), copy.deepcopy(config)
        self._shapes, self._numbers = _shapes(model), _numbers(model)
        before = self.made({})
        if before is None:
            raise ValueError(
                f"model: {self._class.__name__} makes none from its own config; keep it by "
                "tk.save_pruned"
            )
        # A buffer that is not saved is made anew, with values that nobody has cut.
        unsaved = {
            f"{name}.{leaf}".lstrip(".")
            for name, module in model.named_modules()
            for leaf in module._non_persistent_buffers_set
        }
        cut = [n for n, s in _shapes(before).items() if n in unsaved and s != self._shapes.get(n)]
        if cut:
            raise ValueError(
                f"model: the buffer {cut[0]} has lost entries, and save_pretrained() does not "
                "write it; keep the model by tk.save_pruned"
            )
        pairs = {
            (old, new)
            for name, shape in _shapes(before).items()
            for old, new in zip(shape, self._shapes.get(name, ()), strict=False)
            if old != new
        }
        self._candidates = {
            path: values
            for path, value in integers(self.config)
            if (values := {value * new // old for old, new in pairs if _divides(value, old, new)})
        }
        # A width that is left to the class is its own from now on.
        for path in left_out(self.config):
            held = {int(v) for (_, name), v in self._numbers.items() if name == path[-1]}
            self._candidates[path] = held | {new for _, new in pairs}

    def made(self, changes: Mapping[Path, int], device: str = "meta") -> nn.Module | None:
        """The model of a config with these changes; None if there is none."""
        config = copy.deepcopy(self.config)
        try:
            for path, value in changes.items():
                set_number(config, path, value)
            with torch.device(device), torch.random.fork_rng(devices=[]):
                return self._class(config)
        except Exception:  # whatever a class says of numbers that do not fit together
            return None

    def _distance(self, changes: Mapping[Path, int]) -> tuple[float, int]:
        """How many tensors have another shape, and how many numbers in modules are others.

        Modules keep numbers that nothing reads: these may stay as they were in the pruned model.
        """
        made = self.made(changes)
        if made is None:
            return float("inf"), 0
        shapes, numbers = _shapes(made), _numbers(made)
        differ = sum(shapes.get(n) != self._shapes.get(n) for n in shapes.keys() | self._shapes)
        return differ, sum(numbers.get(key) != value for key, value in self._numbers.items())

    def found(self) -> dict[Path, int]:
        """The changes after which every tensor has its shape; of several, those of fewest others.

        One number that explains much may be the wrong one (heads that have gone for widths of
        heads), so that a few ways are followed at a time.

        Raises:
            ValueError: there are none.
        """
        nothing: dict[Path, int] = {}
        ways, best = [(self._distance(nothing), nothing)], (nothing, float("inf"))
        stuck = 0
        while ways[0][0][0]:
            if ways[0][0][0] < best[1]:
                best, stuck = (ways[0][1], ways[0][0][0]), 0
            else:  # two numbers may have to change together, before anything fits better
                stuck += 1
            further = {
                tuple(sorted(more.items(), key=str)): more
                for _, changes in ways
                for more in self._further(changes)
            }
            if stuck > 1 or not further:
                raise ValueError(self._why_not(best[0]))
            ranked = [(self._distance(more), more) for more in further.values()]
            ways = sorted(ranked, key=lambda way: way[0])[:_WAYS]
        return ways[0][1]

    def _further(self, changes: dict[Path, int]) -> Iterator[dict[Path, int]]:
        """These changes and one more."""
        for path, values in self._candidates.items():
            if path not in changes:
                yield from ({**changes, path: value} for value in sorted(values))

    def _why_not(self, changes: Mapping[Path, int]) -> str:
        made = self.made(changes)
        assert made is not None
        shapes = _shapes(made)
        wrong = [n for n, shape in self._shapes.items() if shapes.get(n) != shape]
        first = wrong[0] if wrong else next(iter(shapes.keys() - self._shapes.keys()))
        return (
            f"model: no {type(self.config).__name__} makes a model of this shape; {len(wrong)} "
            f"tensors would be others, among them {first}, {self._shapes.get(first)} here and "
            f"{shapes.get(first)} there. Where layers of a kind have different widths, or the "
            "class computes one from another, keep the model by tk.save_pruned"
        )


def _divides(value: int, old: int, new: int) -> bool:
    """Whether old stands for value times something, and new for a whole number times that."""
    return value > 0 and old % value == 0 and (value * new) % old == 0 and new > 0


def _same_outputs(model: nn.Module, made: nn.Module, example_inputs: Any) -> bool:
    """Whether a new model, given what is saved of the other, is the same and returns the same."""
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held |= dict(model.named_buffers(remove_duplicate=False))
    for prefix, module in made.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                name = f"{prefix}.{leaf}".lstrip(".")
                if tensor is None:
                    continue
                fresh = leaf in module._non_persistent_buffers_set  # made anew on loading
                if fresh and not _alike(tensor.to(held[name].device), held[name]):
                    return False
                table[leaf] = held[name]
    with eval_mode(model), quiet(model.modules()):
        one = [t.clone() for t in tensors_in(call(model, copied(example_inputs)))]
        try:
            other = list(tensors_in(call(made.eval(), copied(example_inputs))))
        except Exception:  # it computes with what it holds no values of
            return False
    return len(one) == len(other) and all(map(_alike, one, other))


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    scale = float(one.abs().nan_to_num().max())
    return torch.allclose(one, other, rtol=0, atol=_CLOSE * scale, equal_nan=True)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in named}


def _numbers(model: nn.Module) -> dict[tuple[str, str], float]:
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if type(value) in (int, float)
    }
