"""A pruned model saved, and a fresh model cut as it was and filled with its values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral

from torch import Tensor, nn

from taylor_kernels.checks import check_module, check_path
from taylor_kernels.pruning.masks.masking import check_unmasked
from taylor_kernels.pruning.pruner import Pruner
from taylor_kernels.pruning.removing.removal import Tensors, cut_model
from taylor_kernels.pruning.saving.pruned_file import PrunedFile
from taylor_kernels.tracing.model.caches import renew
from taylor_kernels.tracing.model.settings import get_attribute


def save_pruned(path: str | bytes | os.PathLike[str], pruner: Pruner) -> None:
    """Write a compacted model as safetensors, with the recipe that cuts a fresh model to its shape.

    The file holds the model's state_dict, a tensor that has several names once, and in its metadata
    which indices went from which dimension of which tensor and what attributes of modules became.
    Nothing in it can run code. `load_pruned` reads it.

    Args:
        path: of the file; it is replaced all at once.
        pruner: its model has been compacted.

    Raises:
        TypeError: `path` is no path, or `pruner` no tk.Pruner.
        ValueError: filters are masked and not removed yet, or the model's state holds more than
            tensors.
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such folder.

    Example:
        >>> import os, tempfile, torch, taylor_kernels as tk
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
        >>> pruner = tk.Pruner(make(), torch.randn(1, 3), "magnitude_l2", filters=0.5, every=1)
        >>> while not pruner.done:
        ...     _ = pruner.step()
        >>> model = pruner.compact()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "pruned.safetensors")
        ...     tk.save_pruned(path, pruner)
        ...     again = tk.load_pruned(make(), path)
        >>> x = torch.randn(5, 3)
        >>> again[0].out_features, torch.equal(again(x), model(x))
        (4, True)
    """
    check_path(path)
    _check_pruner(pruner, "save_pruned(path, pruner)")
    _content(pruner).write(path)


def load_pruned(model: nn.Module, path: str | bytes | os.PathLike[str]) -> nn.Module:
    """Cut a fresh model as the one was that `save_pruned` wrote, and load its values, in place.

    Args:
        model: made as the original one was, before it was pruned; its own values do not matter.
        path: what `save_pruned` wrote.

    Returns:
        The model. Its parameters are new ones: make optimizers afterwards.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the model is none, or `path` is no path.
        ValueError: the file is damaged or of another kind, or would set what is no number of
            channels, or the model is another than the original. Nothing has changed.
        ImportError: safetensors is not installed.

    Example:
        >>> import os, tempfile, torch, taylor_kernels as tk
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
        >>> pruner = tk.Pruner(make(), torch.randn(1, 3), "magnitude_l2", params=0.6, every=1)
        >>> while not pruner.done:
        ...     _ = pruner.step()
        >>> _ = pruner.compact()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "pruned.safetensors")
        ...     tk.save_pruned(path, pruner)
        ...     tk.load_pruned(make(), path)[1]
        Linear(in_features=4, out_features=2, bias=True)
    """
    check_module(model)
    check_path(path)
    path = os.fsdecode(path)
    file = PrunedFile.read(path)
    _check_model(f"model: {path!r} was pruned from another model", file, model)
    cut_model(model, file.removal)
    model.load_state_dict(file.state)
    renew(model.modules())
    return model


def cut_copy(copy: nn.Module, pruner: Pruner) -> nn.Module:
    """Remove from a whole copy of a model what `compact()` has removed from the model, in place.

    For what goes beside the training with values of its own: an average of the weights (EMA, SWA),
    weights of another epoch.

    Args:
        copy: of the model as it was before it was pruned; it keeps its values. It is cut once: at
            the last of several `compact()`s, or each time by a new pruner.
        pruner: its model has been compacted.

    Returns:
        The copy. Its parameters are new ones.

    Raises:
        TypeError: `copy` is no module, or `pruner` no tk.Pruner.
        ValueError: it is no whole copy of the model, or was made while norms ran on a part of their
            channels; or filters are masked and not removed yet. Nothing has changed.

    Example:
        >>> import copy, torch, taylor_kernels as tk
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> pruner = tk.Pruner(model, torch.randn(1, 3), "magnitude_l2", filters=0.5, every=1)
        >>> while not pruner.done:
        ...     _ = pruner.step()
        ...     average.update_parameters(model)
        >>> model = pruner.compact()
        >>> average.module = tk.cut_copy(average.module, pruner)
        >>> average.update_parameters(model)
        >>> average.module[0].out_features
        4
    """
    check_module(copy, "copy")
    _check_pruner(pruner, "cut_copy(copy, pruner)")
    content = _content(pruner)
    try:
        check_unmasked(copy)
    except ValueError as error:
        raise ValueError(
            "copy: it was made while a pruner held filters, or norms beside them; make it before "
            "the first pruning"
        ) from error
    _check_model(
        "copy: it is another model than the pruner's was at first (of an AveragedModel give its "
        ".module; what has been cut once is cut again by a new pruner alone, made after compact())",
        content,
        copy,
    )
    cut_model(copy, content.removal)
    renew(copy.modules())
    return copy


def _content(pruner: Pruner) -> PrunedFile:
    """The compacted model of a pruner, and what was cut."""
    model, removal = pruner.model, pruner.removal()
    tensors = Tensors(dict(model.named_modules()))
    shapes = {name: _resized(tensors[name], own, 1) for name, own in removal.cuts.items()}
    return PrunedFile(model.state_dict(keep_vars=True), shapes, removal)


def _check_pruner(pruner: object, call: str) -> None:
    if not isinstance(pruner, Pruner):
        raise TypeError(
            f"pruner: expected the tk.Pruner of the model, got {type(pruner).__name__}; call {call}"
        )


def _check_model(otherwise: str, file: PrunedFile, model: nn.Module) -> None:
    """The model is as the original was before anything went, and what it loses are channels.

    Args:
        otherwise: what an error begins with if it is another.

    Raises:
        ValueError: it is another, or the file would set what is no number of channels.
    """
    modules = dict(model.named_modules())
    if differing := _differing(file, model, modules):
        raise ValueError(
            f"{otherwise}; {len(differing)} entries differ, among them "
            f"{', '.join(differing[:3])}; make it as it was made before pruning"
        )
    # Only counts become others: an attribute could be a method or a whole module.
    for name, own in file.removal.attributes.items():
        for attribute, value in own.items():
            old = get_attribute(modules[name], attribute)
            if not (_counts(old) and _counts(value) and _is_integer(old) == _is_integer(value)):
                raise ValueError(
                    f"path: the file would set {f'{name}.{attribute}'.lstrip('.')} to "
                    f"{value!r:.80}; it may only set numbers of channels, which modules hold as "
                    "integers; take a file that save_pruned wrote"
                )


def _differing(file: PrunedFile, model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of modules, attributes and tensors that the model has not as the original had them."""
    cuts, attributes, places, _orders = file.removal
    tensors = Tensors(modules)
    gone = tuple(f"{place.module}." for place in places)
    known = {name for name in tensors if not name.startswith(gone)}
    differing = [place.module for place in places if place.module not in modules]
    differing += [
        name
        for name, shape in file.shapes.items()
        if name not in known or list(tensors[name].shape) != shape
    ]
    differing += [
        f"{name}.{attribute}"
        for name, own in attributes.items()
        for attribute in own
        if name not in modules or not _is_there(modules[name], attribute)
    ]
    # What is left must have the shapes of the file's tensors, under every name of each.
    after = {
        id(tensors[name]): _resized(tensors[name], own, -1)
        for name, own in cuts.items()
        if name in known and name not in differing
    }
    shapes = {
        name: after.get(id(value), list(value.shape))
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not name.startswith(gone)
    }
    saved = {n: list(value.shape) for n, value in file.state.items() if isinstance(value, Tensor)}
    return differing + sorted(
        name
        for name in shapes.keys() | saved.keys()
        if shapes.get(name) != saved.get(name) and name not in differing
    )


def _is_there(module: nn.Module, attribute: str) -> bool:
    return hasattr(module, attribute) or get_attribute(module, attribute) is not None


def _resized(tensor: Tensor, cuts: Mapping[int, Tensor], sign: int) -> list[int]:
    """The shape with as many more, or with sign -1 fewer, as there are indices."""
    return [
        size + (sign * cuts[dim].numel() if dim in cuts else 0)
        for dim, size in enumerate(tensor.shape)
    ]


def _counts(value: object) -> bool:
    """Whether it is an integer, or a list or tuple of integers."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_integer, value))
    return _is_integer(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
