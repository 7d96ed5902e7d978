"""An optimizer's state follows the model: it is masked and cut with the parameters."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from taylor_kernels.hooks import Hook

Cuts = Mapping[int, Tensor]  # dimension -> the indices that go
#: Id of an index and the size of its dimension -> what is kept of it, and where that begins if it
#: is one run; see `cut`.
Kept = dict[tuple[int, int], tuple[Tensor, int | None]]


#: What optimizers_in looks at before it gives up; an optimizer that is wrapped lies near.
_MOST_OBJECTS = 10_000
_NOT_OPENED = (bool, bytes, float, int, str, type, ModuleType, Tensor, nn.Module, type(None))


def as_list(optimizer: object) -> list[Any]:
    """The optimizers that an argument `optimizer` gives: one, several or None."""
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def check_optimizer_types(optimizer: object) -> None:
    """The argument `optimizer` is an optimizer, a list of them, or None.

    Raises:
        TypeError: one is something else.
    """
    for one in as_list(optimizer):
        if not isinstance(one, Optimizer):
            raise TypeError(
                "optimizer: expected a torch.optim.Optimizer or a list of them, got "
                f"{type(one).__name__}"
            )


def optimizers_in(optimizer: object) -> list[Optimizer]:
    """An optimizer, or several, and those that they wrap and that may hold the state.

    They are looked for in attributes, containers, closures and bound methods.
    """
    found: list[Optimizer] = []
    seen: set[int] = set()
    held: list[Any] = [optimizer]
    for value in held:
        if isinstance(value, _NOT_OPENED) or id(value) in seen:
            continue
        if len(seen) > _MOST_OBJECTS:
            break
        seen.add(id(value))
        if isinstance(value, Optimizer):
            found.append(value)
            seen |= {id(value.state), id(value.param_groups)}  # an entry for every parameter
            held += vars(value).values()
        elif isinstance(value, Mapping):
            held += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            held += value
        elif isinstance(value, MethodType):
            held += [value.__self__, value.__func__]
        elif isinstance(value, CellType):
            with contextlib.suppress(ValueError):  # of a name that has no value yet
                held.append(value.cell_contents)
        elif isinstance(value, FunctionType):
            held += value.__closure__ or ()
        elif isinstance(value, partial):
            held += [value.func, value.args, value.keywords]
        else:
            held.append(getattr(value, "__dict__", None))
    return found


class Steps:
    """Which optimizers have made a step since."""

    def __init__(self) -> None:
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        handle = register_optimizer_step_post_hook(Hook(self._note))
        self.close = weakref.finalize(self, handle.remove)

    def _note(self, optimizer: Optimizer, *_: object) -> None:
        self.optimizers.add(optimizer)

    def forget(self, optimizers: Iterable[Optimizer]) -> None:
        """Take these for ones that have made none."""
        self.optimizers.difference_update(optimizers)


def check_complete(
    optimizers: Sequence[Optimizer], stepped: Collection[Optimizer], cut: Mapping[str, Tensor]
) -> None:
    """The optimizers hold all the state there is of parameters that are to be cut.

    Warns where a parameter is in no group, and where no state of it is found though there should
    be one.

    Args:
        stepped: the optimizers that have made steps, of whatever parameters.
        cut: name -> parameter.

    Raises:
        ValueError: another optimizer has made steps with parameters that these hold too.
    """
    grouped = {p for one in optimizers for group in one.param_groups for p in group["params"]}
    trained = {n: p for n, p in cut.items() if isinstance(p, nn.Parameter) and p.requires_grad}
    for one in stepped:
        shared = [
            name for name, p in trained.items() if p in grouped and p in one.state and one.state[p]
        ]
        if one not in optimizers and shared:
            raise ValueError(
                f"optimizer: it is given without the {type(one).__name__} that keeps the state of "
                f"{_some(shared)}, which would go on with the old parameters; give both to the "
                "pruner, as in Pruner(optimizer=[outer, inner]). Nothing has changed"
            )
    if outside := [name for name, p in trained.items() if p not in grouped]:
        warnings.warn(
            f"optimizer: {_some(outside)} are in none of its groups and are replaced now, so an "
            "optimizer that holds them would not train the model any more; give all of them, as "
            "in Pruner(optimizer=[first, second])",
            stacklevel=6,
        )
    acted = [one for one in optimizers if one in stepped and not _is_stateless(one)]
    having = {p for one in optimizers for p, state in one.state.items() if state}
    expected = {p for one in acted for group in one.param_groups for p in group["params"]}
    lacking = [
        name
        for name, p in trained.items()
        if p in expected and p.grad is not None and p not in having
    ]
    if lacking:
        names = ", ".join(sorted({type(one).__name__ for one in acted}))
        warnings.warn(
            f"optimizer: {names} has made steps, but no state of {_some(lacking)} is found in it, "
            "so if it keeps one elsewhere, that is not cut with the model; give the optimizer "
            "that it wraps too, as in Pruner(optimizer=[outer, inner])",
            stacklevel=6,
        )


def _is_stateless(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, SGD) and not any(
        group.get("momentum") for group in optimizer.param_groups
    )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def check_follows(
    optimizers: Iterable[Optimizer], name: str, parameter: Tensor, cuts: Cuts
) -> None:
    """The state of a parameter can be cut with it.

    Raises:
        ValueError: a state tensor has no dimensions of the parameter's.
    """
    shape = parameter.shape
    for one in optimizers:
        for key, value in one.state.get(parameter, {}).items():
            if not (isinstance(value, Tensor) and value.shape == shape):
                _state_cuts(name, key, value, parameter, cuts)


def follow(optimizers: Iterable[Optimizer], new: Mapping[str, tuple[Tensor, Tensor, Cuts]]) -> None:
    """Put new parameters in the place of old ones, with their state cut.

    Args:
        new: name -> the old parameter, the new one, and what was cut.
    """
    replaced = {old: parameter for old, parameter, _ in new.values()}
    for one in optimizers:
        for group in one.param_groups:
            group["params"] = [replaced.get(p, p) for p in group["params"]]
        for name, (old, parameter, cuts) in new.items():
            if old in one.state:
                state = one.state.pop(old)
                for key, value in state.items():
                    if own := _state_cuts(name, key, value, old, cuts):
                        state[key] = cut(value, own)
                one.state[parameter] = state


def masked_state(
    optimizers: Iterable[Optimizer], name: str, parameter: Tensor, cuts: Cuts
) -> Iterator[tuple[Tensor, Cuts]]:
    """Tensors of a parameter's state, and which entries go with those that are masked: zero is
    where removal would have left them."""
    for one in optimizers:
        for key, value in one.state.get(parameter, {}).items():
            if own := _state_cuts(name, key, value, parameter, cuts):
                yield value, own


def cut(tensor: Tensor, cuts: Cuts, kept: Kept | None = None, *, may_share: bool = False) -> Tensor:
    """The tensor without these indices, laid out as it was, in memory of its own.

    Fused optimizers take for granted that state lies in memory as its parameter does.

    Args:
        kept: indices that stay, by the id of those that go and the size they go from:
            `Channels.entries` has one index tensor for all places of one make, and they are worked
            out once. To be kept no longer than the cuts.
        may_share: rows of it that lie together need no copy.
    """
    kept = {} if kept is None else kept
    rest, form = [], _form(tensor)
    for dim, index in cuts.items():
        key = id(index), tensor.size(dim)
        if (known := kept.get(key)) is None:
            stays = torch.ones(tensor.size(dim), dtype=torch.bool)
            stays[index] = False
            left = stays.nonzero().flatten()
            first = int(left[0]) if left.numel() else 0
            run = not left.numel() or int(left[-1]) - first + 1 == left.numel()
            known = kept[key] = left, first if run else None
        left, begin = known
        if begin is None:
            rest.append((dim, left))
        else:
            # A run of them is a view; one copy is made of all views at the end.
            tensor = tensor.narrow(dim, begin, left.numel())
    for dim, left in rest:
        tensor = tensor.index_select(dim, left.to(tensor.device))
    if rest or may_share:
        return tensor.contiguous(memory_format=form)
    return tensor.clone(memory_format=form)


def _form(tensor: Tensor) -> torch.memory_format:
    """Of an image's or a volume's weight that is not contiguous, channels_last."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(
        tensor.dim(), torch.contiguous_format
    )


def _state_cuts(name: str, key: str, value: object, parameter: Tensor, cuts: Cuts) -> Cuts:
    """The cuts that apply to a state tensor: those along dimensions it has in full."""
    if not isinstance(value, Tensor):
        return {}
    if value.shape == parameter.shape:  # also where neither has an entry
        return cuts
    if value.numel() <= 1:
        return {}
    pairs = list(zip(value.shape, parameter.shape, strict=False))
    if value.dim() != parameter.dim() or any(mine not in (1, theirs) for mine, theirs in pairs):
        raise ValueError(
            f"optimizer: its state {key!r} of {name!r} has shape {tuple(value.shape)}, which does "
            f"not follow the parameter's {tuple(parameter.shape)}, so it cannot be cut with it; "
            "use an optimizer whose state has an entry per weight (SGD, Adam, ...), or build the "
            "pruner with optimizer=None and make a new optimizer after compact()"
        )
    return {dim: index for dim, index in cuts.items() if value.size(dim) == parameter.size(dim)}
