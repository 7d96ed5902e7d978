"""What a type checker knows of the ops' results; read by mypy (see pyproject.toml), never run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import assert_type

import taylor_kernels as tk


def results(w: Tensor, ws: Sequence[Tensor]) -> None:
    one, many = tk.filter_moments(w, w), tk.filter_moments(ws, ws, dim=1, groups=[1])
    assert_type(one, Tensor)
    assert_type(many, list[Tensor])
    assert_type(tk.filter_moments(weights=w, grads=w, dim=(0, 1)), tuple[Tensor, Tensor])
    assert_type(
        tk.filter_moments(ws, ws, dim=(0, 1), backend="cpu"), tuple[list[Tensor], list[Tensor]]
    )
    assert_type(tk.filter_moments(ws, ws, packed=True, moments=("gw",)), Tensor)
    assert_type(tk.filter_moments(ws, ws, packed=True, dim=(0, 1)), tuple[Tensor, Tensor])
    assert_type(tk.filter_moments(ws, ws, packed=False), list[Tensor])
    assert_type(tk.second_order_moments(w, w, w, groups=2), Tensor)
    assert_type(tk.second_order_moments(ws, ws, ws, packed=True), Tensor)
    assert_type(tk.second_order_moments(ws, ws, ws), list[Tensor])
    assert_type(tk.second_order_moments(w, w, w, dim=(0, 1)), tuple[Tensor, Tensor])
    assert_type(tk.hutchinson_moments(w, w, seed=0), Tensor)
    assert_type(tk.hutchinson_moments(ws, ws, seed=0, streams=[3]), list[Tensor])
    assert_type(tk.hutchinson_moments(w, w, seed=0, dim=(0, 1)), tuple[Tensor, Tensor])
    assert_type(
        tk.hutchinson_moments(ws, ws, dim=(0, 1), seed=0), tuple[list[Tensor], list[Tensor]]
    )
    assert_type(tk.hutchinson_moments(ws, ws, seed=0, packed=True), Tensor)
    assert_type(tk.rademacher_like(w, seed=0), Tensor)
    assert_type(tk.rademacher_like(ws, seed=0), list[Tensor])


def mistakes(w: Tensor) -> None:
    """Each line is an error; mypy reports those that are not, as comments that nothing needs."""
    tk.filter_moments(w, [w])  # type: ignore[call-overload]
    tk.filter_moments(w, w, dims=0)  # type: ignore[call-overload]
    tk.hutchinson_moments(w, w)  # type: ignore[call-overload]
