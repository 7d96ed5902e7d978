"""Code that asserts things of a tensor: pytest rewrites assertions in test files, and not here."""

from __future__ import annotations

import torch
from torch import Tensor


def plain(x: Tensor) -> None:
    assert x.isfinite().all()


def of_two(x: Tensor) -> None:
    assert x.isfinite().all() and x.abs().max() < 1e9, f"{len(x)} rows have to be finite"  # noqa: PT018


def number(x: Tensor) -> None:
    assert x.abs().max().item() < 1e9


def raising(x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError(f"{x} has to be finite")


def equal(x: Tensor) -> None:
    if not torch.equal(x, x.nan_to_num()):
        raise ValueError("x has to be finite")


def by_torch(x: Tensor) -> None:
    torch._assert(x.isfinite().all(), "x has to be finite")


#: Each returns nothing, or raises.
ASSERTIONS = [plain, of_two, number, raising, equal, by_torch]


def caught(x: Tensor) -> bool:
    try:
        assert x[:, 0].max() < 1e3
    except AssertionError:
        return True
    return False


def caught_outside(x: Tensor) -> bool:
    try:
        below(x)
    except ValueError:
        return True
    return False


def below(x: Tensor) -> None:
    if x[:, 0].max() > 1e3:
        raise ValueError


def told(x: Tensor) -> bool:
    found = x[:, 0].max() > 1e3
    if found and len(x) > 100:
        raise ValueError
    return bool(found)
