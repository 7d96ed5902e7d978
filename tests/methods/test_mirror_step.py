"""mirror_step on the CPU: every rule on every backend against formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taylor_kernels.ops.mirror_step import MirrorRule, mirror_step
from tests.helpers import mirror
from tests.helpers.cases import DTYPES, lay_out, same_bits

RULES = mirror.RULES_OF_TESTS
BACKENDS = ("reference", "cpu")
SHAPES = [(1,), (3, 5), (7, 4, 3, 3), (1031,), (33, 517)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=mirror.label)
def test_a_step_is_that_of_float64(rule, backend):
    for dtype in (*DTYPES, torch.float64):
        each = [mirror.random_tensors(rule, shape, dtype) for shape in SHAPES]
        before = [tensors.copies() for tensors in each]
        mirror.run([rule] * len(each), each, backend)
        for old, new in zip(before, each, strict=True):
            mirror.check(rule, old, new)
            assert new.grad.equal(old.grad)


def test_every_instruction_set_steps_right(each_isa):
    for rule in RULES:
        for dtype in DTYPES:
            tensors = mirror.random_tensors(rule, (2, 77), dtype)
            before = tensors.copies()
            mirror.run([rule], [tensors], "cpu")
            mirror.check(rule, before, tensors)


@given(
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    shape=st.lists(st.integers(1, 12), max_size=4),
    beta=st.floats(0.1, 30),
    rate=st.floats(0, 2),
    scale=st.floats(0.01, 3),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_any_shape_and_numbers(rule, dtype, shape, beta, rate, scale, backend, seed):
    torch.manual_seed(seed)
    # Errors of a projection are those of its argument times β, of a mirror form's times β·rate.
    rule = rule._replace(beta=beta, next_beta=beta, rate=rate / beta)
    if rule.planes:
        rule = rule._replace(scale=scale)
    tensors = mirror.random_tensors(rule, shape, dtype)
    before = tensors.copies()
    mirror.run([rule], [tensors], backend)
    mirror.check(rule, before, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.planes], ids=mirror.label)
def test_without_a_gradient_the_value_is_projected_or_rounded(rule, backend):
    for dtype in (*DTYPES, torch.float64):
        tensors = mirror.random_tensors(rule, (9, 61), dtype)
        mirror.check_projections(rule, [tensors], backend)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "misaligned"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_change_nothing_but_the_order_of_what_is_stored(layout, backend):
    rule = MirrorRule("tanh", direction="adam", rate=0.1, decay=0.9, decay2=0.99, eps=1e-8)
    plain = mirror.random_tensors(rule, (6, 5, 3, 3), torch.float32)
    param = lay_out(plain.param, layout)
    grad = plain.grad.clone()
    turned = plain.copies()
    if layout == "channels_last":
        flat = [
            t.view(6, 5, 3, 3).permute(0, 2, 3, 1).reshape(1, -1)
            for t in (plain.value, plain.first, plain.second)
        ]
        turned = mirror.Tensors(param, grad, *flat)
    else:
        turned = turned._replace(param=param, grad=grad)
    mirror.run([rule], [plain], backend)
    mirror.run([rule], [turned], backend)
    assert same_bits(turned.param.contiguous(), plain.param)


def test_bits_do_not_depend_on_threads_or_the_list(keep_threads):
    each = [mirror.random_tensors(rule, (130, 311), torch.float32) for rule in RULES]
    copies = [[tensors.copies() for tensors in each] for _ in range(3)]
    torch.set_num_threads(1)
    mirror.run(RULES, copies[0])
    torch.set_num_threads(3)
    mirror.run(RULES[::-1], copies[1][::-1])
    for rule, tensors in zip(RULES, copies[2], strict=True):
        mirror.run([rule], [tensors])
    for one, two, three in zip(*copies, strict=True):
        for tensors in zip(one, two, three, strict=True):
            if tensors[0] is not None:
                assert same_bits(tensors[0], tensors[1])
                assert same_bits(tensors[0], tensors[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values_stay_finite_and_within_the_levels(backend):
    """β up to its greatest, x at ±1 exactly, directions that overflow exp."""
    extreme = torch.tensor([0.0, 1e-30, -1e-4, 1.0, -1.0, 88.0, -3e4, 1e30])
    for rule in RULES:
        if not rule.planes:
            continue
        for beta in (1.0, 1e4, 1e35):
            for size in (1e-3, 1.0, 1e3):
                if rule.update == "jacobian" and size * beta > 1e15:
                    continue  # its gradients overflow by themselves
                given = rule._replace(beta=beta, next_beta=beta, rate=0.1, scale=1.0)
                tensors = mirror.random_tensors(given, (8, 8), torch.float32)
                rows = extreme[:, None].expand(8, 8).reshape(-1)
                if rule.update != "mirror":
                    tensors.value.copy_(rows * torch.linspace(0.5, 1, rule.planes)[:, None])
                elif rule.projection == "softmax":
                    tensors.value.copy_((rows * torch.arange(rule.planes)[:, None]).softmax(0))
                else:
                    tensors.value.copy_(rows.clamp(-1, 1))
                grad = tensors.grad.mul_(size)
                for _ in range(3):
                    mirror.run([given], [tensors._replace(grad=grad)], backend)
                    assert tensors.param.abs().max() <= 1, (mirror.label(given), beta, size)


def test_the_op_passes_torch_opcheck():
    rule = MirrorRule("softmax", 2, "dual", "adam", rate=0.1, decay=0.9, decay2=0.9, eps=0.1)
    tensors = mirror.random_tensors(rule, (3, 4), torch.float32)
    codes, numbers = [2, 2, 0, 2, 0], list(rule[5:])
    arguments = [[each.nan_to_num()] for each in tensors]
    op = torch.ops.taylor_kernels.mirror_step.default
    torch.library.opcheck(op, (*arguments, codes, numbers, None))


def test_what_is_written_counts_as_changed():
    rule = MirrorRule("tanh", rate=0.1)
    w = torch.randn(4, requires_grad=True)
    loss = (w * w).sum()
    value = torch.zeros(1, 4)
    mirror_step([w], [torch.ones(4)], [value], [None], [None], [rule])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


RULE = MirrorRule("tanh", direction="adam")
T = torch.zeros(3, 4)
P = torch.zeros(1, 12)
BAD = {
    "param": (dict(params=[None]), TypeError, r"params\[0\]: expected a torch.Tensor"),
    "integer": (dict(params=[T.int()]), TypeError, r"params\[0\]: dtype torch.int32"),
    "grad_shape": (dict(grads=[torch.zeros(4, 3)]), ValueError, r"grads\[0\]: shape \(4, 3\)"),
    "grad_dtype": (dict(grads=[T.double()]), ValueError, r"grads\[0\]: dtype torch.float64"),
    "value": (dict(values=[None]), ValueError, r"values\[0\]: expected a contiguous \(1, 12\)"),
    "value_dtype": (dict(values=[P.half()]), ValueError, r"values\[0\]: expected .*float32"),
    "planes": (dict(values=[torch.zeros(2, 12)]), ValueError, r"got \(2, 12\)"),
    "moment": (dict(second=[None]), ValueError, r"second\[0\]: expected a contiguous \(1, 12\)"),
    "rule": (
        dict(rules=[RULE._replace(levels=3, update="mirror")]),
        ValueError,
        r"rules\[0\]: there is no",
    ),
    "levels": (dict(rules=[RULE._replace(levels=4)]), ValueError, r"rules\[0\]: there is no"),
    "no_grad": (
        dict(rules=[MirrorRule()], grads=[None], values=[None]),
        ValueError,
        r"grads\[0\]: none for a parameter that has no stored value",
    ),
    "backend": (dict(backend="cuda"), ValueError, "does not run on cpu"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_clear_error_and_changes_nothing(bad):
    changed, error, message = BAD[bad]
    good = dict(params=[T], grads=[T], values=[P], first=[P.clone()], second=[P.clone()])
    with pytest.raises(error, match=message):
        mirror_step(**{**good, "rules": [RULE], **changed})
    assert not T.any()
