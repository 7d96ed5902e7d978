"""Gates where norms come late: how the scores of a pass in train mode agree with the oracle.

A gate in front of a norm in train mode has no gradient but rounding noise. Here networks whose
norms come directly behind their layers, behind a ReLU and behind a residual sum are scored as they
are while they are trained, with their gates at the sites that a trace finds and without.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.importance import Importance
from taylor_kernels.studies.data import load_digits, minibatches
from taylor_kernels.studies.networks import DigitsCnn, DigitsPreActivation, DigitsReluNorm
from taylor_kernels.studies.oracle.correlation import coefficients
from taylor_kernels.studies.report import Section, Table, Text
from taylor_kernels.studies.training import Schedule
from taylor_kernels.studies.weights import trained_network

if TYPE_CHECKING:
    from taylor_kernels.studies.cache import Cache
    from taylor_kernels.studies.progress import ProgressLog
    from taylor_kernels.studies.results import Json

#: Where the norm is -> the network.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolution, norm": DigitsCnn,
    "convolution, ReLU, norm": DigitsReluNorm,
    "pre-activation": DigitsPreActivation,
}
CRITERIA = ("taylor_fo_bn", "taylor_fo_gate", "taylor_so_diag")
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LateNorms:
    """The recipe.

    Attributes:
        epochs: few, as a network is pruned long before its loss has come to rest.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = 0.1
    weight_decay: float = 5e-4


RECIPE = LateNorms()


def late_norms(
    recipe: LateNorms, seed: int, device: torch.device, cache: Cache, log: ProgressLog
) -> list[Json]:
    """For each network and criterion the Spearman coefficients with the oracle."""
    settings = {"seed": seed, "device": device.type, "torch": torch.__version__, **asdict(recipe)}
    found = []
    for name, make in NETWORKS.items():
        piece = cache.piece("late-norms", settings | {"network": name}, by=[_measured, make])

        def measured(name: str = name, make: Callable[[], nn.Module] = make) -> Json:
            with log.task(f"late norms: {name}", 1):
                return _measured(make, recipe, seed, device, cache, log)

        found.append({"network": name, "criteria": piece.made(measured)})
    return found


def _measured(
    make: Callable[[], nn.Module],
    recipe: LateNorms,
    seed: int,
    device: torch.device,
    cache: Cache,
    log: ProgressLog,
) -> Json:
    data = load_digits(seed).to(device).train
    schedule = Schedule(recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay)
    label = f"{make.__name__}, {recipe.epochs} epochs"
    model = trained_network(make, seed, data, schedule, cache, log, label=label).model
    order = torch.Generator().manual_seed(seed)
    batches = list(minibatches(data, recipe.batch_size, order))
    oracle = scores(model.eval(), "oracle", [(data.images, data.labels)], sites=True)
    # Filters that share a gate are one.
    _, once = np.unique(oracle, return_index=True)

    def spearman(criterion: str, *, train: bool, sites: bool) -> float:
        values = scores(model.train(train), criterion, batches, sites=sites)
        return coefficients(values[once], oracle[once])["spearman"]

    return {
        criterion: {
            "train": spearman(criterion, train=True, sites=True),
            "without": spearman(criterion, train=True, sites=False),
            "eval": spearman(criterion, train=False, sites=True),
        }
        for criterion in CRITERIA
    }


def scores(model: nn.Module, criterion: str, batches: Batches, *, sites: bool) -> np.ndarray:
    """[F] over all convolutions, in the model's mode; the model is as it was.

    Args:
        sites: gates stand where a trace says.
    """
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    example = batches[0][0][:1] if sites else None
    meter = Importance(model, criterion, layers=layers, example_inputs=example)
    try:
        for x, y in batches:
            if meter.needs_closure:
                meter.update(closure=partial(_loss, model, x, y))
            else:
                model.zero_grad()
                _loss(model, x, y).backward()
                meter.update()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # layers without a score are nan, and counted
            found = meter.compute()
    finally:
        meter.close()
        model.load_state_dict(before)
    return torch.cat([found[name] for name in layers]).double().cpu().numpy()


def section(found: Sequence[Json]) -> Section:
    """The part of the report that shows it."""
    rows = []
    for one in found:
        for criterion, rho in one["criteria"].items():
            figures = [rho[key] for key in ("train", "without", "eval")]
            shown = ["no score" if r is None or np.isnan(r) else f"{r:.2f}" for r in figures]
            rows.append([one["network"], f"`{criterion}`", *shown])
    said = (
        "Networks as they are while they are pruned: trained for a few epochs, scored in passes in "
        "train mode over one epoch of minibatches, the oracle in eval mode. Spearman over the "
        "gates of all convolutions. Without sites a gate stands directly behind its layer, where a "
        "later norm leaves it rounding noise: such layers have no score, and the coefficient is "
        "that of the others. In train mode a norm behind the next layer also takes out that a "
        "removed channel moves its mean, which the oracle in eval mode sees: the squared slope of "
        "a whole minibatch then ranks worse than in eval mode, whatever its gates, those of "
        "examples less so."
    )
    columns = ["norm", "criterion", "train mode", "train mode, without sites", "eval mode"]
    return Section("Gates behind late norms", [Text(said), Table(columns, rows, numeric=(2, 3, 4))])


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)
