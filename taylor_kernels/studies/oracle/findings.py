"""What a result says: figures per architecture, and which targets they reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json

#: (criterion, least Spearman over all layers), a mean over seeds, for each architecture.
SPEARMAN_TARGETS = (("taylor_fo_bn", 0.95), ("taylor_so_diag", 0.98))
#: (criterion, least Spearman) in train mode, of these networks of `late_norms.NETWORKS`.
LATE_NORM_TARGET = ("taylor_fo_bn", 0.9)
LATE_NORM_NETWORKS = ("convolution, ReLU, norm", "pre-activation")
MOST_RANDOM = 0.1
#: A norm as it is, beside the norm relative to its layer's mean, which goes by its plain name.
UNSCALED = "{}, unscaled"
_SAME = 0.01  # of the filters: whole filters do not meet a fraction exactly


@dataclass(frozen=True)
class Target:
    """A figure that the study must reach.

    Attributes:
        what: with the architecture.
        limit, measured: as they are to be read.
    """

    what: str
    limit: str
    measured: str
    reached: bool

    def row(self) -> list[str]:
        return [self.what, self.limit, self.measured, "reached" if self.reached else "MISSED"]


def groups(result: Json) -> dict[str, list[Json]]:
    """Architecture -> its networks, a seed each."""
    found: dict[str, list[Json]] = {}
    for network in result["networks"]:
        found.setdefault(network["architecture"], []).append(network)
    return found


def criteria(networks: Sequence[Json]) -> list[str]:
    """The criteria that all networks have figures of, the best by rank correlation first."""
    names = [name for name, one in networks[0]["criteria"].items() if "all" in one]
    known = [name for name in names if values(networks, name, "spearman")]
    known.sort(key=lambda name: -mean(values(networks, name, "spearman")))
    return known + [name for name in names if name not in known]


def values(
    networks: Sequence[Json], criterion: str, statistic: str, scope: str = "all"
) -> list[float]:
    """A coefficient of each network that has it."""
    found = [
        network["criteria"][criterion][scope][statistic]
        for network in networks
        if "all" in network["criteria"].get(criterion, {})
    ]
    return [value for value in found if value is not None]


def accuracy_at(
    networks: Sequence[Json], criterion: str, kind: str, fraction: float
) -> list[float]:
    """Accuracy of each network with that fraction of its filters removed, on one kind of curve."""
    found = []
    for network in networks:
        total = sum(network["widths"].values())
        points = network["criteria"].get(criterion, {}).get(kind) or []
        same = max(_SAME, 0.51 / total)
        near = [
            p for p in points if abs(p["removed"] / total - fraction) < same and "accuracy" in p
        ]
        if near:
            best = min(near, key=lambda point: abs(point["removed"] / total - fraction))
            found.append(best["accuracy"])
    return found


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def targets(result: Json) -> list[Target]:
    """The targets of the study on digits; those whose criteria were not compared are left out."""
    found = []
    for name, networks in groups(result).items():
        for criterion, least in SPEARMAN_TARGETS:
            if seen := values(networks, criterion, "spearman"):
                found.append(
                    Target(
                        f"{name}: Spearman of {criterion}, all layers",
                        f"≥ {least}",
                        _spread(seen),
                        mean(seen) >= least,
                    )
                )
        if seen := values(networks, "random", "spearman"):
            found.append(
                Target(
                    f"{name}: Spearman of random, mean of draws and seeds",
                    f"|ρ| ≤ {MOST_RANDOM}",
                    _spread(seen),
                    abs(mean(seen)) <= MOST_RANDOM,
                )
            )
        # The better of both ways to rank magnitudes over layers, or the bar would be ours to lower.
        ways = {"magnitude_l2": "magnitude_l2", UNSCALED.format("magnitude_l2"): "l2, unscaled"}
        floors = {one: accuracy_at(networks, one, "rescored", 0.5) for one in ways}
        best = max(ways, key=lambda one: mean(floors[one]) if floors[one] else -1.0)
        floor = floors[best]
        for criterion, _ in SPEARMAN_TARGETS:
            if floor and (seen := accuracy_at(networks, criterion, "rescored", 0.5)):
                found.append(
                    Target(
                        f"{name}: accuracy at half, re-scored, {criterion}",
                        f"> {mean(floor):.1%} ({ways[best]})",
                        f"{mean(seen):.1%}",
                        mean(seen) > mean(floor),
                    )
                )
    return found + _late_norm_targets(result.get("late_norms", ()))


def _late_norm_targets(networks: Sequence[Json]) -> list[Target]:
    criterion, least = LATE_NORM_TARGET
    found = []
    for network in networks:
        if network["network"] not in LATE_NORM_NETWORKS:
            continue
        rho = network["criteria"][criterion]["train"]
        known = rho is not None and not math.isnan(rho)
        found.append(
            Target(
                f"{network['network']}, train mode: Spearman of {criterion}",
                f"≥ {least}",
                f"{rho:.3f}" if known else "no score",
                known and rho >= least,
            )
        )
    return found


def _spread(numbers: Sequence[float]) -> str:
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    return f"{mean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"
