"""What sampling the curvature of gates trades: agreement with the oracle against cost.

    python -m bench.sampling_study          # writes bench/results/study/sampling.json

Networks, data and oracle are those of the correlation study (bench/study.py); what a run of that
has finished is taken from it. Costs are measured in turns with a plain step, of ResNet-18 too.
`python -m tools.docs_blocks` puts the table into the documentation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.models import resnet18
from taylor_kernels.criteria import Criterion, get_criterion, register_criterion
from taylor_kernels.statistics import GateCurvature, register_statistic
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.oracle.correlation import agreement
from taylor_kernels.studies.oracle.digits import digits_problem
from taylor_kernels.studies.oracle.measure import identity
from taylor_kernels.studies.oracle.oracle import loss_changes
from taylor_kernels.studies.oracle.problem import Problem, inner_layers
from taylor_kernels.studies.oracle.scores import score, timings
from taylor_kernels.studies.oracle.settings import FULL
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.results import Json, circumstances, readable, rounded

ROOT = Path(__file__).resolve().parent.parent
KEPT = Path("bench/results/study/sampling.json")
FIRST_ORDER, EXACT = "taylor_fo_bn", "taylor_so_diag_exact"
#: Further passes than the one of `taylor_so_diag`.
PASSES = (2, 3)
COEFFICIENTS = ("spearman", "pearson", "kendall")
#: Networks of which only the cost is measured: classes, side of the images, examples.
LARGE = {"ResNet-18, 32², 10 classes": (10, 32, 32), "ResNet-18, 224², 1,000": (1000, 224, 4)}
ROUNDS = 8
SECONDS = 60.0


def with_passes(number: int) -> str:
    """The name of `taylor_so_diag` with so many passes, which is made known."""
    name = f"taylor_so_diag, {number} passes"
    statistic = type(f"Passes{number}", (GateCurvature,), {"name": name, "passes": number})
    register_statistic(statistic)
    register_criterion(Criterion(name, name, get_criterion("taylor_so_diag").score))
    return name


def of_digits(
    architecture: str, names: Sequence[str], cache: Cache, log: ProgressLog
) -> dict[str, Json]:
    """Criterion -> mean coefficients over all layers, and the cost on the first seed's network."""
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    costs: dict[str, Json] = {}
    for seed in range(FULL.seeds):
        device = torch.device("cpu")
        problem, _ = digits_problem(architecture, seed, FULL.schedule, device, cache, log)
        changes = loss_changes(problem, problem.filters, identity(problem), cache, log)
        truth = np.array([changes[one] for one in problem.filters]) ** 2
        layers = np.array([layer for layer, _ in problem.filters])
        for name in names:
            seen = agreement(score(problem, name)[None], truth, layers)["all"]
            found[name].append([seen[one] for one in COEFFICIENTS])
        costs = costs or timings(problem, names, log, rounds=ROUNDS, seconds=SECONDS)
    return {
        name: dict(zip(COEFFICIENTS, np.mean(seen, 0).tolist(), strict=True))
        | {"least_spearman": min(one[0] for one in seen), "ratio": costs[name]["ratio"]}
        for name, seen in found.items()
    }


def of_large(name: str, names: Sequence[str], log: ProgressLog) -> dict[str, Json]:
    """Criterion -> its cost, on a network with random weights."""
    classes, side, examples = LARGE[name]
    torch.manual_seed(0)
    model = resnet18()
    model.classifier = nn.Linear(model.classifier.in_features, classes)
    model.eval()
    batch = (torch.randn(examples, 3, side, side), torch.randint(0, classes, (examples,)))
    layers, _ = inner_layers(model, batch[0])
    problem = Problem(name, model, layers, [batch], [batch], [batch], F.cross_entropy, True)
    costs = timings(problem, names, log, rounds=ROUNDS, seconds=SECONDS)
    return {name: {"ratio": costs[name]["ratio"]} for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("runs/compare/cache"))
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    torch.set_num_threads(FULL.threads)
    log, cache = ProgressLog(), Cache(options.cache)
    sampled = [FIRST_ORDER, "taylor_so_diag", *map(with_passes, PASSES)]
    networks = {name: of_digits(name, [*sampled, EXACT], cache, log) for name in FULL.architectures}
    for name, (classes, _, _) in LARGE.items():
        networks[name] = of_large(name, [*sampled, EXACT] if classes <= 32 else sampled, log)
    result = {"schema": 1, "networks": rounded(networks)} | circumstances(
        "python -m bench.sampling_study",
        torch.device("cpu"),
        FULL.threads,
        time.perf_counter() - start,
    )
    (ROOT / KEPT).write_text(readable(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
