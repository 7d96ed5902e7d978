"""Later passes, with short ways of hooks or none, have the scores of the first, with long ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.statistics.hooks import steady
from tests.helpers.squeezed import (
    WAYS,
    Squeezed,
    images,
    in_the_other_mode,
    loss,
    part_by_part,
    plain,
)

WARM = 4  # updates after which the gradients of gates are no longer looked at for noise


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
    assert not hooked(model)


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
