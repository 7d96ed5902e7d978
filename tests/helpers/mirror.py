"""One step of mirror descent in float64, written from the papers' formulas and nothing else.

A softmax's Jacobian comes from autograd, the mirror forms from their dual variables: none of it is
how the kernels compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taylor_kernels.ops.mirror_step import MirrorRule, mirror_step
from tests.helpers.cases import EPS32

#: (projection, update) -> the numbers of levels that it exists for.
RULES = {
    ("identity", "dual"): (2,),
    ("tanh", "dual"): (2, 3),
    ("tanh", "jacobian"): (2, 3),
    ("tanh", "mirror"): (2,),
    ("softmax", "dual"): (2, 3),
    ("softmax", "jacobian"): (2, 3),
    ("softmax", "mirror"): (2, 3),
    ("sign", "dual"): (2, 3),
}
DIRECTIONS = ("gradient", "momentum", "adam")


def every_rule(**numbers: float) -> list[MirrorRule]:
    """Each that there is, with numbers that leave no term out."""
    given = dict(
        rate=0.03, decay=0.8, decay2=0.9, eps=0.01, beta=1.7, next_beta=1.9, scale=0.3,
        weight_decay=0.2,
    ) | numbers  # fmt: skip
    unscaled = given | {"scale": 1.0}
    return [
        MirrorRule(
            projection,
            levels,
            update,
            direction,
            **(unscaled if projection == "identity" else given),
        )
        for (projection, update), each in RULES.items()
        for levels in each
        for direction in DIRECTIONS
    ]


RULES_OF_TESTS = every_rule()


def label(rule: MirrorRule) -> str:
    return f"{rule.projection}{rule.levels}-{rule.update}-{rule.direction}"


class Tensors(NamedTuple):
    """What a step of one parameter reads and writes; flat ones are [planes, elements]."""

    param: Tensor
    grad: Tensor
    value: Tensor | None
    first: Tensor | None
    second: Tensor | None

    def copies(self) -> Tensors:
        return Tensors(*(None if t is None else t.clone() for t in self))


def random_tensors(rule: MirrorRule, shape: Sequence[int], dtype: torch.dtype) -> Tensors:
    """Of a step in mid-training; the parameter holds NaN where a step only writes it."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    count = torch.Size(shape).numel()
    value = torch.randn(rule.planes, count, dtype=wide)
    if rule.update == "mirror":
        value = (2 * value).softmax(0) if rule.projection == "softmax" else value.tanh()
    moments = [
        torch.randn(rule.moment_planes, count, dtype=wide) if i < rule.moments else None
        for i in range(2)
    ]
    param = torch.randn(shape).to(dtype)
    if rule.planes:
        param.fill_(float("nan"))
    return Tensors(
        param,
        torch.randn(shape).to(dtype),
        value if rule.planes else None,
        moments[0],
        None if moments[1] is None else moments[1].square(),
    )


def run(rules: Sequence[MirrorRule], each: Sequence[Tensors], backend: str | None = None) -> None:
    params, grads, values, first, second = zip(*each, strict=True)
    mirror_step(params, grads, values, first, second, rules, backend=backend)


def projected64(rule: MirrorRule, value: Tensor, beta: float) -> Tensor:
    """x of a dual value [planes, elements]."""
    levels = torch.linspace(-1, 1, rule.levels, dtype=value.dtype)
    if rule.projection == "softmax":
        return levels @ torch.softmax(beta * value, 0)
    if rule.projection == "tanh":
        if rule.levels == 2:
            return torch.tanh(beta * value[0])
        return (torch.tanh(beta * value[0] + beta / 2) + torch.tanh(beta * value[0] - beta / 2)) / 2
    size = 1.0 if rule.levels == 2 else (value[0].abs() > 0.5).double()
    return torch.where(value[0] < 0, -1.0, 1.0).double() * size


def step64(rule: MirrorRule, given: Tensors) -> Tensors:
    """What the step makes of its tensors, in float64; the parameter comes out flat."""
    levels = torch.linspace(-1, 1, rule.levels, dtype=torch.float64)[:, None]
    g = given.grad.double().flatten()
    if given.value is None:
        w = given.param.double().flatten()
        d, *moments = _direction(rule, given, (g + rule.weight_decay * w)[None])
        return Tensors((w - rule.rate * d[0]), g, None, *moments)
    g = rule.scale * g
    old = given.value.double()
    if rule.update == "jacobian":
        old.requires_grad_()
        projected64(rule, old, rule.beta).backward(g)
        d, *moments = _direction(rule, given, old.grad)
        value = old.detach() - rule.rate * d
    else:
        d, *moments = _direction(rule, given, g[None])
        along = levels * d if rule.projection == "softmax" else d
        if rule.update == "mirror":
            turned = rule.beta * rule.rate * along
            if rule.projection == "softmax":
                value = torch.softmax(old.log() - turned, 0)
                x = value[-1] - value[0]
            else:
                value = torch.tanh(torch.atanh(old) - turned)
                x = value[0]
            return Tensors(rule.scale * x, g, value, *moments)
        value = old - rule.rate * along
        if rule.projection == "sign":
            value = value.clamp(-1, 1)
    return Tensors(rule.scale * projected64(rule, value, rule.next_beta), g, value, *moments)


def _direction(rule: MirrorRule, given: Tensors, g: Tensor) -> list[Tensor | None]:
    """d, and the new moments."""
    m, v = (None if t is None else t.double() for t in (given.first, given.second))
    if rule.direction == "gradient":
        return [g, None, None]
    assert m is not None
    if rule.direction == "momentum":
        m = rule.decay * m + g
        return [m, m, None]
    assert v is not None
    m = rule.decay * m + (1 - rule.decay) * g
    v = rule.decay2 * v + (1 - rule.decay2) * g**2
    return [m / (v**0.5 + rule.eps), m, v]


#: A step's roundings: some tens of operations on numbers of order 1, or of the terms that it adds,
#: which may cancel. A projection multiplies them by its slope, up to β.
C = 8


def check(rule: MirrorRule, before: Tensors, after: Tensors) -> None:
    """Each tensor that a step wrote is within C roundings of float64, the parameter within those
    of its dtype."""
    expected = step64(rule, before)
    terms = _terms(rule, before, expected.second)
    slope = max(rule.beta, rule.next_beta)
    added = {"param": terms, "value": terms}
    if rule.update == "jacobian":
        # A rounding of β·value moves an exponential by as much relative to it, and the Jacobian by
        # β times that; the next projection multiplies what this moves the value by.
        assert before.value is not None
        added["value"] = terms * (1 + slope * (1 + before.value.double().abs().amax(0)))
        added["param"] = added["value"] * (1 + slope) * max(rule.scale, 1.0)
    for name, got, wanted in zip(Tensors._fields, after, expected, strict=True):
        if wanted is None or name == "grad":
            continue
        got = got.flatten() if name == "param" else got
        eps = torch.finfo(got.dtype).eps if name == "param" else 0.0
        unit = EPS32 if before.param.dtype != torch.float64 else 2**-52
        size = 1 + wanted.abs() + added.get(name, 0.0)
        bound = C * (1 + slope) * unit * size + eps * (1 + wanted.abs())
        off = (got.double() - wanted).abs()
        assert (off <= bound).all(), f"{label(rule)} {name}: {(off / bound).max():.2f} of the bound"


def _terms(rule: MirrorRule, given: Tensors, second: Tensor | None) -> Tensor:
    """The sizes of what a step adds up, [elements]: |η g| + |η m|, both over √v + ε for Adam.

    Args:
        second: v after the step.
    """
    g = rule.scale * given.grad.double().flatten().abs()[None]
    if rule.direction != "gradient":
        assert given.first is not None
        adam = rule.direction == "adam"
        g = rule.decay * given.first.double().abs() + (1 - rule.decay if adam else 1) * g
    if second is not None:
        g = g / (second.sqrt() + rule.eps)
    return rule.rate * g.sum(0)


def check_projections(rule: MirrorRule, each: Sequence[Tensors], backend: str) -> None:
    """Without a gradient the value stays, and is projected or rounded to its level."""
    levels = torch.linspace(-1, 1, rule.levels, dtype=torch.float64)
    for rounded in (False, True):
        bare = [tensors._replace(grad=None, first=None, second=None) for tensors in each]
        held = [tensors.copies() for tensors in bare]
        run([rule._replace(rounded=rounded)] * len(bare), bare, backend)
        for old, new in zip(held, bare, strict=True):
            assert old.value is not None
            assert new.value is not None
            assert new.value.equal(old.value)
            value = old.value.double()
            if rule.update != "mirror":
                x = projected64(rule, value, rule.next_beta)
            else:
                x = value[-1] - value[0] if rule.projection == "softmax" else value[0]
            dtype = new.param.dtype
            got = new.param.double().flatten()
            bound = C * (1 + rule.next_beta) * EPS32
            if not rounded:
                close = dict(rtol=torch.finfo(dtype).eps, atol=bound)
                torch.testing.assert_close(got, rule.scale * x, **close)
                continue
            away = (x[:, None] - levels).abs()
            if rule.projection == "softmax":
                chosen = value.argmax(0)
            else:  # of two levels that are as near but for rounding, either
                chosen = (got[:, None] / rule.scale - levels).abs().argmin(1)
                assert (away.gather(1, chosen[:, None])[:, 0] <= away.amin(1) + 2 * bound).all()
            expected = (levels[chosen] * rule.scale).to(dtype).double()
            # Triton's interpreter cuts a bfloat16 off where a GPU rounds it.
            cut = backend == "triton" and dtype is torch.bfloat16 and got.device.type == "cpu"
            exactly = dict(rtol=torch.finfo(dtype).eps if cut else 0, atol=0)
            torch.testing.assert_close(got, expected, **exactly, msg=label(rule))
