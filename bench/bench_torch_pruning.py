"""Torch-Pruning's importances over all groups of a network: its own, and the drop-in classes.

    taylor     ResNet-50, gradients in place: the scores of all groups, nothing kept from before
    hessian    ResNet-18, 32 images of 32²: backward passes and scores; its own: the documented loop
    obdc       a ConvNet, 32 images of 32²: step() and scores; forward and backward in both, and
               alone beside them, since they are most of it

Every provider has a model of its own, in eval mode. Answers are held against float64, in the
distance of all scores over their norm; Torch-Pruning's own where its faults do not matter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.harness import Provider
from bench.models import ConvNet, resnet18, resnet50

tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
from torch_pruning.pruner import importance as own  # noqa: E402

from taylor_kernels.integrations import torch_pruning as door  # noqa: E402

BATCH = 32
THEIRS, STRICT, OURS = "Torch-Pruning", "ours, strict_compat", "ours"
#: Of OBDC: the calls that Torch-Pruning has, and what the passes take that all of them need.
LOOP, PASSES = "ours, after backward()", "forward and backward alone"
ROUNDS = {"taylor": 11, "hessian": 3, "obdc": 7}
#: Distance of all scores from float64 over their norm, at most.
TOLERANCE = 1e-4


class Problem:
    """A model with its groups, and an importance that scores them."""

    def __init__(self, model: nn.Module, importance: Any, example: Tensor) -> None:
        self.model, self.importance = model, importance
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        self.pruner = tp.pruner.BasePruner(model, example, importance, ignored_layers=[head])
        self.groups = list(self.pruner.DG.get_all_groups(ignored_layers=[head]))

    def scores(self) -> list[Tensor]:
        return [self.importance(group) for group in self.groups]


def _check_against(want: list[Tensor]) -> Callable[[list[Tensor]], float]:
    def check(found: list[Tensor]) -> float:
        got, expected = torch.cat(found).double().cpu(), torch.cat(want).double()
        distance = float((got - expected).norm() / expected.norm())
        assert distance <= TOLERANCE, f"off by {distance:.1e} of the norm"
        return distance

    return check


def _table_sums(
    problem: Problem, terms: dict[nn.Parameter, Tensor], kinds: tuple[type, ...], columns: bool
) -> list[Tensor]:
    """Scores in float64: the mean over a group's parameters, over the mean of the group."""
    found = []
    for group in problem.groups:
        total, count = torch.zeros(len(group[0].idxs), dtype=torch.float64), 0
        for item in group:
            layer, into = item.dep.target.module, "in_" in item.dep.handler.__name__
            if not isinstance(layer, kinds) or (into and not columns):
                continue
            for name in ("weight",) if into or layer.bias is None else ("weight", "bias"):
                table = terms.get(getattr(layer, name))
                if table is None:
                    continue
                table = table.transpose(0, 1) if into else table
                values = table.reshape(table.size(0), -1).sum(1)[torch.tensor(item.idxs)]
                total.index_add_(0, torch.tensor(item.root_idxs), values)
                count += 1
        found.append(total / count / (total / count).mean())
    return found


LAYERS = (nn.Conv2d, nn.Linear)
ALL = (*LAYERS, nn.BatchNorm2d)


def taylor(device: torch.device) -> list[Provider]:
    torch.manual_seed(0)
    original, example = resnet50().to(device), torch.randn(1, 3, 64, 64, device=device)
    gradients = [torch.randn_like(p) * 0.001 for p in original.parameters()]
    every = []
    for label, importance, kinds in (
        (THEIRS, own.GroupTaylorImportance(), LAYERS),
        (STRICT, door.GroupTaylorImportance(strict_compat=True), LAYERS),
        (OURS, door.GroupTaylorImportance(), ALL),
    ):
        problem = Problem(copy.deepcopy(original), importance, example)
        terms = {}
        for parameter, gradient in zip(problem.model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
            terms[parameter] = (parameter.detach().double() * gradient.double()).abs().cpu()
        if kinds is LAYERS:  # without biases
            terms = {p: t for p, t in terms.items() if t.dim() > 1}
        want = _table_sums(problem, terms, kinds, columns=True)

        def forget(model: nn.Module = problem.model) -> None:
            next(model.parameters()).grad.mul_(1)  # counts as a change: no table is kept

        every.append(_provider(label, problem.scores, want, forget))
    return every


def hessian(device: torch.device) -> list[Provider]:
    original, x, y = _batch(resnet18(), device)
    every = []
    for label, importance in (
        (THEIRS, _EveryExample()),
        (OURS, door.GroupHessianImportance(bias=False)),
    ):
        problem = Problem(copy.deepcopy(original), importance, x[:1])
        model = problem.model
        want = _table_sums(problem, _squares(model, x, y), ALL, columns=True)

        def loop(problem: Problem = problem, model: nn.Module = model) -> list[Tensor]:
            problem.importance.zero_grad()
            for loss in cross_entropy(model(x), y, reduction="none"):
                model.zero_grad()
                loss.backward(retain_graph=True)
                problem.importance.accumulate_grad(model)
            return problem.scores()

        def one_pass(problem: Problem = problem, model: nn.Module = model) -> list[Tensor]:
            problem.importance.zero_grad()
            problem.importance.accumulate(model, lambda: cross_entropy(model(x), y))
            return problem.scores()

        run, rounds = (loop, 2) if label == THEIRS else (one_pass, None)
        every.append(_provider(label, run, want, model.zero_grad, rounds))
    return every


class _EveryExample(own.GroupHessianImportance):
    """With the one mend without which its answer is that of the last example."""

    def accumulate_grad(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                square = parameter.grad.data.clone().pow(2)
                known = self._accu_grad.get(parameter)
                self._accu_grad[parameter] = square if known is None else known + square
                self._counter[parameter] = self._counter.get(parameter, 0) + 1


def obdc(device: torch.device) -> list[Provider]:
    model = ConvNet()
    for module in model.modules():
        if isinstance(module, LAYERS):
            module.bias = None  # its own raises where there is one
    original, x, y = _batch(model, device)
    alone = copy.deepcopy(original)
    every = [
        Provider(
            PASSES,
            lambda: cross_entropy(alone(x), y).backward(),
            role="floor",
            before=alone.zero_grad,
        )
    ]
    for label, importance in (
        (THEIRS, own.OBDCImportance(num_classes=10)),
        (LOOP, door.OBDCImportance(num_classes=10)),
        (OURS, door.OBDCImportance(num_classes=10)),
    ):
        problem = Problem(copy.deepcopy(original), importance, x[:1])
        model = problem.model
        want = _table_sums(problem, _squares(model, x, y), LAYERS, columns=False)
        if label == THEIRS:  # its own _prepare_model raises without attention
            for group in problem.groups:
                layer = group[0].dep.target.module
                importance.modules.append(layer)
                layer.register_forward_pre_hook(importance._save_input)
                layer.register_backward_hook(importance._save_grad_output)
        else:
            importance._prepare_model(model, problem.pruner)
        importance.eps = 0

        def loop(problem: Problem = problem, model: nn.Module = model) -> list[Tensor]:
            cross_entropy(model(x), y).backward()
            problem.importance.step()
            return problem.scores()

        def one_pass(problem: Problem = problem, model: nn.Module = model) -> list[Tensor]:
            problem.importance.step(lambda: cross_entropy(model(x), y))
            return problem.scores()

        def before(problem: Problem = problem, model: nn.Module = model) -> None:
            model.zero_grad()
            problem.importance.steps = 0
            if isinstance(problem.importance, door.OBDCImportance):
                problem.importance._meter.reset()

        every.append(_provider(label, one_pass if label == OURS else loop, want, before))
    return every


def _batch(model: nn.Module, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, device=device)
    return model.to(device).eval(), x, torch.randint(0, 10, (BATCH,), device=device)


def _squares(model: nn.Module, x: Tensor, y: Tensor) -> dict[nn.Parameter, Tensor]:
    """w²·mean g² of every weight, in float64, by one backward pass for each example."""
    wide = copy.deepcopy(model).double()
    pairs = list(zip(model.parameters(), wide.parameters(), strict=True))
    total = {p: torch.zeros_like(q) for p, q in pairs}
    for n in range(len(x)):
        wide.zero_grad()
        cross_entropy(wide(x[n : n + 1].double()), y[n : n + 1]).backward()
        for p, q in pairs:
            total[p] += q.grad.square()
    biases = {id(m.bias) for m in model.modules() if getattr(m, "bias", None) is not None}
    return {
        p: (total[p] / len(x) * q.detach().square()).cpu() for p, q in pairs if id(p) not in biases
    }


def _provider(
    label: str,
    run: Callable[[], list[Tensor]],
    want: list[Tensor],
    before: Callable[[], object],
    rounds: int | None = None,
) -> Provider:
    role = {THEIRS: "peer", STRICT: "extra", LOOP: "extra", OURS: "ours"}[label]
    return Provider(
        label, run, _check_against(want), role, "torch-pruning", before=before, rounds=rounds
    )


CASES = {"taylor": taylor, "hessian": hessian, "obdc": obdc}


@pytest.mark.quick(kind=["obdc"])
@pytest.mark.parametrize("provider", [THEIRS, STRICT, LOOP, PASSES, OURS])
@pytest.mark.parametrize("kind", list(CASES))
def bench_torch_pruning(kind, provider, device, measured, record, rounds) -> None:
    case = ("torch_pruning", kind)

    def providers() -> list[Provider]:
        # Of other weights one in many has a ReLU that float64 sees on the other side of zero.
        torch.manual_seed(0)
        return CASES[kind](device)

    results = measured.get(case, providers, rounds(ROUNDS[kind]))
    record(case, results, provider)
