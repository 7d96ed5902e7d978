"""Gates where norms come late: how the scores of a pass in train mode agree with the oracle.

A gate in front of a norm in train mode has no gradient but rounding noise. Here networks whose
norms come directly behind their layers, behind a ReLU and behind a residual sum are scored as they
are while they are trained, with their gates at the sites that a trace finds and without.

Scores are held against an oracle in their own mode, over the same minibatches. In train mode a norm
takes out that a removed channel moves a mean and a variance; the oracle in eval mode sees both. The
two oracles rank filters differently, so that no score can agree with both.
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

from taylor_kernels.gate_sites import find_gate_sites
from taylor_kernels.importance import Importance
from taylor_kernels.statistics import Layers, LossChange, filter_count
from taylor_kernels.studies.data import load_digits, minibatches
from taylor_kernels.studies.networks import DigitsCnn, DigitsPreActivation, DigitsReluNorm
from taylor_kernels.studies.oracle.correlation import coefficients
from taylor_kernels.studies.report import Section, Table, Text
from taylor_kernels.studies.training import Schedule
from taylor_kernels.studies.weights import trained_network
from taylor_kernels.tracing import trace

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
        oracle_batches: minibatches in which filters are removed in train mode.
    """

    epochs: int = 3
    oracle_batches: int = 15
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
    few = batches[: recipe.oracle_batches]
    in_eval = scores(model.eval(), "oracle", [(data.images, data.labels)], sites=True)
    in_train = oracle_in_train_mode(model.train(), few)
    # Filters that share a gate are one.
    _, once = np.unique(in_eval, return_index=True)

    def spearman(values: np.ndarray, oracle: np.ndarray) -> float:
        return coefficients(values[once], oracle[once])["spearman"]

    found = {}
    for criterion in CRITERIA:
        trained = scores(model.train(), criterion, few, sites=True)
        without = scores(model.train(), criterion, few, sites=False)
        evaluated = scores(model.eval(), criterion, batches, sites=True)
        found[criterion] = {
            "train": spearman(trained, in_train),
            "without": spearman(without, in_train),
            "eval": spearman(evaluated, in_eval),
            "train, oracle in eval": spearman(trained, in_eval),
        }
    return found


def oracle_in_train_mode(model: nn.Module, batches: Batches) -> np.ndarray:
    """[F] over all convolutions: the mean over minibatches of the squared change of the loss when
    a filter is not there, in train mode; the model is as it was."""
    layers: Layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sites = find_gate_sites(trace(model, batches[0][0][:1]), model, layers)
    gates = torch.cat([sites.layers[name] for name in layers])
    filters = [(name, i) for name, layer in layers.items() for i in range(filter_count(layer))]
    classes, place = np.unique(gates.numpy(), return_inverse=True)
    total = np.zeros(classes.size)
    meter = LossChange(model, layers, None, sites)
    try:
        with torch.no_grad():
            for x, y in batches:
                base = _loss(model, x, y)
                for number in range(classes.size):
                    with meter.removed([filters[int(np.argmax(place == number))]]):
                        total[number] += (_loss(model, x, y) - base).item() ** 2
    finally:
        meter.close()
        model.load_state_dict(before)
    return total[place] / len(batches)


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
            figures = [rho[key] for key in ("train", "without", "eval", "train, oracle in eval")]
            shown = ["no score" if r is None or np.isnan(r) else f"{r:.2f}" for r in figures]
            rows.append([one["network"], f"`{criterion}`", *shown])
    said = (
        "Networks as they are while they are pruned, trained for a few epochs. Spearman over the "
        "gates of all convolutions with an oracle in the same mode as the scores: in train mode "
        "over the same minibatches, squared in each; in eval mode over all examples. Without sites "
        "a gate stands directly behind its layer, where a later norm leaves it rounding noise: "
        "such layers have no score, and the coefficient is that of the others. The last column "
        "holds the scores of train mode against the oracle of eval mode: a norm in train mode "
        "takes out that a removed channel moves its mean and variance, which the oracle in eval "
        "mode sees, so the squared slope of a whole minibatch agrees less with it, where norms "
        "come directly behind their layers too."
    )
    columns = [
        "norm", "criterion", "train mode", "train mode, without sites", "eval mode",
        "train mode, oracle in eval mode",
    ]  # fmt: skip
    table = Table(columns, rows, numeric=(2, 3, 4, 5))
    return Section("Gates behind late norms", [Text(said), table])


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)
