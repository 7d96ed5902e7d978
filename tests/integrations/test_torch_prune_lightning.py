"""Pruning methods that carry scores in Lightning's callback."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import taylor_kernels as tk
from taylor_kernels.integrations.torch_prune import model_pruning, structured, unstructured
from tests.integrations.conftest import library
from tests.integrations.taylor_scores import places, taylor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lightning():
    library("lightning")
    import lightning.pytorch as pl

    class Digits(pl.LightningModule):
        """Scores filters as it trains, and notes what each pruning ought to mask."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
            )

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    class Before(pl.Callback):
        """Runs `note` before the callbacks after it at the end of an epoch."""

        def __init__(self, note, step=lambda: None):
            self.note, self.step = note, step

        def on_before_optimizer_step(self, *_):
            self.step()

        def on_train_epoch_end(self, *_):
            self.note()

    def fit(model, *callbacks):
        data = TensorDataset(torch.randn(24, 1, 8, 8), torch.randint(0, 3, (24,)))
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(model, DataLoader(data, batch_size=8))

    return pl, Digits, Before, fit


@pytest.mark.filterwarnings("ignore:.*many workers|.*log_every_n_steps|.*GPU available")
def test_lightning_prunes_all_parameters_by_their_scores(lightning):
    """Its default setting: the least (g·w)² of all weights and biases together."""
    pl, Digits, Before, fit = lightning
    model, expected = Digits(), {}

    def note():
        scores = [taylor(*p).masked_fill(~left(*p), torch.inf).flatten() for p in places(model.net)]
        flat = torch.cat(scores)
        gone = flat.argsort()[: round(0.3 * int(flat.isfinite().sum()))]
        kept = flat.isfinite().index_fill(0, gone, False).split([len(s) for s in scores])
        expected.update(zip(places(model.net), kept, strict=True))

    def left(module, name):
        weight = getattr(module, name)
        return getattr(module, f"{name}_mask", torch.ones_like(weight)).bool()

    callback = pl.callbacks.ModelPruning(
        unstructured(model),
        amount=0.3,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=False,
    )
    fit(model, Before(note), callback)
    assert len(expected) == 6
    for (module, name), kept in expected.items():
        assert torch.equal(getattr(module, f"{name}_mask").bool().flatten(), kept), name
    masked = sum(int((~kept).sum()) for kept in expected.values())
    assert masked == pytest.approx(0.51 * sum(p.numel() for p in model.parameters()), abs=1)


@pytest.mark.filterwarnings("ignore:.*many workers|.*log_every_n_steps|.*GPU available")
def test_lightning_prunes_filters_layer_by_layer(lightning):
    _, Digits, Before, fit = lightning
    model = Digits()
    importance = tk.Importance(model.net, "taylor_fo_bn", layers=["0"])
    gone: list[int] = []

    def note():
        scores = importance.compute()["0"]
        gone.extend([f for f in scores.argsort().tolist() if f not in gone][:2])

    callback = model_pruning(
        structured(model.net, importance), amount=2, use_lottery_ticket_hypothesis=False
    )
    fit(model, Before(note, importance.update), callback)
    weight = dict(model.net.named_parameters())["0.weight"]  # pruning was made permanent
    assert len(gone) == 4
    assert {f for f, row in enumerate(weight.flatten(1)) if not row.any()} == set(gone)
    assert not any(isinstance(m, prune.BasePruningMethod) for m in model.net[0]._forward_pre_hooks)


def test_what_lightning_itself_refuses(lightning):
    """The two settings that it has no way for; `model_pruning` has one for each."""
    pl, Digits, *_ = lightning
    model = Digits()
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match="use_global_unstructured=True"):
        pl.callbacks.ModelPruning(unstructured(model), use_global_unstructured=False)
    with pytest.raises(MisconfigurationException, match="TaylorStructured"):
        pl.callbacks.ModelPruning(structured(model, {}))
    for method in (unstructured(model), structured(model, {})):
        assert isinstance(model_pruning(method), pl.callbacks.ModelPruning)
