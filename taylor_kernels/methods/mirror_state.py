"""What MirrorDescent refuses as a saved state, before it changes anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from taylor_kernels.layout import accumulator
from taylor_kernels.methods.mirror_settings import check_group, is_quantized
from taylor_kernels.methods.mirror_values import MOMENTS, rule_of


def check_state(
    groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], state_dict: Mapping[str, Any]
) -> None:
    """A saved state is one of an optimizer of these groups, or an error that says what differs.

    Args:
        defaults: the optimizer's, which every group of it has.
    """
    missing = sorted({"state", "param_groups"} - state_dict.keys())
    if missing:
        raise ValueError(
            f"state_dict: it has no {missing[0]!r}; pass what state_dict() of a MirrorDescent gave"
        )
    options = {*defaults, "iteration", "rounded"}  # what else a group has is of schedulers
    saved_groups, states = state_dict["param_groups"], state_dict["state"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"state_dict: it has {len(saved_groups)} parameter groups, the optimizer has "
            f"{len(groups)}; make it with the groups that it was saved with"
        )
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        count, wanted = len(saved["params"]), len(group["params"])
        if count != wanted:
            raise ValueError(
                f"state_dict: its group {number} has {count} parameters, which doesn't match the "
                f"size of the optimizer's, {wanted}; make it with the groups that were saved"
            )
        lacking = sorted(options - saved.keys())
        if lacking:
            raise ValueError(
                f"state_dict: its group {number} has no {lacking[0]!r}, so it is the state of "
                "another optimizer; pass what state_dict() of a MirrorDescent gave"
            )
        check_group(saved, number)
        for i, (param, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            where = f"state_dict: parameter {i} of group {number}"
            _check_parameter(where, saved, param, states.get(key, {}))


def with_start(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A saved state whose groups have the option `start`, which those of before it lack."""
    groups = state_dict.get("param_groups")
    if groups is None:
        return state_dict
    return {**state_dict, "param_groups": [{"start": "weights", **group} for group in groups]}


def _check_parameter(
    where: str, saved: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]
) -> None:
    shape = tuple(param.shape)
    quantized = is_quantized(saved, param)
    needed = ("step", "value", "scale") if quantized else ("step",)
    for name in needed:
        if name not in state:
            raise ValueError(
                f"{where}, of shape {shape}, has no {name!r}; pass a state that a MirrorDescent of "
                "such parameters has saved"
            )
    if not quantized and "value" in state:
        raise ValueError(
            f"{where} was quantized where it was saved; of shape {shape} and with quantize="
            f"{saved['quantize']!r} it is not. Load it into the model that it was saved with"
        )
    if quantized and not 0 < state["scale"] < math.inf:
        raise ValueError(f"{where} has scale {state['scale']!r}; it is a number greater than 0")
    # A softmax keeps a plane for each level, in front of the shape of the weight.
    rule = rule_of(saved, state, saved["beta"])
    dtype = accumulator(param.dtype)
    for name in ("value", *MOMENTS[saved["optimizer"]]):
        if name not in state:
            continue
        planes = rule.planes if name == "value" else rule.moment_planes
        wanted = (planes, *shape) if planes > 1 else shape
        kept = state[name]
        if not isinstance(kept, Tensor) or (tuple(kept.shape), kept.dtype) != (wanted, dtype):
            found = type(kept).__name__
            if isinstance(kept, Tensor):
                found = f"{tuple(kept.shape)} of {kept.dtype}"
            raise ValueError(
                f"{where} has shape {shape}, and the {name!r} that was saved for it is {found}, "
                f"not {wanted} of {dtype}; load it into the model that it was saved with"
            )
