"""Scores as a comparison takes them: those of tk.Importance, with no trace left on the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("scipy", reason="compare needs SciPy")

import taylor_kernels as tk
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.oracle.measure import identity
from taylor_kernels.studies.oracle.problem import inner_layers, loss_and_accuracy
from taylor_kernels.studies.oracle.scores import (
    DRAWS,
    PLAIN,
    CannotScore,
    score,
    scores_of,
    timings,
)
from taylor_kernels.studies.own.judge import is_classifier
from tests.helpers.problems import Counted, other_loss, quiet, small_problem

pytestmark = pytest.mark.usefixtures("one_thread")
CRITERIA = [name for name in tk.criterion_names() if name not in ("oracle", "random")]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_those_of_importance_over_the_minibatches(criterion):
    problem = small_problem()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    got = score(problem, criterion)

    imp = tk.Importance(problem.model, criterion, layers=problem.layers)
    for batch in problem.batches:
        problem.model.zero_grad()
        if imp.needs_closure:
            imp.update(closure=lambda batch=batch: problem.loss_of(batch))
        else:
            problem.loss_of(batch).backward()
            imp.update()
    expected = torch.cat(list(imp.compute().values())).double().numpy()
    imp.close()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7 * np.nanmax(np.abs(expected)))

    model = problem.model
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    problem.model.zero_grad()
    score(problem, criterion)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.training


def test_scores_are_kept_and_not_computed_twice(tmp_path):
    loss = Counted()
    problem = other_loss(small_problem(), loss)
    args = (identity(problem), Cache(tmp_path), quiet())
    first = scores_of(problem, "taylor_fo_bn", *args)
    assert loss.calls == len(problem.batches)
    again = scores_of(problem, "taylor_fo_bn", *args)
    assert loss.calls == len(problem.batches)
    assert np.array_equal(first, again)
    scores_of(problem, "taylor_fo", *args)
    assert loss.calls == 2 * len(problem.batches)


def test_random_is_many_draws_that_differ_between_networks():
    problem = small_problem()
    draws = scores_of(problem, "random", {}, None, quiet())
    assert draws.shape == (DRAWS, len(problem.filters))
    assert np.array_equal(draws, scores_of(problem, "random", {}, None, quiet()))
    assert np.array_equal(score(problem, "random"), draws[0])
    other = small_problem()
    object.__setattr__(other, "name", "other")
    assert not np.array_equal(draws, scores_of(other, "random", {}, None, quiet()))


def test_a_criterion_that_does_not_apply_says_why():
    problem = small_problem()
    problem.model[1] = nn.Identity()
    with pytest.raises(CannotScore, match="bn_scale: no BatchNorm"):
        score(problem, "bn_scale")
    assert not any(m._forward_hooks for m in problem.model.modules())


def test_timings_have_everyone_and_the_plain_step_is_one():
    problem = small_problem()
    names = ["taylor_fo_bn", "taylor_so_diag", "magnitude_l2", "random"]
    found = timings(problem, names, quiet(), rounds=2, seconds=60)
    assert list(found) == [PLAIN, *names]
    assert found[PLAIN]["ratio"] == 1
    assert all(one["ms"] > 0 and set(one) == {"ms", "ratio"} for one in found.values())
    assert timings(problem, names[:1], quiet(), rounds=99, seconds=-1)[PLAIN]["ms"] > 0


class Branches(nn.Module):
    """Two outputs' worth of layers: one behind a softmax, one added up with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        y = F.relu(self.body(x)) + x
        return {"mask": self.last(y) + x, "classes": self.head(y.mean((2, 3))).log_softmax(1)}


def test_layers_that_make_the_outputs_are_left_out():
    model = Branches().eval()
    layers, left_out = inner_layers(model, torch.randn(2, 1, 5, 5))
    # What the skip adds to the output is the stem's own: its filters are outputs too.
    assert layers == ("body",)
    assert set(left_out) == {"stem", "last", "head", "unused"}
    assert "not called" in left_out["unused"]
    assert "outputs" in left_out["head"]
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert inner_layers(model, torch.randn(2, 1, 5, 5)) == (layers, left_out)


def test_examples_count_alike_in_batches_of_different_sizes():
    model, inputs = nn.Linear(3, 4), torch.randn(11, 3)
    targets = torch.randint(0, 4, (11,))
    batches = list(zip(inputs.split([7, 3, 1]), targets.split([7, 3, 1]), strict=True))
    found = loss_and_accuracy(model, batches, F.cross_entropy, classifies=True)
    with torch.no_grad():
        outputs = model(inputs)
    assert found["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-6)
    assert found["accuracy"] == int((outputs.argmax(1) == targets).sum()) / 11


@pytest.mark.parametrize(
    ("outputs", "targets", "expected"),
    [
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), True),
        (torch.zeros(4, 3, 5, 5), torch.zeros(4, 5, 5, dtype=torch.int64), True),
        (torch.zeros(4, 3), torch.zeros(4, 3), False),
        (torch.zeros(4, 3), torch.zeros(4), False),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), False),
        ({"out": torch.zeros(4, 3)}, torch.zeros(4, dtype=torch.int64), False),
    ],
)
def test_what_is_a_classifier(outputs, targets, expected):
    assert is_classifier(outputs, targets) == expected
