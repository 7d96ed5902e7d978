"""Code that goes one way on the user's example and another on those that a proof is run on."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.copies import copied
from taylor_kernels.pruning.proof.trial import Trial
from taylor_kernels.pruning.proof.ways import Ways
from taylor_kernels.tracing import trace
from taylor_kernels.tracing.model.branches import branches
from tests.tracing import asserting

#: What the code of a model asks of an example x, and of what its first layer y has made of it.
Asked = Callable[[nn.Module, Tensor, Tensor], bool]
#: Of [2, 5], which a proof repeats.
OF_FEW_ROWS: dict[str, Asked] = {
    "rows": lambda s, x, y: x.shape[0] < 4,
    "more rows": lambda s, x, y: not len(y) > 2,
    "numbers": lambda s, x, y: x.numel() <= 10,
    "values": lambda s, x, y: (x > -1e9).nonzero().shape[0] < 40,
    "a view": lambda s, x, y: x.unsqueeze(1).expand(-1, 3, -1).flatten(0, 1).size(0) == 6,
    "less than nothing": lambda s, x, y: x.size(0) - 3 < 0,
}
#: Of [6, 3, 64, 48], which it cuts down.
OF_IMAGES: dict[str, Asked] = {
    "rows": lambda s, x, y: x.shape[0] > 4,
    "height": lambda s, x, y: x.shape[-2] > 40,
    "pixels": lambda s, x, y: y[0, 0].numel() >= 3000,
}
#: Of any, which it runs in double precision, and in eval mode.
OF_ANY: dict[str, Asked] = {
    "not double": lambda s, x, y: y.dtype != torch.float64,
    "single": lambda s, x, y: x.element_size() == 4,
    "training": lambda s, x, y: s.training,
}


def factor_of(y: Tensor, width: int, small: bool) -> Tensor:
    if small:
        return y * float(width)
    return y * 3.0


def expression(y: Tensor, width: int, small: bool) -> Tensor:
    return y / (width if small else 2)


def both(y: Tensor, width: int, small: bool) -> Tensor:
    factor = 1.5
    if small and width:
        factor = width**0.5
    return y * factor


def skipped(y: Tensor, width: int, small: bool) -> Tensor:
    """The way of the example runs less."""
    factor = width**0.5
    if not small:
        factor = 2.0
    return y * factor


USES = [factor_of, expression, both, skipped]


class Asking(nn.Module):
    """A layer whose output is used in a way that its width decides on, for some examples."""

    def __init__(self, asked: Asked, use: Callable, width: int, *, images: bool) -> None:
        super().__init__()
        layer = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if images else nn.Linear
        self.enter, self.inner = layer(3 if images else 5, width), layer(width, width)
        self.leave = layer(width, 2)
        self.asked, self.use = asked, use

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x).tanh()
        y = self.use(y, int(str(y.shape[1])), self.asked(self, x, y))
        return self.leave(self.inner(y).tanh())


CASES = [
    *((asked, False) for asked in OF_FEW_ROWS.values()),
    *((asked, True) for asked in OF_IMAGES.values()),
    *((asked, images) for asked in OF_ANY.values() for images in (False, True)),
]


@pytest.mark.parametrize(("asked", "images"), CASES)
def test_its_channels_stay(asked, images):
    """Of a layer behind it some can go: it is the width of one layer that counts."""
    use, width = random.choice(USES), random.randint(7, 12)
    model = Asking(asked, use, width, images=images)
    example = torch.rand(6, 3, 64, 48) if images else torch.rand(2, 5)
    pruner = Pruner(model, example, "magnitude_l2", filters=0.8, every=1, per_step=2)
    assert set(pruner.widths) == {"inner"}
    assert "a masked one is not a removed one" in pruner.skipped["enter"]


@pytest.mark.parametrize("use", USES)
def test_channels_that_no_way_counts_can_go(use):
    """Where the user's examples are many rows, the code for few says nothing."""
    model = Asking(OF_FEW_ROWS["rows"], use, 9, images=False)
    example = torch.rand(30, 5)
    pruner = Pruner(model, example, "magnitude_l2", filters=0.7, every=1, per_step=2)
    assert set(pruner.widths) == {"enter", "inner"}
    while not pruner.done:
        pruner.step()
    masked = model(example)
    torch.testing.assert_close(pruner.compact()(example), masked)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_chance_in_train_mode_hides_no_other_way(use, rate):
    """A dropout draws numbers there, and a path is dropped now and then."""

    class Chance(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training or not rate:
                return x
            return nn.functional.dropout(x, 0.5) * x.new_empty(len(x), 1).bernoulli_(1 - rate)

    model = Asking(OF_ANY["training"], use, 9, images=False)
    pruner = Pruner(nn.Sequential(Chance(), model), torch.rand(4, 5), "magnitude_l2", filters=0.8)
    assert set(pruner.widths) == {"1.inner"}


class Sized(nn.Module):
    """Asks for sizes; what it does has nothing to do with its width."""

    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) < 4 or x.dtype != torch.float64:
            return x.sigmoid()
        return x.tanh()


def other_of(model: nn.Module, example: Tensor) -> tuple[torch.Size, torch.dtype] | None:
    """What a second trial of a model is run on; None where there is none."""
    channels = trace(model, example)
    trial = Trial(copied(model).eval(), model, example, channels, train_too=False)
    given = trial._other
    return None if given is None else (given.inputs.shape, given.inputs.dtype)


def test_another_run_is_made_only_where_it_goes_another_way():
    class Plain(nn.Module):
        flag = True

        def forward(self, x: Tensor) -> Tensor:
            asserting.plain(x)
            return x.tanh() if self.flag else x.sigmoid()

    class Few(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() if len(x) < 4 else x.sigmoid()

    def around(layer: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 2))

    few, many = torch.rand(2, 5), torch.rand(30, 5)
    assert other_of(around(Plain()), few) is None
    assert other_of(around(Few()), many) is None
    assert other_of(around(Few()), few) == (few.shape, torch.float64)
    assert other_of(around(Sized()), many) == (many.shape, torch.float32)
    assert other_of(around(Sized()).double(), many.double()) is None


@pytest.mark.parametrize(("rows", "other"), [(30, False), (2, True)])
def test_a_norm_that_masks_run_again_is_no_other_way(rows, other, monkeypatch):
    class Own(nn.LayerNorm):
        scales = True

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.scales else x

    class Few(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() if len(x) < 4 else x.sigmoid()

    found, learn = [], Trial._another_way

    def learnt(*given: object) -> object:
        found.append(learn(*given))
        return found[-1]

    monkeypatch.setattr(Trial, "_another_way", learnt)
    model = nn.Sequential(nn.Linear(5, 8), Own(8), Few(), nn.Linear(8, 2))
    pruner = Pruner(model, torch.rand(rows, 5), "magnitude_l2", filters=0.9)
    assert pruner.widths == {"0": 8}
    assert [one is not None for one in found] == [other]


def _setting(self, x):
    return x if self.settings.small and not self.flag else -x


def _missing(self, x):
    return x if x is None else -x


def _size(self, x):
    return x if x.shape[0] < 4 else -x


def _argument(self, x):
    if x:
        return 1
    return 2


def _called(self, x):
    return 1 if self.small(x) else 2


def _rounds(self, x):
    while len(x) > 3:
        x = x[1:]
    return x


def _named(self, x):
    if (rows := x.shape[0]) < 4:
        return x
    return x * rows


def _either(self, x):
    if (x.shape[0] if self.counts else self.rows) < 4:
        return x
    return -x


_ROWS = 0


def _kept_elsewhere(self, x):
    global _ROWS
    _ROWS = len(x)
    return x


def _tried(self, x):
    try:
        return x.view(2, -1)
    except:  # noqa: E722
        return x


@pytest.mark.parametrize("function", asserting.ASSERTIONS)
def test_assertions_are_no_branches(function):
    assert not branches(function.__code__).any


def test_settings_are_branches_by_their_names():
    found = branches(_setting.__code__)
    assert found.any
    assert not found.open
    assert found.attributes == {"settings", "small", "flag"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a jump of Python 3.10 does not say None")
def test_what_is_missing_is_so_for_all_examples():
    assert not branches(_missing.__code__).open


@pytest.mark.parametrize(
    "function",
    [
        _size,
        _argument,
        _called,
        _rounds,
        _named,
        _either,
        _kept_elsewhere,
        _tried,
        asserting.caught,
    ],
)
def test_other_branches_are_open(function):
    assert branches(function.__code__).open


@pytest.mark.parametrize("way", ["keep", "keep_by_name"])
@pytest.mark.parametrize("answer", ["chosen", "chosen_by_property"])
def test_an_attribute_that_a_run_writes_opens_its_branches(way, answer):
    class Keeping:
        rows = 0

        @property
        def many(self):
            return self.rows > 3

        def keep(self, x):
            self.rows = len(x)

        def keep_by_name(self, x):
            setattr(self, "rows", len(x))  # noqa: B010

        def chosen(self):
            return 1 if self.rows > 3 else 2

        def chosen_by_property(self):
            return 1 if self.many else 2

    keeping = Keeping()
    with Ways() as alone:
        getattr(keeping, answer)()
    with Ways() as both:
        getattr(keeping, way)([1])
        getattr(keeping, answer)()
    assert not alone.may_differ
    assert both.may_differ


def test_ways_are_told_apart_and_what_watches_is_put_back():
    def chosen(rows: int) -> int:
        total = 0
        for _ in range(rows):
            total += 1 if rows > 2 else 2
        return total

    def ways(rows: int) -> Ways:
        with Ways() as way:
            chosen(rows)
        return way

    before = sys.gettrace()
    assert ways(1) == ways(2)
    assert ways(3) == ways(9)
    assert ways(2) != ways(3)
    assert sys.gettrace() is before
