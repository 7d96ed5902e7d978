"""A statistic of the user's own: registered once, known to Importance, Pruner and the study."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from taylor_kernels import statistics
from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics.base import READS
from taylor_kernels.studies.oracle.scores import score
from tests.helpers.problems import small_problem

pytestmark = pytest.mark.usefixtures("one_thread")


def norms(layer):
    return layer.weight.detach().flatten(1).norm(dim=1)


class Own(tk.Statistic):
    """Of each filter its norm, times what was read: every kind of `reads` in a few lines."""

    columns = "1: a number"

    def __init__(self, model, layers, backend=None):
        super().__init__(model, layers, backend)
        self.seen = dict.fromkeys(layers, 0)
        self.handles = [
            layer.register_forward_hook(lambda _, __, y, name=name: self.look(name, y))
            for name, layer in layers.items()
        ]

    def look(self, name, output):
        if self.reads == "forward":
            self.seen[name] += 1
        elif self.reads == "activations" and output.requires_grad:
            output.register_hook(lambda dy: self.seen.__setitem__(name, 1 + self.seen[name]))

    def collect(self, *, loss_scale=1.0, closure=None):
        factors = self.seen
        if self.reads == "weights":
            factors = dict.fromkeys(self.layers, 1)
        elif self.reads == "weight gradients":
            factors = {name: int(m.weight.grad is not None) for name, m in self.layers.items()}
        elif self.reads == "closure":
            weights = [layer.weight for layer in self.layers.values()]
            with torch.enable_grad():
                grads = torch.autograd.grad(closure(), weights)
            factors = {n: int(g.isfinite().all()) for n, g in zip(self.layers, grads, strict=True)}
        self.seen = dict.fromkeys(self.layers, 0)
        return [factors[name] * norms(layer)[:, None] for name, layer in self.layers.items()]

    def close(self):
        for handle in self.handles:
            handle.remove()


def registered(reads: str) -> str:
    """The name of a criterion over a statistic that reads that."""
    name = f"own_{reads.replace(' ', '_')}"
    tk.register_statistic(type("Own", (Own,), {"name": name, "reads": reads}))
    tk.register_criterion(tk.Criterion(name, name, lambda table: table[:, 0]))
    return name


def minibatch(model, meter):
    x = torch.randn(4, 3, 6, 6)
    read = meter.update if isinstance(meter, tk.Importance) else meter.step
    if meter.needs_closure:
        return read(closure=lambda: model(x).square().mean())
    model(x).square().mean().backward()
    return read()


@pytest.mark.parametrize("reads", READS)
def test_importance_pruner_and_study_know_it(reads):
    name = registered(reads)
    assert name in tk.statistic_names()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    expected = norms(model[0])

    imp = tk.Importance(model, name)
    assert imp.needs_closure == (reads == "closure")
    minibatch(model, imp)
    assert torch.equal(imp.compute()["0"], expected)
    imp.close()

    pruned = copy.deepcopy(model)
    pruner = tk.Pruner(pruned, torch.randn(2, 3, 6, 6), name, filters=0.5, every=1, per_step=4)
    minibatch(pruned, pruner)
    pruner.close()
    assert pruner.history[0].removed == {"0": tuple(expected.argsort()[:4].sort().values.tolist())}

    problem = small_problem()
    expected = torch.cat([norms(layer) for layer in problem.scored.values()])
    assert torch.equal(torch.from_numpy(score(problem, name)).float(), expected)


def test_frozen_layers_are_left_out_of_what_reads_weight_gradients():
    name = registered("weight gradients")
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="1 layers with frozen weights are left out: 0"):
        imp = tk.Importance(model, name)
    model(torch.randn(2, 3)).sum().backward()
    imp.update()
    assert imp.compute().keys() == {"2"}


def test_what_says_nothing_of_filters_together_is_not_pruned_by():
    tk.register_statistic(
        type("Alone", (Own,), {"name": "alone", "reads": "weights", "prunable": False})
    )
    criterion = tk.Criterion("alone", "alone", lambda table: table[:, 0])
    with pytest.raises(ValueError, match="criterion: 'alone' says nothing of filters"):
        tk.Pruner(nn.Linear(3, 3), torch.randn(2, 3), criterion, params=0.5)


def test_an_observation_may_be_an_example():
    class Examples(Own):
        name, reads, per_example = "examples_of_test", "weights", True

        def collect(self, *, loss_scale=1.0, closure=None):
            return [torch.tensor([[1.0, 3.0]] * len(m.weight)) for m in self.layers.values()]

    tk.register_statistic(Examples)
    imp = tk.Importance(
        nn.Linear(3, 2), tk.Criterion("squares", "examples_of_test", torch.Tensor.square)
    )
    imp.update()
    assert imp.compute()[""].tolist() == [5.0, 5.0]
    assert imp.standard_error()[""].tolist() == [4.0, 4.0]


def test_nan_is_explained_by_the_statistic():
    class Missing(Own):
        name, reads, nan_means = "missing_of_test", "weights", "water the layers first"

        def collect(self, *, loss_scale=1.0, closure=None):
            return [torch.full((len(m.weight), 1), torch.nan) for m in self.layers.values()]

    tk.register_statistic(Missing)
    criterion = tk.Criterion("missing", "missing_of_test", lambda table: table[:, 0])
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    pruner = tk.Pruner(model, torch.randn(2, 3), criterion, filters=0.5, every=1)
    with pytest.raises(RuntimeError, match=r"0: 4 of 4 units.*; water the layers first"):
        pruner.step()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (lambda one, two: None, "gave NoneType; expected a list of tables"),
        (lambda one, two: (table for table in (one, two)), "gave generator; expected a list"),
        (lambda one, two: [one], "gave 1 tables for 2 layers; expected one for each of 0, 1"),
        (lambda one, two: [one, None], r"gave NoneType for layer '1'; expected .*\[2 filters, col"),
        (lambda one, two: [one, one], r".*of shape \(4, 1\), for layer '1'; .*\[2 filters"),
        (lambda one, two: [one[:, 0], two], r".*of shape \(4,\), for layer '0'"),
        (lambda one, two: [one[0, 0], two], r".*of shape \(\), for layer '0'"),
        (lambda one, two: [one.long(), two], r".*of torch.int64, of shape \(4, 1\), for layer '0'"),
    ],
)
def test_tables_that_are_none_of_its_layers(tables, message):
    class Wrong(Own):
        name, reads = "wrong_of_test", "weights"

        def collect(self, *, loss_scale=1.0, closure=None):
            return tables(*(norms(layer)[:, None] for layer in self.layers.values()))

    tk.register_statistic(Wrong)
    criterion = tk.Criterion("wrong", "wrong_of_test", lambda table: table[:, 0])
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    message = r"statistic 'wrong_of_test': collect\(\) " + message
    with pytest.raises(ValueError, match=message):
        tk.Importance(model, criterion).update()
    statistic = Wrong(model, dict(model.named_children()))
    with pytest.raises(ValueError, match=message):
        statistics.checked_tables(statistic, statistic.collect())


def test_pruning_names_a_wrong_table():
    class Short(Own):
        name, reads = "short_of_test", "weights"

        def collect(self, *, loss_scale=1.0, closure=None):
            return [norms(layer)[1:, None] for layer in self.layers.values()]

    tk.register_statistic(Short)
    criterion = tk.Criterion("short", "short_of_test", lambda table: table[:, 0])
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    pruner = tk.Pruner(model, torch.randn(2, 3), criterion, filters=0.5)
    with pytest.raises(ValueError, match=r"'short_of_test': .* of shape \(3, 1\), for layer '0'"):
        pruner.step()


def test_a_graph_that_tables_carry_is_not_kept():
    class Attached(Own):
        name, reads = "attached_of_test", "weights"

        def collect(self, *, loss_scale=1.0, closure=None):
            return [layer.weight.sum(1, keepdim=True) for layer in self.layers.values()]

    tk.register_statistic(Attached)
    imp = tk.Importance(
        nn.Linear(3, 2), tk.Criterion("attached", "attached_of_test", lambda table: table[:, 0])
    )
    imp.update()
    assert not imp.compute()[""].requires_grad


@pytest.mark.parametrize(
    ("statistic", "error", "message"),
    [
        (3, TypeError, "statistic: expected a subclass of tk.Statistic, got 3"),
        (nn.Linear, TypeError, "statistic: expected a subclass"),
        (type("Empty", (tk.Statistic,), {"name": "x"}), TypeError, r"Empty has no collect\(\)"),
        (type("Nameless", (Own,), {"reads": "weights"}), ValueError, "Nameless has no name"),
        (type("Taken", (Own,), {"name": "gates", "reads": "weights"}), ValueError, "'gates' is"),
        (type("Odd", (Own,), {"name": "x", "reads": "tea"}), ValueError, "Odd reads is 'tea'; set"),
        (type("Mute", (Own,), {"name": "x"}), ValueError, "Mute reads is None"),
        (
            type("Bare", (Own,), {"name": "x", "reads": "weights", "columns": None}), ValueError,
            "Bare does not say what its columns are",
        ),
    ],
)  # fmt: skip
def test_what_is_no_statistic(statistic, error, message):
    before = tk.statistic_names()
    with pytest.raises(error, match=message):
        tk.register_statistic(statistic)
    assert tk.statistic_names() == before


def test_the_packages_docstring_holds_the_table_of_its_statistics():
    table = [line for line in statistics.__doc__.splitlines() if line.startswith("| ")]
    names = [row.split(" | ")[0].removeprefix("| ").strip("`") for row in table[2:]]
    assert names == tk.statistic_names()
    documented = {criterion.statistic for criterion in map(get_criterion, tk.criterion_names())}
    assert documented == set(tk.statistic_names())


def test_every_criterion_says_its_formula_and_its_source():
    for criterion in map(get_criterion, tk.criterion_names()):
        assert criterion.formula, criterion.name
        assert criterion.reference, criterion.name
        assert criterion.needs, criterion.name
