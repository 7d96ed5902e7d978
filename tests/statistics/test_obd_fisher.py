"""obd_fisher against a loop over examples that forms every weight gradient, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk
from tests.helpers import nets

pytestmark = pytest.mark.usefixtures("one_thread")

Batch = tuple[Tensor, Tensor]


def by_loop(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor] = nets.loss_of,
) -> dict[str, Tensor]:
    """½ Σ_k w_k² · mean_n (gradient of example n's own loss)², every example alone."""
    layers = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    }
    ones = [(x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)]
    total = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for one in ones:
        weights = [layer.weight for layer in layers.values()]
        grads = torch.autograd.grad(loss(model, one), weights, allow_unused=True)
        for name, grad in zip(layers, grads, strict=True):
            total[name] += 0 if grad is None else grad.square()
    return {
        name: nets.filters_first(layer, total[name] * layer.weight.square()).sum(1).detach()
        / (2 * len(ones))
        for name, layer in layers.items()
    }


def metered(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor] = nets.loss_of,
    **options,
) -> dict[str, Tensor]:
    """One update over all batches, whose mean is the mean over their examples."""
    imp = tk.Importance(model, "obd_fisher", **options)
    for batch in batches:
        loss(model, batch).backward()
    imp.update()
    scores = imp.compute()
    imp.close()
    return scores


def close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert want.abs().max() > 0, name
        torch.testing.assert_close(got[name].double(), want.double(), rtol=rtol, atol=0)


def half_squares(model: nn.Module, batch: Batch) -> Tensor:
    """A loss that is a mean over examples, of a model with any output."""
    out = model(batch[0])
    weights = torch.linspace(-1, 2, out[0].numel(), dtype=out.dtype).view(out[0].shape)
    return ((out * weights - batch[1].view(-1, *[1] * (out.dim() - 1))).square() / 2).sum() / len(
        out
    )


def random_batch(*shape: int, n: int = 5) -> Batch:
    return torch.randn(n, *shape, dtype=torch.float64), torch.randn(n, dtype=torch.float64)


@pytest.mark.parametrize("scoring", [True, False], ids=["no weight gradients", "weight gradients"])
def test_is_that_of_a_loop_over_examples(scoring):
    model, batches = nets.mixed(train=False), [nets.batch(4)]
    expected = by_loop(model, batches)
    model.zero_grad()
    if scoring:
        with tk.scoring(model):
            got = metered(model, batches)
        assert all(p.grad is None for p in model.parameters())
    else:
        got = metered(model, batches)
    close(got, expected)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "tokens": (lambda: nn.Linear(7, 5), (4, 7)),
    "more tokens": (lambda: nn.Linear(7, 5), (3, 2, 7)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 8, 7)),
    "dilated": (lambda: nn.Conv2d(3, 5, (3, 2), padding=(2, 1), dilation=(2, 1)), (3, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (6, 6, 6)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), (6, 6, 6)),
    "same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same"), (3, 6, 6)),
    "valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 6, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (3, 6, 6)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 6)),
    "replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (3, 6, 6)),
    "same, circular": (
        lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="circular"),
        (3, 6, 6),
    ),
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "1d, same, reflect": (
        lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="reflect", dilation=2),
        (4, 9),
    ),
    "3d": (lambda: nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=1, groups=2), (4, 4, 5, 3)),
    "3d, replicate": (
        lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"),
        (2, 3, 4, 3),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 5, 4),
    ),
    "transposed, output padding over stride": (
        lambda: nn.ConvTranspose2d(4, 6, 3, dilation=3, padding=2, output_padding=2),
        (4, 5, 4),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 4, stride=3), (3, 5)),
    "transposed 3d": (
        lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, padding=1, groups=2),
        (4, 3, 4, 3),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind):
    make, shape = LAYERS[kind]
    model, batch = nn.Sequential(make()).double(), random_batch(*shape)
    close(metered(model, [batch], half_squares), by_loop(model, [batch], half_squares))


@pytest.mark.parametrize("kind", ["linear", "conv", "1d", "3d", "transposed"])
def test_one_example_without_a_batch(kind):
    make, shape = LAYERS[kind]
    model = nn.Sequential(make()).double()
    x, _ = random_batch(*shape, n=1)
    expected = metered(model, [(x, None)], lambda m, b: m(b[0]).sin().sum())
    close(metered(model, [(x[0], None)], lambda m, b: m(b[0]).sin().sum()), expected)


class Twice(nn.Module):
    """Every layer is used twice, on inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.deep = nn.Conv3d(1, 1, 2)
        self.up = nn.ConvTranspose1d(4, 4, 3, groups=2)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.max_pool2d(self.conv(x).sigmoid(), 2)).tanh()
        x = self.deep(self.deep(x.unsqueeze(1)).sigmoid()).flatten(1)
        x = x.view(len(x), 4, -1)
        x = self.up(self.up(x).tanh()).transpose(1, 2)
        return self.fc(self.fc(x).tanh().mean(1))


def test_gradients_of_a_layer_used_twice_add_up_before_they_are_squared():
    model, batch = Twice().double(), random_batch(3, 12, 12)
    close(metered(model, [batch], half_squares), by_loop(model, [batch], half_squares))


def test_of_two_modules_with_one_weight_each_has_its_own_use():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    twin = copy.deepcopy(model)
    twin[2].weight.data = twin[0].weight.data.clone()
    model[2].weight = model[0].weight
    twin[2].bias.data, model[2].bias.data = torch.zeros(2, 4, dtype=torch.float64)
    batch = random_batch(4)
    close(metered(model, [batch], half_squares), by_loop(twin, [batch], half_squares))


def test_passes_before_one_update_are_weighed_by_their_examples():
    model, batches = nets.mixed(train=False), [nets.batch(n) for n in (3, 5, 1)]
    expected = by_loop(model, batches)
    close(metered(model, batches), expected)
    imp = tk.Importance(model, "obd_fisher")
    sum(nets.loss_of(model, batch) for batch in batches).backward()  # three calls, one backward
    imp.update()
    close(imp.compute(), expected)


def test_the_weight_of_a_parametrized_layer_is_the_one_it_used_and_does_not_move():
    layer = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)).double()
    model, batch = nn.Sequential(layer), random_batch(3, 5, 5)
    imp = tk.Importance(model, "obd_fisher")
    twin = copy.deepcopy(model)
    for _ in range(2):
        loss = half_squares(twin, batch)
        imp.reset()
        half_squares(model, batch).backward()
        imp.update()
        theirs = twin[0].parametrizations.weight[0]
        mine = layer.parametrizations.weight[0]
        assert mine._u.equal(theirs._u)
        assert mine.training
        plain = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
        plain[0].weight.data = twin.eval()[0].weight.detach()
        plain[0].bias.data = layer.bias.detach()
        twin.train()
        assert half_squares(plain, batch).isclose(loss)
        close(imp.compute(), by_loop(plain, [batch], half_squares))


def test_a_batch_norm_in_train_mode_mixes_examples_and_dy_of_the_batch_is_used():
    model, (x, y) = nets.mixed(train=True), nets.batch(6)
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, x: Tensor, output: Tensor) -> None:
        output.register_hook(lambda dy: kept.__setitem__(name, (x.clone(), dy)))

    for name in ("stem", "grouped"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: keep(name, args[0], output)
        )
    got = metered(model, [(x, y)])
    for name, (x, dy) in kept.items():
        layer = model.get_submodule(name)
        g = [
            torch.nn.grad.conv2d_weight(
                a[None], layer.weight.shape, 6 * b[None], padding=1, groups=layer.groups
            )
            for a, b in zip(x, dy, strict=True)
        ]
        expected = (torch.stack(g).square().mean(0) * layer.weight.square()).flatten(1).sum(1) / 2
        torch.testing.assert_close(got[name].double(), expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    plain, batch = Twice().double(), random_batch(3, 12, 12)
    expected = metered(plain, [batch], half_squares)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x = batch[0].clone().requires_grad_()
        head = checkpoint(lambda x: model.conv(x).sigmoid(), x, use_reentrant=use_reentrant)

        def rest(x: Tensor) -> Tensor:
            x = model.conv(F.max_pool2d(x, 2)).tanh()
            x = model.deep(model.deep(x.unsqueeze(1)).sigmoid()).flatten(1)
            x = model.up(model.up(x.view(len(x), 4, -1)).tanh()).transpose(1, 2)
            return model.fc(model.fc(x).tanh().mean(1))

        out = checkpoint(rest, head, use_reentrant=use_reentrant)
        return half_squares(lambda _: out, batch)

    imp = tk.Importance(plain, "obd_fisher")
    for _ in range(2):
        loss(plain, batch).backward()
        imp.update()
    close(imp.compute(), expected)


def test_two_backwards_over_a_retained_graph_add_up():
    model, (x, y) = nets.mixed(train=False), nets.batch()
    parts = (F.cross_entropy, lambda out, y: out.square().sum(1).mean())

    def whole(model: nn.Module, batch: Batch) -> Tensor:
        out = model(batch[0])
        return sum(part(out, batch[1]) for part in parts)

    expected = by_loop(model, [(x, y)], whole)
    close(metered(model, [(x, y)], whole), expected)
    imp = tk.Importance(model, "obd_fisher")
    out = model(x)
    parts[0](out, y).backward(retain_graph=True)
    parts[1](out, y).backward()
    imp.update()
    close(imp.compute(), expected)

    out = model(x)  # with an update in between, each is one of its own
    imp.reset()
    for part, keep in zip(parts, (True, False), strict=True):
        part(out, y).backward(retain_graph=keep)
        imp.update()
    imp.close()
    singles = [metered(model, [(x, y)], lambda m, b, p=part: p(m(b[0]), b[1])) for part in parts]
    close(imp.compute(), {name: (singles[0][name] + singles[1][name]) / 2 for name in expected})


def test_what_was_reset_is_forgotten():
    model, (x, y) = nets.mixed(train=False), nets.batch()
    imp = tk.Importance(model, "obd_fisher")
    out = model(x)
    out.square().sum().backward(retain_graph=True)
    imp.reset()
    F.cross_entropy(out, y).backward()
    imp.update()
    with pytest.raises(RuntimeError, match=r"once after each loss\.backward"):
        imp.update()
    close(imp.compute(), metered(model, [(x, y)]))


def test_frozen_weights_and_what_lies_before_the_first_trained_one():
    model, batch = nets.mixed(train=False), nets.batch()
    expected = by_loop(model, [batch])
    model.plain.requires_grad_(False)
    close(metered(model, [batch]), expected)
    for part in (model.stem, model.stem_bn):
        part.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no gradient reaches the output of .*tk\.scoring"):
        partly = metered(model, [batch])
    assert partly["stem"].isnan().all()
    assert partly["plain"].isnan().all()
    close({n: partly[n] for n in ("fc", "up")}, {n: expected[n] for n in ("fc", "up")})
    with tk.scoring(model):
        close(metered(model, [batch]), expected)


def test_an_input_that_was_changed_in_place_is_reported():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.change = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x)
            if self.change:
                x += y  # allowed in scoring(): without weight gradients nobody else reads x
            return x + y

    model, batch = InPlace().double(), random_batch(4)
    imp = tk.Importance(model, "obd_fisher")
    with tk.scoring(model):
        with pytest.raises(RuntimeError, match="b: its input was changed in place"):
            half_squares(model, batch).backward()
        model.change = False
        half_squares(model, batch).backward()
    imp.update()
    close(imp.compute(), metered(model, [batch], half_squares))


@pytest.mark.parametrize("criterion", ["obd_fisher", "obd_fisher_mc"])
def test_a_layer_whose_output_does_not_follow_from_its_input_is_named(criterion):
    class Padding(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)) if self.pads else x)

    model, batch = (
        nn.Sequential(Padding(3, 4, 3), nn.Conv2d(4, 2, 3)).double(),
        random_batch(3, 6, 6),
    )
    imp = tk.Importance(model, criterion)

    def update() -> None:
        if imp.needs_closure:
            imp.update(closure=lambda: half_squares(model, batch))
        else:
            half_squares(model, batch).backward()
            imp.update()

    model[0].pads = True
    with pytest.raises(RuntimeError, match=r"^0: its output is not that of a Conv2d.*leave it out"):
        update()
    model[0].pads = False
    update()
    first = imp.compute()
    imp.reset()
    update()
    close(imp.compute(), first)


def test_an_empty_batch_scores_zero():
    model = nn.Linear(4, 3)
    imp = tk.Importance(model, "obd_fisher")
    model(torch.zeros(0, 4)).sum().backward()
    imp.update()
    assert imp.compute()[""].equal(torch.zeros(3))


def test_loss_scale_is_divided_out():
    model, batch = nets.mixed(train=False), nets.batch()
    imp = tk.Importance(model, "obd_fisher")
    (nets.loss_of(model, batch) * 1024).backward()
    imp.update(loss_scale=1024.0)
    close(imp.compute(), metered(model, [batch]))


def test_bfloat16_autocast():
    model, (x, y) = nets.mixed(train=False), nets.batch(8)
    expected = by_loop(model, [(x, y)])
    model.float()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nets.loss_of(model, batch)

    got = metered(model, [(x.float(), y)], loss)
    for name, want in expected.items():
        assert (got[name] - want).norm() < 0.1 * want.norm(), name


def test_an_unused_layer_scores_zero_and_an_unused_model_is_an_error():
    class Unused(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 3))
            self.unused = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    model = Unused().double()
    imp = tk.Importance(model, "obd_fisher")
    with pytest.raises(RuntimeError, match=r"no forward and backward pass has been seen"):
        imp.update()
    with torch.no_grad():
        model(torch.randn(2, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"no forward and backward pass has been seen"):
        imp.update()
    half_squares(model, random_batch(4)).backward()
    with pytest.warns(UserWarning, match="unused: not called"):
        imp.update()
    assert imp.compute()["unused"].equal(torch.zeros(2))
    assert (imp.compute()["0"] > 0).all()


def test_standard_error_and_backends_agree():
    model, batches = nets.mixed(train=False), [nets.batch() for _ in range(4)]
    each = [torch.cat(list(by_loop(model, [batch]).values())) for batch in batches]
    meters = [tk.Importance(model, "obd_fisher", backend=b) for b in (None, "cpu", "reference")]
    for batch in batches:
        nets.backward(model, batch)
        for imp in meters:
            imp.update()
    for imp in meters:
        got = torch.cat(list(imp.standard_error().values())).double()
        torch.testing.assert_close(got, torch.stack(each).std(0) / 2, rtol=1e-4, atol=0)
