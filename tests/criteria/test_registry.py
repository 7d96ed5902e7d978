"""Criteria of one's own, and the names that criteria are asked for by."""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from tests.helpers import nets


def test_a_criterion_of_the_users_own():
    criterion = tk.Criterion("grad_norm_of_test", "moments", lambda t: t[:, tk.MOMENTS.index("g2")])
    tk.register_criterion(criterion)
    assert criterion.name in tk.criterion_names()
    with pytest.raises(ValueError, match="is registered already"):
        tk.register_criterion(criterion)
    model, data = nets.mixed(), nets.batch()
    importance = tk.Importance(model, "grad_norm_of_test")
    nets.backward(model, data)
    importance.update()
    scores = importance.compute()
    torch.testing.assert_close(
        scores["fc"].double(), model.fc.weight.grad.square().sum(1), rtol=1e-5, atol=0
    )
    with pytest.raises(ValueError, match="statistic: 'hessian' is not one of"):
        tk.Criterion("x", "hessian", lambda t: t)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"name": ""}, ValueError, "name: is empty; give the criterion one"),
        ({"name": 3}, TypeError, "name: expected a string, got int"),
        ({"statistic": ["moments"]}, TypeError, "statistic: expected a string, got list"),
        ({"formula": None}, TypeError, "formula: expected a string, got NoneType"),
        ({"reference": 3}, TypeError, "reference: expected a string, got int"),
        ({"score": 3}, TypeError, "score: expected a function, got int"),
        ({"coupled": "max"}, ValueError, "coupled: 'max' is not one of sum, mean, first"),
        ({"across_layers": "no"}, TypeError, "across_layers: expected True or False, got 'no'"),
    ],
)
def test_what_a_criterion_is_made_of_is_checked(wrong, error, message):
    right = {"name": "right", "statistic": "moments", "score": lambda table: table[:, 0]}
    with pytest.raises(error, match=message):
        tk.Criterion(**(right | wrong))


def test_only_a_criterion_can_be_registered():
    before = tk.criterion_names()
    with pytest.raises(TypeError, match=r"expected a tk.Criterion, got str; make one of a name"):
        tk.register_criterion("x")
    assert tk.criterion_names() == before


def test_scores_that_are_no_tensor():
    imp = tk.Importance(nn.Linear(3, 2), tk.Criterion("none", "magnitudes", lambda table: None))
    with pytest.raises(ValueError, match="criterion 'none': its score function gave NoneType"):
        imp.update()


def test_an_unknown_criterion_names_the_nearest():
    with pytest.raises(ValueError, match=r"'taylor_bn' is not known; did you mean.*'taylor_fo_bn'"):
        tk.Importance(nets.mixed(), "taylor_bn")


def test_a_criterion_in_other_letters_or_by_a_word_is_found():
    names = tk.criterion_names()
    for name in names:
        other = name.upper().replace("_", random.choice("-_ "))
        word = random.choice(name.split("_"))
        having = [known for known in names if word in known.split("_")][:3]
        for given, meant in ((other, [name]), (word, [word] if word in names else having)):
            if given not in names:
                with pytest.raises(ValueError, match="is not known; did you mean") as got:
                    tk.Importance(nn.Linear(2, 2), given)
                assert re.findall(r"'(\w+)'", str(got.value).split("did you")[1]) == meant
