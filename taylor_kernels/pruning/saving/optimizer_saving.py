"""The states of a run's optimizers in a checkpoint: those inside others are saved with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from taylor_kernels.pruning.removing.optimizer_state import as_list, optimizers_in
from taylor_kernels.pruning.saving.state import first_line

#: Flags that optimizers of a newer PyTorch add to the groups of an older one's state themselves.
_FILLED_IN = {
    "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize",
}  # fmt: skip


def optimizer_states(optimizer: object) -> Any:
    """The state_dict of an optimizer, or a list of those of several and of all inside them."""
    states = [one.state_dict() for one in concerned(optimizer)]
    return states[0] if len(states) == 1 else states


def check_optimizer_states(
    saved: Any,
    optimizer: object,
    shapes: Mapping[Any, tuple[int, ...]],
    gone: Collection[Tensor] = (),
) -> None:
    """What `optimizer_states` gave, of optimizers like these.

    Args:
        shapes: parameter -> the shape that it will have.
        gone: parameters that will be in none of the groups.

    Raises:
        ValueError: it is damaged, or of other optimizers. Nothing has changed.
    """
    own, states = concerned(optimizer), _listed(saved)
    if len(own) != len(states):
        raise ValueError(
            f"optimizer: the file has the states of {len(states)} of them, where there are "
            f"{len(own)} here, those inside others counted: "
            f"{', '.join(type(one).__name__ for one in own)}"
        )
    with _put_back(own):
        left_out = set(gone)
        for one in own:
            for group in one.param_groups:
                group["params"] = [p for p in group["params"] if p not in left_out]
        for one, state in zip(own, states, strict=True):
            _check_state(state, one)
            _check_shapes(state, one, shapes)
        # What else an optimizer needs, it alone knows: it tries.
        for one, state in zip(own, states, strict=True):
            try:
                one.load_state_dict(state)
            except Exception as error:
                raise ValueError(
                    f"optimizer: {type(one).__name__} does not take its state in the file "
                    f"({type(error).__name__}: {first_line(error)})"
                ) from error


def load_optimizer_states(saved: Any, optimizer: object) -> None:
    """Load what `check_optimizer_states` has let pass.

    Groups and states stay the objects that they are, since optimizers share them.
    """
    own = concerned(optimizer)
    before = [(one.param_groups, list(one.param_groups), one.state) for one in own]
    for one, state in zip(own, _listed(saved), strict=True):
        one.load_state_dict(state)
    loaded = [([dict(group) for group in one.param_groups], dict(one.state)) for one in own]
    for one, (listed, groups, state), (new_groups, new_state) in zip(
        own, before, loaded, strict=True
    ):
        for group, new in zip(groups, new_groups, strict=True):
            group.clear()
            group.update(new)
        listed[:] = groups
        state.clear()
        state.update(new_state)
        one.param_groups, one.state = listed, state


def concerned(optimizer: object) -> list[Optimizer]:
    """The optimizers that are given, and those inside them that hold parameters of theirs."""
    given = as_list(optimizer)
    own = {p for one in given for group in one.param_groups for p in group["params"]}
    return [
        one
        for one in optimizers_in(optimizer)
        if one in given or any(p in own for group in one.param_groups for p in group["params"])
    ]


def _listed(saved: Any) -> list[Any]:
    return saved if isinstance(saved, list) else [saved]


@contextmanager
def _put_back(optimizers: list[Optimizer]) -> Iterator[None]:
    """Whatever is loaded inside, the optimizers are as before in the end."""
    kept = [
        (
            one,
            dict(vars(one)),
            [(group, dict(group)) for group in one.param_groups],
            {parameter: dict(state) for parameter, state in one.state.items()},
        )
        for one in optimizers
    ]
    try:
        yield
    finally:
        for one, attributes, groups, states in kept:
            vars(one).clear()
            vars(one).update(attributes)
            for group, content in groups:
                group.clear()
                group.update(content)
            one.param_groups[:] = [group for group, _ in groups]
            one.state.clear()
            one.state.update(states)


def _check_state(state: Any, optimizer: Optimizer) -> None:
    own = [len(group["params"]) for group in optimizer.param_groups]
    try:
        saved = [len(group["params"]) for group in state["param_groups"]]
        numbers = {number for group in state["param_groups"] for number in group["params"]}
        sound = state["state"].keys() <= numbers and all(
            isinstance(entry, Mapping) for entry in state["state"].values()
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("optimizer: its state in the file is damaged") from error
    if own != saved:
        raise ValueError(
            f"optimizer: the file is of another one, with {saved} parameters in its groups where "
            f"this one has {own}"
        )
    if not sound:
        raise ValueError("optimizer: its state in the file is damaged")
    for group in state["param_groups"]:
        if lacking := optimizer.defaults.keys() - group.keys() - _FILLED_IN:
            raise ValueError(
                f"optimizer: the file is of another one than {type(optimizer).__name__}, without "
                f"{', '.join(sorted(lacking))}"
            )


def _check_shapes(state: Any, optimizer: Optimizer, shapes: Mapping[Any, tuple[int, ...]]) -> None:
    """State tensors must follow their parameters, or they could not have been cut with them."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in state["state"].get(number, {}).items():
            if parameter not in shapes or not isinstance(value, Tensor) or value.numel() == 1:
                continue
            shape = shapes[parameter]
            if value.dim() != len(shape) and shape == parameter.shape:
                continue  # some optimizers keep tables of their own beside what follows the shape
            if value.dim() != len(shape) or any(
                mine not in (1, theirs) for mine, theirs in zip(value.shape, shape, strict=True)
            ):
                raise ValueError(
                    f"optimizer: its state in the file is damaged ({key!r} of parameter {number} "
                    f"has shape {tuple(value.shape)}, the parameter {shape})"
                )
