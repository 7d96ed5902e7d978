"""obd_fisher of passes that are not one forward and one backward of a whole batch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk
from tests.helpers import nets
from tests.helpers.fisher_loop import (
    Batch,
    Twice,
    by_loop,
    close,
    half_squares,
    metered,
    random_batch,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
