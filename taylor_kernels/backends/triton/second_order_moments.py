"""second_order_moments in Triton: csrc/common/second_order_moments.h says what, moments.py how."""

from __future__ import annotations

from collections.abc import Sequence

from taylor_kernels.backends.triton.moments import SECOND_ORDER, run_moments
from taylor_kernels.layout import ParameterItem


def second_order_moments(items: Sequence[ParameterItem]) -> None:
    """Write (Σ q, Σ q²) of all items, which share a device, into their outputs."""
    run_moments(SECOND_ORDER, items)
