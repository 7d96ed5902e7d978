"""Later passes, with short ways of hooks or none, have the scores of the first, with long ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk
from taylor_kernels.statistics.hooks import steady

WARM = 4  # updates after which the gradients of gates are no longer looked at for noise


class Squeezed(nn.Module):
    """Convolutions in front of norms, and small ones of a squeezed image without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.of_stem = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.body, self.of_body = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)
        self.saves = self.twice = False

    def first(self, x: Tensor) -> Tensor:
        return self.of_stem(self.stem(x)).relu()

    def second(self, x: Tensor) -> Tensor:
        x = self.of_body(self.body(x)).sigmoid()
        gate = nn.functional.leaky_relu_(self.down(x.mean((2, 3), keepdim=True)))
        return self.head((x * self.up(gate).sigmoid()).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.first(x * 2) if self.twice else self.first(x)
        return checkpoint(self.second, x, use_reentrant=False) if self.saves else self.second(x)


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


def loss(y: Tensor) -> Tensor:
    return y.square().sum()


def plain(model: Squeezed) -> None:
    loss(model(images())).backward()


def two_passes_before_one_backward(model: Squeezed) -> None:
    (loss(model(images())) + loss(model(images(3)))).backward()


def two_backwards(model: Squeezed) -> None:
    for count in (4, 6):
        loss(model(images(count))).backward()


def two_backwards_over_one_graph(model: Squeezed) -> None:
    y = model(images())
    y[0].sum().backward(retain_graph=True)
    loss(y).backward()


def clipped(model: Squeezed) -> None:
    loss(model(images())).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(0.1)


def onto_gradients_that_there_are(model: Squeezed) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    loss(model(images())).backward()
    model.zero_grad(set_to_none=False)


def with_a_graph_of_gradients(model: Squeezed) -> None:
    loss(model(images())).backward(create_graph=True)


def in_checkpoints(model: Squeezed) -> None:
    model.saves = True
    loss(model(images())).backward()
    model.saves = False


def beside_passes_that_count_nothing(model: Squeezed) -> None:
    model(images())
    with torch.no_grad():
        model(images())
    loss(model(images())).backward()
    model(images())


def part_by_part(model: Squeezed) -> None:
    for _ in range(2):
        loss(model.second(model.first(images()))).backward()


def a_norm_twice_in_a_pass(model: Squeezed) -> None:
    model.twice = True
    loss(model(images())).backward()
    model.twice = False


def other_parameters(model: Squeezed) -> None:
    """Put there as `load_state_dict(assign=True)` does."""
    model.of_stem.weight = nn.Parameter(torch.rand_like(model.of_stem.weight))
    loss(model(images())).backward()


def parameters_of_one_call(model: Squeezed) -> None:
    others = {"of_stem.weight": torch.rand(6).double().requires_grad_()}
    loss(torch.func.functional_call(model, others, images())).backward()


def lent_parameters(model: Squeezed) -> None:
    """For one call, of the kind that a model has; beside a pass with its own."""
    lent = {name: nn.Parameter(own.detach().clone()) for name, own in model.named_parameters()}
    loss(torch.func.functional_call(model, lent, images())).backward()
    loss(model(images())).backward()


def only_lent_parameters(model: Squeezed) -> None:
    lent = {f"of_body.{leaf}": nn.Parameter(torch.rand(8).double()) for leaf in ("weight", "bias")}
    for _ in range(2):
        loss(torch.func.functional_call(model, lent, images())).backward()


def a_frozen_scale(model: Squeezed) -> None:
    model.of_body.weight.requires_grad_(False)
    loss(model(images())).backward()
    model.of_body.weight.requires_grad_(True)


def inside_scoring(model: Squeezed) -> None:
    with tk.scoring(model):
        loss(model(images())).backward()


def in_the_other_mode(model: Squeezed) -> None:
    model.train(not model.training)
    loss(model(images())).backward()


def large_outputs(model: Squeezed) -> None:
    loss(model(images(60))).backward()


WAYS = (
    plain, two_passes_before_one_backward, two_backwards, two_backwards_over_one_graph, clipped,
    onto_gradients_that_there_are, with_a_graph_of_gradients, in_checkpoints,
    beside_passes_that_count_nothing, part_by_part, a_norm_twice_in_a_pass, other_parameters,
    parameters_of_one_call, lent_parameters, only_lent_parameters, a_frozen_scale, inside_scoring,
    in_the_other_mode, large_outputs,
)  # fmt: skip


def scores(
    model: nn.Module, warm: int, run: Callable[[Squeezed], None], seed: int
) -> list[dict[str, Tensor]]:
    """Scores of what `run` does, after other passes, and of a plain pass after that."""
    model = copy.deepcopy(model)
    imp = tk.Importance(model, "taylor_fo_bn", example_inputs=images(1))
    for _ in range(warm):
        plain(model)
        imp.update()
    torch.manual_seed(seed)
    found = []
    for way in (run, plain):
        imp.reset()
        model.zero_grad()
        way(model)
        imp.update()
        found.append(imp.compute())
    imp.close()
    return found


@pytest.mark.parametrize("run", WAYS, ids=lambda run: run.__name__)
def test_later_passes_are_scored_as_first_ones(run, monkeypatch):
    monkeypatch.setattr(steady, "SMALL", 200)
    model = Squeezed().double().eval()
    seed = int(torch.randint(1 << 30, ()))
    first, late = scores(model, 0, run, seed), scores(model, WARM, run, seed)
    for expected, found in zip(first, late, strict=True):
        assert all(score.any() for score in found.values())
        for name, score in expected.items():
            torch.testing.assert_close(found[name], score, rtol=1e-5, atol=0)


def steady_meter() -> tuple[Squeezed, tk.Importance]:
    """A model and a meter whose first updates are over."""
    model = Squeezed().double().eval()
    imp = tk.Importance(model, "taylor_fo_bn", example_inputs=images(1))
    for _ in range(WARM):
        plain(model)
        imp.update()
    return model, imp


def test_lent_parameters_are_forgotten_and_those_of_a_part_cost_one_update():
    model, imp = steady_meter()
    before = sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())
    for count in range(8):
        imp.reset()
        own = model.of_stem.named_parameters()
        lent = {leaf: nn.Parameter(one.detach().clone()) for leaf, one in own}
        h = torch.func.functional_call(model.of_stem, lent, model.stem(images()))
        loss(model.second(h.relu())).backward()
        imp.update()
        if count:  # no hook was left to see the first
            assert imp.compute()["stem"].all()
        assert not any(parameter._backward_hooks for parameter in lent.values())
    plain(model)
    imp.update()
    after = sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())
    assert after == before


def hooked(model: Squeezed) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]


def test_later_passes_go_the_short_way(monkeypatch):
    taken = []
    model, imp = steady_meter()
    monkeypatch.setattr(
        "taylor_kernels.statistics.hooks.sites.SiteHooks._after",
        lambda self, key, *rest: taken.append(key),
    )
    plain(model)
    imp.update()
    assert not taken
    assert not {"of_stem", "of_body"}.intersection(hooked(model))


def test_hooks_come_back_where_the_mode_changes_and_go_with_the_meter():
    model, imp = steady_meter()
    in_the_other_mode(model)
    imp.update()
    assert {"of_stem", "of_body"} <= set(hooked(model))
    for _ in range(WARM):
        plain(model)
        imp.update()
    in_the_other_mode(model)
    imp.close()
    assert not hooked(model)


def test_a_norm_with_another_hook_keeps_its_own_in_front_of_it():
    model = Squeezed().double().eval()
    model.of_stem.register_forward_hook(lambda _, __, output: None)
    imp = tk.Importance(model, "taylor_fo_bn", example_inputs=images(1))
    for _ in range(WARM):
        plain(model)
        imp.update()
    assert "of_body" not in hooked(model)
    assert len(model.of_stem._forward_hooks) == 2


def test_two_meters_of_one_model_need_no_hooks_and_agree():
    model, imp = steady_meter()
    other = tk.Importance(model, "taylor_fo_bn", example_inputs=images(1))
    for _ in range(WARM):
        other.reset()
        imp.reset()
        plain(model)
        imp.update()
        other.update()
    assert not {"of_stem", "of_body"}.intersection(hooked(model))
    for name, score in other.compute().items():
        assert torch.equal(imp.compute()[name], score)


def test_parameters_replaced_where_no_call_of_the_model_shows_it_are_an_error():
    model, imp = steady_meter()
    model.of_stem.weight = nn.Parameter(torch.rand_like(model.of_stem.weight))
    part_by_part(model)
    with pytest.raises(RuntimeError, match="of_stem: other parameters were put into"):
        imp.update()
    imp.reset()
    seed = int(torch.randint(1 << 30, ()))
    torch.manual_seed(seed)
    part_by_part(model)
    imp.update()
    for name, score in scores(model, 0, part_by_part, seed)[0].items():
        torch.testing.assert_close(imp.compute()[name], score, rtol=1e-5, atol=0)
