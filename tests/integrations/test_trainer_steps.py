"""What a step of a trainer is to the pruner: accumulated, scaled, or one of two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.integrations import trainer_runs as runs
from tests.integrations.conftest import forget_accelerator, library
from tests.integrations.trainer_runs import KINDS, trained

pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_accelerator"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate", "obd_fisher"])
def test_an_accumulation_is_one_minibatch(criterion):
    """Of all its batches. `obd_fisher` takes each batch's loss for a mean over its own examples."""
    library("accelerate")
    from accelerate import Accelerator
    from accelerate.state import GradientState

    from taylor_kernels.integrations.accelerate import AcceleratedPruner

    images, labels = runs.examples()
    images, labels = images[:24], labels[:24]
    found = []
    for parts in (1, 4):
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        bare = runs.network(norm=False).double()
        model, optimizer = accelerator.prepare(bare, runs.sgd(bare)[0])
        pruner = AcceleratedPruner(
            accelerator,
            model,
            images[:1].double(),
            criterion,
            optimizer=optimizer,
            **{**runs.OPTIONS, "every": 1},
        )
        records = []
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x.double()), y))
                records.append(pruner.step())
        assert [record is None for record in records] == [True] * (parts - 1) + [False]
        factor = parts**2 if criterion == "obd_fisher" else 1
        found.append({name: score * factor for name, score in pruner.scores().items()})
        pruner.close()
    for name, score in found[0].items():
        torch.testing.assert_close(found[1][name], score, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaler_is_divided_out(kind, tmp_path):
    plain = trained(kind, tmp_path)
    forget_accelerator()
    scaled = trained(kind, tmp_path, scaler=torch.amp.GradScaler("cpu"))
    assert scaled.pruner.overflowed == 0
    first, expected = scaled.pruner.history[0], plain.pruner.history[0]
    if kind == "lightning":  # which computes in float16 then
        assert math.isclose(first.threshold, expected.threshold, rel_tol=0.02)
    else:  # the scale is a power of two
        assert scaled.pruner.history == plain.pruner.history


@pytest.mark.parametrize("kind", KINDS)
def test_minibatches_whose_step_is_skipped_do_not_count(kind, tmp_path, monkeypatch):
    """One backward pass overflows; the optimizer leaves out its step, and so does the pruner."""
    backward, made = 0, 0
    plain = runs.network

    def overflow(gradient: Tensor) -> Tensor:
        nonlocal backward
        backward += 1
        return gradient * math.inf if backward == 3 else gradient

    def network() -> nn.Sequential:
        model = plain()
        model[0].weight.register_hook(overflow)
        return model

    def note(*_: Any) -> None:
        nonlocal made
        made += 1

    monkeypatch.setattr(runs, "network", network)
    hook = register_optimizer_step_post_hook(note)
    try:
        got = trained(kind, tmp_path, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    finally:
        hook.remove()
    assert got.pruner.overflowed == 1
    assert got.pruner.history[-1].step == made == 8
    assert all(math.isfinite(record.threshold) for record in got.pruner.history)


@pytest.mark.parametrize("kind", ["lightning", "transformers"])
def test_clipping_shows_where_it_comes_before(kind, tmp_path):
    """Transformers clips before its callbacks are asked, Lightning afterwards."""
    least, limit, norm = [], 1e-3, math.nan
    for clipped in (False, True):
        if kind == "lightning":
            options: dict[str, Any] = {"gradient_clip_val": limit if clipped else None}
        else:
            options = {"max_grad_norm": limit if clipped else 0.0, "logging_steps": 1}
        pruning = {"criterion": "taylor_fo", "every": 1}
        got = trained(kind, tmp_path, pruning=pruning, **options)
        least.append(got.pruner.history[0].threshold)
        if kind == "transformers":
            logged = [entry for entry in got.trainer.state.log_history if "grad_norm" in entry]
            norm = logged[0]["grad_norm"]
    ratio = 1.0 if kind == "lightning" else (limit / norm) ** 2
    assert ratio == 1.0 or ratio < 0.01
    assert math.isclose(least[1] / least[0], ratio, rel_tol=1e-2)


def test_a_second_trainer_of_lightnings_goes_on_with_its_own_optimizer(tmp_path):
    """The first one keeps its optimizer, with momenta of the parameters that are cut later."""
    library("lightning")
    from lightning import pytorch

    first, module, callback = runs.lightning(tmp_path, max_epochs=1)
    pruner = callback.pruner
    assert not pruner.done
    old = first.optimizers[0]
    assert any(p in old.state for p in module.parameters())
    second = pytorch.Trainer(
        **runs.QUIET,
        max_epochs=runs.EPOCHS,
        callbacks=[callback],
    )
    second.fit(module, runs.loader())
    assert callback.pruner is pruner
    assert pruner.done
    assert sum(m.out_channels for m in module.net if isinstance(m, nn.Conv2d)) == 12
    assert set(second.optimizers[0].state) == set(module.parameters())


@pytest.mark.parametrize(
    ("criterion", "to_none"),
    [("taylor_fo", False), ("taylor_fo_bn", False), ("taylor_fo_gate", True)],
)
def test_steps_whose_batches_lightning_leaves_out_do_not_count(
    criterion, to_none, tmp_path, monkeypatch
):
    """training_step() returns None for a batch, or for all of a step."""
    library("lightning")
    from lightning import pytorch

    def clear(self, epoch, batch, optimizer) -> None:
        optimizer.zero_grad(set_to_none=to_none)

    monkeypatch.setattr(pytorch.LightningModule, "optimizer_zero_grad", clear)
    kept = cross_entropy
    counts = iter(range(1000))

    def some(output: Tensor, labels: Tensor) -> Tensor | None:
        return None if next(counts) in left_out else kept(output, labels)

    monkeypatch.setattr(runs, "cross_entropy", some)
    left_out = {1, 2, 3}  # half of the first step, and the second
    _, _, callback = runs.lightning(tmp_path, max_epochs=1, pruning={"criterion": criterion})
    assert callback.pruner.state_dict()["steps"] == 2  # of three in an epoch


def test_passes_that_toggle_optimizer_leaves_the_model_out_of_do_not_count(tmp_path):
    """Of a critic those that train the generator, in manual optimization."""
    library("lightning")
    from lightning import pytorch

    from taylor_kernels.integrations.lightning import PruningCallback

    class Adversaries(pytorch.LightningModule):
        def __init__(self, weight: float) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.automatic_optimization, self.weight = False, weight
            self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).double()
            self.generator = nn.Linear(4, 6).double()

        def training_step(self, batch: dict[str, Tensor], index: int) -> None:
            of_generator, of_critic = self.optimizers()
            self.toggle_optimizer(of_generator)
            loss = -self.net(self.generator(batch["x"])).mean() * self.weight
            self.manual_backward(loss)
            of_generator.step()
            of_generator.zero_grad()
            self.untoggle_optimizer(of_generator)
            self.manual_backward(self.net(batch["y"]).mean())
            of_critic.step()
            of_critic.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.0) for m in (self.generator, self.net)]

    torch.manual_seed(5)
    rows = [{name: torch.randn(n).double() for name, n in {"x": 4, "y": 6}.items()} for _ in "1234"]
    for row in rows:
        row["mask"] = torch.tensor(True)
    found = []
    for weight in (0.0, 1.0):
        example = torch.randn(1, 6, dtype=torch.float64)
        callback = PruningCallback(
            example, "taylor_fo_gate", model="net", padding="mask", compact=False,
            filters=0.5, every=2, per_step=2,
        )  # fmt: skip
        trainer = pytorch.Trainer(**runs.QUIET, max_epochs=1, callbacks=[callback])
        trainer.fit(Adversaries(weight), torch.utils.data.DataLoader(rows, 2))
        found.append(callback.pruner.scores()["0"])
    torch.testing.assert_close(*found, equal_nan=True)
    assert found[0].nansum() > 0


def test_a_model_that_accelerate_compiles(tmp_path):
    plain = trained("accelerate", tmp_path)
    forget_accelerator()
    compiled = trained("accelerate", tmp_path, dynamo_backend="aot_eager")
    assert type(compiled.net).__name__ == "OptimizedModule"
    assert isinstance(compiled.pruner.model, nn.Sequential)
    got, expected = compiled.pruner.history[0], plain.pruner.history[0]
    assert got.removed == expected.removed
    assert math.isclose(got.threshold, expected.threshold, rel_tol=1e-4)


def test_bfloat16_needs_no_scaler(tmp_path):
    plain = trained("accelerate", tmp_path)
    forget_accelerator()
    half = trained("accelerate", tmp_path, mixed_precision="bf16")
    assert half.pruner.history != plain.pruner.history
    one, other = half.pruner.history[0], plain.pruner.history[0]
    assert math.isclose(one.threshold, other.threshold, rel_tol=0.1)
