"""What crosses from Python to C++ goes by name: csrc/bindings/records.h."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from taylor_kernels import layout
from taylor_kernels.backends.native import DTYPES, _native

if _native is None:
    pytest.skip("the native module is not built", allow_module_level=True)

ONE = torch.ones(1, 1, 1, 1)
#: op -> a call of it, whether it takes a list of them, and its seed if it has one.
CALLS: dict[str, tuple[Any, bool, tuple[int, ...]]] = {
    "filter_moments": (layout.parameter_item(ONE, ONE, None, 1, torch.empty(1, 5), None), True, ()),
    "second_order_moments": (
        layout.parameter_item(ONE, ONE, ONE, 1, torch.empty(1, 2), None),
        True,
        (),
    ),
    "hutchinson_moments": (
        layout.parameter_item(ONE, None, ONE, 1, torch.empty(1, 1), None),
        True,
        (3,),
    ),
    "rademacher": (layout.RademacherItem(torch.empty(1), 1, torch.float32, 0), True, (3,)),
    "global_threshold": (
        layout.GlobalThresholdArgs(
            torch.zeros(3, dtype=torch.int64),
            [layout.ScoreItem(ONE, None, 1, torch.float32, True)],
            1,
            False,
        ),
        False,
        (),
    ),
    "sparse_momentum": (
        layout.SparseMomentumArgs(
            torch.zeros(3, dtype=torch.int64),
            [
                layout.MomentumItem(
                    ONE.clone(), ONE, ONE.clone(), None, 1, 1, 0, torch.float32, True, 0.1, 0.0, 0.9
                )
            ],
        ),
        False,
        (),
    ),
    "mirror_step": (
        layout.MirrorItem(
            ONE.clone(),
            ONE,
            ONE.clone(),
            ONE.clone(),
            ONE.clone(),
            1,
            torch.float32,
            1,
            2,
            0,
            2,
            False,
            0.1,
            0.9,
            0.99,
            1e-8,
            1.0,
            1.0,
            1.0,
            0.0,
        ),
        True,
        (),
    ),
    "gate_gradients": (
        layout.activation_args(ONE, ONE, None, 1, torch.empty(1, 1)),
        False,
        (),
    ),
    "conv2d_fisher": (
        layout.conv2d_fisher_args(
            ONE, ONE, None, (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1, False, torch.empty(1, 1, 1, 1)
        ),
        False,
        (),
    ),
    "conv2d_example_norms": (
        layout.conv2d_fisher_args(
            ONE, ONE, None, (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1, False, torch.empty(1)
        ),
        False,
        (),
    ),
}


class Watched:
    """A call whose members are noted when they are read; some may be missing or other values."""

    def __init__(self, call: Any, missing: str = "", **other: object) -> None:
        self.call, self.missing, self.other = call, missing, other
        self.read: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name == self.missing:
            raise AttributeError(name)
        self.read.append(name)
        return self.other[name] if name in self.other else getattr(self.call, name)


def run(op: str, call: object) -> None:
    _, listed, seed = CALLS[op]
    getattr(_native, f"{op}_cpu")([call] if listed else call, 1, *seed)


@pytest.mark.parametrize("op", CALLS)
def test_every_member_is_read_by_its_name(op: str) -> None:
    call = CALLS[op][0]
    watched = Watched(call)
    run(op, watched)
    assert sorted(watched.read) == sorted(call._fields)


@pytest.mark.parametrize("op", CALLS)
def test_a_member_that_is_missing_is_named(op: str) -> None:
    call = CALLS[op][0]
    for name in call._fields:
        with pytest.raises(AttributeError, match=name):
            run(op, Watched(call, missing=name))


@pytest.mark.parametrize(
    ("op", "other", "error", "message"),
    [
        ("conv2d_fisher", {"stride": (1, 1, 1)}, TypeError, "not a pair"),
        ("conv2d_fisher", {"stride": 1}, TypeError, "not a pair"),
        ("conv2d_fisher", {"batch": "two"}, TypeError, "integer"),
        ("gate_gradients", {"dtype": torch.int32}, TypeError, "no kernel reads torch.int32"),
        ("gate_gradients", {"output": 3}, AttributeError, "data_ptr"),
        ("rademacher", {"stream": 2**32}, ValueError, "32 bits"),
        ("rademacher", {"stream": -1}, ValueError, "32 bits"),
        ("rademacher", {"elements": 2**63}, OverflowError, "too big"),
        ("mirror_step", {"rate": "fast"}, TypeError, "must be real number"),
        ("sparse_momentum", {"items": 3}, TypeError, "sequence"),
        ("sparse_momentum", {"items": [3]}, AttributeError, "weight"),
    ],
)
def test_what_does_not_fit_a_member_is_an_error(
    op: str, other: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(op, Watched(CALLS[op][0], **other))


def test_the_kernels_dtypes_are_those_of_the_layout() -> None:
    assert set(DTYPES.values()) == set(layout.FLOATS)
