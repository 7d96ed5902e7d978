"""filter_moments in Triton: csrc/common/filter_moments.h says what it computes, moments.py how."""

from __future__ import annotations

from collections.abc import Sequence

from taylor_kernels.backends.triton.moments import FILTER, run_moments
from taylor_kernels.layout import ParameterItem


def filter_moments(items: Sequence[ParameterItem]) -> None:
    """Write the moments of all items, which share a device, into their outputs."""
    run_moments(FILTER, items)
