"""A proof finds what goes wrong in front of code that hides it from the outputs of a model."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taylor_kernels as tk
from taylor_kernels.pruning.proof.examples import repeated
from taylor_kernels.pruning.proof.noise import Noise
from taylor_kernels.pruning.proof.same_outputs import Ran, difference
from taylor_kernels.pruning.proof.steady_noise import SteadyNoise
from tests.tracing.pieces import Apply

#: Makes nothing of numbers that show which channels there were.
HIDING: dict[str, Callable[[Tensor], Tensor]] = {
    "minus infinity": lambda y: y.masked_fill(torch.arange(y.size(1)) < 2, -torch.inf),
    "the least number": lambda y: y.masked_fill(
        torch.arange(y.size(1)) % 3 == 0, torch.finfo(y.dtype).min
    ),
    "a bias of a billion": lambda y: y - 1e9 * (torch.arange(y.size(1)) < 3),
    "the greatest": lambda y: y.argmax(1),
    "a threshold": lambda y: y > y.mean(),
    "a dead ReLU": lambda y: (y - 1e7).relu(),
    "a full sigmoid": lambda y: (y + 1e4).sigmoid(),
    "a cold softmax": lambda y: (1e7 * y).softmax(1),
    "nan": lambda y: (-y.square() - 1).sqrt(),
    "a greater number beside": lambda y: torch.cat([y, torch.full_like(y, 1e14)], 1),
    "next to nothing": lambda y: 1 + 1e-10 * y,
}
#: Follow the width where no trace sees it.
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "how many": lambda h: h * (1 + h.size(1)),
    "places": lambda h: h * torch.tensor([1.0 + i for i in range(h.size(1))]).to(h),
    "places from behind": lambda h: h * torch.tensor([*range(h.size(1), 0, -1)]).to(h),
}
#: Code between two layers that turns some numbers into nan, while those that a model has are fine.
DELICATE: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "a root of a parameter": lambda s, h, x: h * s.small.sqrt(),
    "its logarithm": lambda s, h, x: h + s.small.log(),
    "a logarithm of the input": lambda s, h, x: h + x.log().mean(),
    "an arcsine": lambda s, h, x: h * (1 - 1e-3 * s.small).asin(),
    "Gumbel's noise": lambda s, h, x: h - (-torch.rand_like(h).log()).log(),
}


class Delicate(nn.Module):
    def __init__(self, width: int, middle: Callable, wrong: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(4, width),
            nn.Linear(width, 5),
            nn.Linear(5, 3),
        )
        self.small = nn.Parameter(torch.rand(1) * 1e-3)
        self.middle, self.wrong = middle, wrong

    def forward(self, x: Tensor) -> Tensor:
        h = self.wrong(self.middle(self, self.first(x), x))
        return self.head(self.second(h).relu())


def offered(model: nn.Module, x: Tensor, **options) -> set[str]:
    return {*tk.Pruner(model, x, "magnitude_l2", filters=0.8, **options).widths}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("hiding", HIDING)
def test_what_comes_behind_hides_no_fault(hiding, wrong):
    width = random.randint(7, 14)
    torch.manual_seed(random.randrange(2**31))
    for code, layers in ((WRONG[wrong], {"2"}), (torch.tanh, {"0", "2"})):
        model = nn.Sequential(
            nn.Linear(5, width), Apply(lambda s, x, code=code: code(x)), nn.Linear(width, 8),
            nn.ReLU(), nn.Linear(8, 6), Apply(lambda s, x: HIDING[hiding](x)),
        )  # fmt: skip
        assert offered(model, torch.randn(4, 5)) == layers


#: Let nothing through of what all units put out that are left of a narrow layer.
DEAF: dict[str, Callable[[Tensor], Tensor]] = {
    "a ReLU": torch.relu,
    "a clamp": lambda h: h.clamp(0, 2),
    "a threshold": lambda h: F.threshold(h, 0.0, 0.0),
    "a choice": lambda h: torch.where(h > 0, h, 0.0),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("deaf", DEAF)
def test_a_layer_that_is_given_nothing_hides_no_fault(deaf, wrong):
    """Its units are below zero on the example, and on everything that is like it."""
    width = random.randint(3, 12)
    torch.manual_seed(random.randrange(2**31))
    for code, layers in ((WRONG[wrong], {"2"}), (torch.tanh, {"0", "2"})):
        through = Apply(lambda s, x, code=code: DEAF[deaf](code(x)))
        model = nn.Sequential(
            nn.Linear(5, width), through, nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3)
        )
        nn.init.uniform_(model[0].bias, -40, -20)
        assert not model[1](model[0](torch.randn(64, 5))).any()
        assert offered(model, torch.randn(4, 5)) == layers


def ramp(h: Tensor) -> Tensor:
    """Numbers that follow each channel's place from behind, unseen by a trace."""
    return torch.tensor([*range(h.size(1), 0, -1)]).view(-1, 1, 1).to(h)


#: Wrong at few places of an image only.
WRONG_IN_PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "in a corner": lambda h: h + ramp(h) * (torch.arange(h[0, 0].numel()) < 1).view(h[0, 0].shape),
    "in the middle row": lambda h: h * (
        1 + ramp(h) * (torch.arange(h.size(2)) == h.size(2) // 2).view(-1, 1)
    ),
    "where it is great": lambda h: h + 0.1 * ramp(h) * (h > 2.5 * h.std()),
    "by a thousandth": lambda h: h * (1 + 1e-3 * ramp(h)),
}  # fmt: skip


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("wrong", WRONG_IN_PLACES)
def test_what_is_left_of_an_image_shows_a_fault_at_few_of_its_places(wrong, size):
    """Behind it most of what comes is cut off, and an average is taken."""
    torch.manual_seed(random.randrange(2**31))
    widths = [3, *(random.randint(6, 12) for _ in range(3))]
    at, shift = random.randrange(3), random.uniform(0, 2.5)
    layers: list[nn.Module] = []
    for number, (one, other) in enumerate(pairwise(widths)):
        layers.append(nn.Conv2d(one, other, 3, random.choice([1, 2, 2]), 1))
        if number == at:
            layers += [
                Apply(lambda s, h: WRONG_IN_PLACES[wrong](h)),
                Apply(lambda s, h: (h - shift * h.detach().std()).relu()),
            ]
        else:
            layers.append(nn.ReLU())
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3)]
    model = nn.Sequential(*layers)
    convolutions = [name for name, layer in model.named_children() if type(layer) is nn.Conv2d]
    right = {name for number, name in enumerate(convolutions) if number != at}
    assert offered(model, torch.randn(1, 3, size, size)) == right


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", DELICATE)
def test_noise_makes_no_nan_that_hides_a_fault(name, wrong):
    width = random.randint(7, 14)
    torch.manual_seed(random.randrange(2**31))
    x = torch.rand(4, 4) + 0.01
    for code, layers in ((WRONG[wrong], {"second"}), (torch.tanh, {"first", "second"})):
        assert offered(Delicate(width, DELICATE[name], code), x) == layers


def test_an_example_that_a_model_makes_nan_of_is_refused():
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(4, 5)
    x[:, 2] = torch.nan
    with pytest.raises(ValueError, match="'0' puts out nothing but nan or infinity"):
        offered(model, x)
    assert offered(model, x, verify=False) == {"0", "2"}
    # Some of it shows what there is to see, as attention does with some rows masked.
    x = torch.randn(4, 5)
    x[1] = torch.nan
    assert offered(model, x) == {"0", "2"}
    assert offered(
        nn.Sequential(model[0], Apply(lambda s, h: WRONG["how many"](h)), *model[1:]), x
    ) == {"3"}


@pytest.mark.parametrize("kind", ["any", "away", "none"])
def test_noise_stays_on_the_side_of_zero_that_it_is_asked_to(kind):
    noise = Noise()
    noise.kind = kind
    before = torch.randn(70_000, dtype=torch.float64)
    before[::7] = 0
    after = noise.on_inputs({"x": (before, 3)})["x"][0]
    assert torch.equal(before, after) == (kind == "none")
    turned = (before.sign() * after.sign() < 0).double().mean()
    assert (turned > 0.05) == (kind == "any")
    if kind == "away":
        assert bool((after[before == 0] >= 0).all())
        assert bool((after.abs() >= before.abs()).all())


def ran(*outputs: Tensor) -> Ran:
    return Ran(list(outputs), [])


@pytest.mark.parametrize("great", [-1e9, 1e30, -torch.inf, torch.finfo(torch.float64).max])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.55])
def test_great_numbers_are_no_measure_for_others(great, share):
    torch.manual_seed(random.randrange(2**31))
    one = torch.randn(40, 50, dtype=torch.float64)
    masked = torch.rand(40, 50) < share
    one[masked] = great
    rounded = one * (1 - 1e-14 * torch.rand_like(one))
    assert difference(ran(one), ran(rounded), "its channels", exact=True) == ("", None)
    other = rounded.clone()
    row, column = (~masked).nonzero()[random.randrange(100)].tolist()
    other[row, column] += 1e-4
    assert "mixes" in difference(ran(one), ran(other), "its channels", exact=True)[0]
    other[row, column] = torch.nan
    assert "mixes" in difference(ran(one), ran(other), "its channels", exact=True)[0]
    assert "mixes" in difference(ran(other), ran(one), "its channels", exact=True)[0]


def test_what_is_left_of_numbers_that_cancel_is_no_difference():
    one = torch.randn(30, 40, dtype=torch.float64)
    one[:, ::3] = 0
    other, third = (one + 1e-16 * torch.randn_like(one) for _ in range(2))
    for pair in ((one, other), (other, one), (other, third)):
        assert difference(ran(pair[0]), ran(pair[1]), "its channels", exact=True) == ("", None)


@pytest.mark.parametrize("lowest", [False, True])
def test_later_draws_do_not_depend_on_how_many_were_drawn_before(lowest):
    """ProbSparse attention draws its keys, behind dropout on channels some of which are gone."""
    own = torch.Generator().manual_seed(random.randrange(2**31))
    seed = random.randrange(2**31)

    def drawn(width: int) -> Tensor:
        torch.manual_seed(seed)
        with SteadyNoise(lowest=lowest):
            for values in (
                F.dropout(torch.ones(3, width), 0.4), torch.rand(width), torch.randn(2, width),
                torch.empty(width).exponential_(), torch.rand(width, generator=own),
                torch.bernoulli(torch.full((width,), 0.5)), torch.rand_like(torch.ones(width)),
            ):  # fmt: skip
                assert values.unique().numel() == 1
            return torch.cat([torch.randint(0, 99, (20,)), torch.randint(99, (9,), generator=own)])

    before = own.get_state()
    first = drawn(random.randint(2, 40))
    own.set_state(before)
    assert torch.equal(drawn(random.randint(41, 80)), first)


def test_layers_inside_of_vmap_have_no_norm_of_their_own():
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 2))
    each = Apply(lambda s, x: torch.vmap(s.model)(x), model=model)
    assert offered(each, torch.randn(4, 5)) == {"model.0"}


@pytest.mark.parametrize("place", [2, 3, 4])
def test_few_rows_hide_no_literal_place(place):
    """The first channels by a number written down, which is a part of the width by chance."""
    torch.manual_seed(random.randrange(2**31))
    for times in (2, 3, 6):
        code = Apply(lambda s, h: torch.cat([h[:, :place].relu(), h[:, place:]], 1))
        model = nn.Sequential(nn.Linear(5, place * times), code, nn.Linear(place * times, 3))
        nn.init.zeros_(model[0].bias)
        nn.init.normal_(model[0].weight)
        with pytest.raises(ValueError, match="has nothing to prune"):
            offered(model, torch.randn(2, 5))


@pytest.mark.parametrize("shape", [(1, 7), (3, 5), (2, 4, 6), (2, 3, 8, 8), (1, 1, 8, 7)])
def test_small_examples_are_repeated_with_all_that_goes_with_them(shape):
    x, names = torch.randn(shape), torch.arange(shape[0])
    more = repeated({"x": x, "names": names, "n": 3})
    times = len(more["x"]) // len(x)
    assert times > 1
    assert more["n"] == 3
    assert torch.equal(more["names"], names.repeat(times))
    assert torch.equal(more["x"][: len(x)], x)
    assert torch.equal(more["x"][len(x) : 2 * len(x)], -x)
    assert more["x"].numel() <= 2**12


@pytest.mark.parametrize(
    "example",
    [
        torch.randn(2, 3, 64, 64), torch.randn(20, 4), torch.arange(6).view(2, 3), torch.randn(()),
        [torch.randn(2, 3), torch.randn(4, 3)], torch.empty(0, 3),
    ],
    ids=["large", "many rows", "whole numbers", "no dimension", "two sizes", "empty"],
)  # fmt: skip
def test_other_examples_stay_as_they_are(example):
    assert repeated(example) is example
