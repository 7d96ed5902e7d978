"""Answers in float64, and how far an answer may be from them.

A signed sum cancels, so an error is measured against the sum of magnitudes: in units of
eps32 * sum of |terms|. A squared sum s**2 may be off by 2|s| d + d**2 where s may be off by d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

EPS32 = 2.0**-23
#: Largest error of any provider, in eps32 * sum of |terms|. Columns of a 32000-row embedding,
#: summed one after another, are what needs it; most answers are within 4.
TOLERANCE = 64.0

#: name -> (value, sum of |terms|), both float64 vectors over all filters of a list.
Expected = dict[str, tuple[Tensor, Tensor]]


def moments(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Expected:
    """`rows.*` and `cols.*` of every weight: gw, gw2, abs_gw, w2, g2, and joint = gw**2."""
    parts: dict[str, list[Tensor]] = {}
    for weight, grad in zip(weights, grads, strict=True):
        w, g = (t.reshape(*t.shape[:2], -1).double() for t in (weight, grad))
        p = w * g
        terms = {
            "gw": p.sum(2),
            "gw2": p.square().sum(2),
            "abs_gw": p.abs().sum(2),
            "w2": w.square().sum(2),
            "g2": g.square().sum(2),
        }
        for name, term in terms.items():
            parts.setdefault(f"rows.{name}", []).append(term.sum(1))
            parts.setdefault(f"cols.{name}", []).append(term.sum(0))
    values = {name: torch.cat(each) for name, each in parts.items()}
    expected: Expected = {}
    for axis in ("rows", "cols"):
        scale = values[f"{axis}.abs_gw"]
        gw = values[f"{axis}.gw"]
        for name in ("gw2", "abs_gw", "w2", "g2"):
            expected[f"{axis}.{name}"] = (values[f"{axis}.{name}"],) * 2
        expected[f"{axis}.gw"] = (gw, scale)
        expected[f"{axis}.joint"] = (gw.square(), 2 * gw.abs() * scale + EPS32 * scale.square())
    return expected


def gates(output: Tensor, grad: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Sum over positions of y * dy per example and channel, and of its magnitude: [N, C]."""
    p = (output.double() * grad.double()).movedim(channel_dim, 1).flatten(2)
    return p.sum(2), p.abs().sum(2)


def check(answer: Mapping[str, Sequence[Tensor] | Tensor], expected: Expected) -> float:
    """The largest error in `answer`, in eps32 * sum of |terms|.

    Raises:
        AssertionError: it is above `TOLERANCE`, or not a number.
    """
    worst = 0.0
    for name, got in answer.items():
        value, scale = expected[name]
        flat = got if isinstance(got, Tensor) else torch.cat([t.flatten() for t in got])
        assert flat.shape == value.shape, f"{name}: {flat.shape} values, expected {value.shape}"
        error = (flat.double() - value).abs() / (EPS32 * scale).clamp_min(1e-300)
        here = float(error.max())
        assert here <= TOLERANCE, f"{name}: off by {here:.1f} eps32 * sum of |terms|"
        worst = max(worst, here)
    return worst
