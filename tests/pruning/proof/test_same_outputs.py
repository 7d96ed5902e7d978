"""What counts as a difference between two outputs, held against its definition number by number."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taylor_kernels.pruning.proof.same_outputs import Ran, difference

TOLERANCE, OUTLIER, RESIDUE = 1e-7, 1e4, 1e-5


def greatest_usual(sizes: np.ndarray) -> float:
    sizes = np.sort(sizes[(sizes > 0) & np.isfinite(sizes)])
    if not len(sizes):
        return 0.0
    usual = sizes[int(np.ceil(2 * len(sizes) / 5)) - 1]
    return float(sizes[sizes <= OUTLIER * usual].max())


def same_by_definition(one: np.ndarray, other: np.ndarray) -> bool:
    differ = ~((one == other) | (np.isnan(one) & np.isnan(other)))
    if not differ.any():
        return True
    with np.errstate(invalid="ignore"):
        distance = np.abs(one - other)[differ]
    if not np.isfinite(distance).all():
        return False
    sizes = np.abs(one)
    scale = max(greatest_usual(sizes[differ]), RESIDUE * greatest_usual(sizes))
    return bool((distance <= TOLERANCE * np.maximum(sizes[differ], scale)).all())


def drawn(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """An output, and another one that differs in some numbers by more or less than is allowed."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    one = generator.standard_normal((draw(st.integers(1, 40)), draw(st.integers(1, 40))))
    one *= 10.0 ** draw(st.integers(-300, 250))
    for share, value in draw(
        st.lists(
            st.tuples(
                st.sampled_from([0.05, 0.3, 0.55, 0.7, 1.0]),
                st.sampled_from([0.0, 1e-5, 3e3, 1e4, 1e9, -1e30, np.inf, np.nan]),
            ),
            max_size=3,
        )
    ):
        chosen = generator.random(one.shape) < share
        size = np.abs(one[~chosen]).max(initial=0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            one[chosen] = value * size if value else 0.0
    far = 10.0 ** draw(st.integers(-18, -3))
    changed = generator.random(one.shape) < draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    finite = np.abs(one[np.isfinite(one)])
    reach = np.abs(one) if draw(st.booleans()) else np.full_like(one, finite.max(initial=0.0))
    with np.errstate(over="ignore", invalid="ignore"):
        other = np.where(changed, one + far * reach * generator.standard_normal(one.shape), one)
    return torch.from_numpy(one), torch.from_numpy(other)


@given(st.composite(drawn)())
def test_outputs_are_the_same_by_the_definition(pair):
    one, other = pair
    found, _ = difference(Ran([one]), Ran([other]), "its channels", exact=True)
    assert (not found) == same_by_definition(one.numpy(), other.numpy())
