"""hutchinson_moments in Triton: csrc/common/hutchinson_moments.h says what, moments.py how."""

from __future__ import annotations

from collections.abc import Sequence

from taylor_kernels.backends.triton.moments import HUTCHINSON, run_moments
from taylor_kernels.layout import ParameterItem


def hutchinson_moments(items: Sequence[ParameterItem], seed: int) -> None:
    """Write Σ w² z (Hz) of all items, which share a device, into their outputs."""
    run_moments(HUTCHINSON, items, seed)
