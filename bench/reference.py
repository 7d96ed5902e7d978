"""Answers in float64, and how far an answer may be from them.

A signed sum cancels, so an error is measured against the sum of magnitudes: in units of
eps32 * sum of |terms|. A squared sum s**2 may be off by 2|s| d + d**2 where s may be off by d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
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


def second_order(
    weights: Sequence[Tensor], grads: Sequence[Tensor], hvps: Sequence[Tensor]
) -> Expected:
    """`rows.*` and `cols.*` of every weight: joint = (Σq)² and q2 = Σq², q = w·(g − ½h)."""
    terms = []
    for w, g, h in zip(weights, grads, hvps, strict=True):
        w, g, h = (t.double() for t in (w, g, h))
        scale = w.abs() * (g.abs() + h.abs() / 2)
        q = w * (g - h / 2)
        terms.append((q, q.square(), scale, scale.square()))
    expected: Expected = {}
    for axis in ("rows", "cols"):
        q, q2, scale, scale2 = _sums(terms, axis)
        expected[f"{axis}.joint"] = (q.square(), 2 * q.abs() * scale + EPS32 * scale.square())
        expected[f"{axis}.q2"] = (q2, scale2)
    return expected


def hutchinson(
    weights: Sequence[Tensor], hvps: Sequence[Tensor], signs: Sequence[Tensor]
) -> Expected:
    """`rows.curvature` and `cols.curvature` of every weight: Σ w² z h."""
    products = (
        w.double().square() * z.double() * h.double()
        for w, h, z in zip(weights, hvps, signs, strict=True)
    )
    terms = [(p, p.abs()) for p in products]
    return {f"{axis}.curvature": (*_sums(terms, axis),) for axis in ("rows", "cols")}


def _sums(terms: Sequence[tuple[Tensor, ...]], axis: str) -> list[Tensor]:
    """Each term of all layers summed per filter."""
    dims = {"rows": (1, 2), "cols": (0, 2)}[axis]
    each = zip(*terms, strict=True)
    return [torch.cat([t.reshape(*t.shape[:2], -1).sum(dims) for t in layers]) for layers in each]


def gates(output: Tensor, grad: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Sum over positions of y * dy per example and channel, and of its magnitude: [N, C]."""
    p = (output.double() * grad.double()).movedim(channel_dim, 1).flatten(2)
    return p.sum(2), p.abs().sum(2)


def fisher(
    x: Tensor, dy: Tensor, weight: Tensor, stride: int, padding: int, eps: float = EPS32
) -> Expected:
    """`squares`: Σ_k w_k² Σ_n g²_{n,k} per filter, and `grads`: Σ_n g_n, flat; by unfolding.

    With products rounded by eps, g may be off by d = eps · Σ|terms| and g² by 2|g| d + d². Scales
    are in units of eps.
    """
    w2 = weight.double().square().flatten(1)
    squares, squares_scale = x.new_zeros(2, len(w2), dtype=torch.float64)
    grads, grads_scale = x.new_zeros(2, *w2.shape, dtype=torch.float64)
    for one, grad in zip(x.split(1), dy.split(1), strict=True):
        columns, rows = one.double(), grad.double()
        if weight.dim() == 4:
            columns = F.unfold(columns, weight.shape[2:], 1, padding, stride)[0]
            rows = rows[0].flatten(1)
        else:
            columns, rows = (t.reshape(-1, t.size(-1)).T for t in (columns, rows))
        example, scale = rows @ columns.T, rows.abs() @ columns.abs().T
        grads += example
        grads_scale += scale
        squares += (w2 * example.square()).sum(1)
        squares_scale += (w2 * (2 * example.abs() * scale + eps * scale.square())).sum(1)
    return {
        "squares": (squares, squares_scale),
        "grads": (grads.flatten(), grads_scale.flatten()),
    }


def check(
    answer: Mapping[str, Sequence[Tensor] | Tensor],
    expected: Expected,
    tolerance: float = TOLERANCE,
) -> float:
    """The largest error in `answer`, in eps32 * sum of |terms|.

    Raises:
        AssertionError: it is above the tolerance, or not a number.
    """
    worst = 0.0
    for name, got in answer.items():
        value, scale = expected[name]
        flat = got if isinstance(got, Tensor) else torch.cat([t.flatten() for t in got])
        assert flat.shape == value.shape, f"{name}: {flat.shape} values, expected {value.shape}"
        error = (flat.double() - value).abs() / (EPS32 * scale).clamp_min(1e-300)
        here = float(error.max())
        assert here <= tolerance, f"{name}: off by {here:.1f} eps32 * sum of |terms|"
        worst = max(worst, here)
    return worst


def check_scores(
    answer: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> float:
    """The largest distance of a layer's scores from float64's, relative, as Euclidean norms.

    For whole steps. Most runs are within 1e-5, but where a float32 activation falls on the other
    side of a ReLU's kink than the float64 one, all layers before it move by some 1e-3.

    Raises:
        AssertionError: it is above the tolerance or not a number, or there are other layers.
    """
    assert answer.keys() == expected.keys(), "other layers than expected"
    worst = 0.0
    for name, want in expected.items():
        here = float((answer[name].double() - want).norm() / want.norm())
        assert here <= tolerance, f"{name}: off by {here:.1e} of its scores"
        worst = max(worst, here)
    return worst
