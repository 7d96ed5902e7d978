"""What a result confirms and what it contradicts, in sentences.

Everything is computed from the result, so no sentence outlives the figures that it is about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from taylor_kernels.studies.oracle.findings import UNSCALED, accuracy_at, groups, mean, values

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json

_PAPER = 0.93  # Molchanov et al. 2019, abstract: "correlation of > 93%"
_POINT = 0.01  # of accuracy: less is no difference
_CLEARLY = 0.05  # of a coefficient


def remarks(result: Json) -> Iterator[str]:
    """Paragraphs on what the figures confirm and what they contradict, architecture by
    architecture; each is left out where its criteria were not compared."""
    for name, networks in groups(result).items():
        for remark in (
            _paper_figure,
            _second_order,
            _curvature_alone,
            _row_sums,
            _weights_or_gates,
            _joint,
            _norms,
            _control,
            _one_shot,
            _order_of_the_oracle,
            _after_training,
        ):
            if text := remark(networks):
                yield f"**{name}.** {text}"


def _spearmans(networks: Sequence[Json], *criteria: str) -> list[float]:
    """The mean rank correlation of each criterion; none at all if one was not compared."""
    found = [values(networks, name, "spearman") for name in criteria]
    return [mean(one) for one in found] if all(found) else []


def _verdict(confirmed: bool) -> str:
    return "Confirmed" if confirmed else "Contradicted"


def _paper_figure(networks: Sequence[Json]) -> str:
    pearson = values(networks, "taylor_fo_bn", "pearson")
    if not pearson:
        return ""
    top = mean([network["oracle"]["top_share"] for network in networks])
    (spearman,) = _spearmans(networks, "taylor_fo_bn")
    return (
        f"{_verdict(mean(pearson) >= _PAPER)}: a correlation above {_PAPER} between first order "
        f"and the oracle, if Pearson's is meant: `taylor_fo_bn` has {mean(pearson):.2f}. Its rank "
        f"correlation is {spearman:.3f}. Pearson's coefficient is decided by few filters here: a "
        f"twentieth of them have {top:.0%} of the sum of all squared changes of the loss."
    )


def _second_order(networks: Sequence[Json]) -> str:
    found = _spearmans(networks, "taylor_fo_bn", "taylor_so_diag")
    if not found:
        return ""
    first, second = found
    pearson = [
        mean(values(networks, name, "pearson")) for name in ("taylor_fo_bn", "taylor_so_diag")
    ]
    return (
        f"{_verdict(second > first)}: the second-order term adds to the first. "
        f"Spearman {first:.3f} → {second:.3f}, Pearson {pearson[0]:.2f} → {pearson[1]:.2f}."
    )


def _curvature_alone(networks: Sequence[Json]) -> str:
    found = _spearmans(networks, "taylor_fo_bn", "obd_bn", "taylor_so_diag")
    if not found or found[1] <= found[0]:
        return ""
    first, bend, both = found
    beats = "as well as both together" if bend >= both else "nearly as well"
    return (
        "Contradicted: that curvature is a correction to the slope. In a trained network the "
        f"slope is what is small: `obd_bn`, curvature alone, ranks {beats} "
        f"({bend:.3f} against {both:.3f}) and better than the slope alone ({first:.3f})."
    )


def _row_sums(networks: Sequence[Json]) -> str:
    found = _spearmans(networks, "taylor_so_bn", "taylor_fo_bn")
    if not found or found[0] >= found[1]:
        return ""
    rows, first = found
    return (
        "Contradicted: that a Hessian-vector product over all gates, whose rows hold the "
        "interactions of all filters, is the better second order for removing one filter: "
        f"`taylor_so_bn` has {rows:.3f}, less than first order ({first:.3f}). One "
        "filter's removal moves along the diagonal alone."
    )


def _weights_or_gates(networks: Sequence[Json]) -> str:
    found = _spearmans(networks, "taylor_fo", "taylor_fo_bn")
    if not found:
        return ""
    weights, gate = found
    return (
        f"{_verdict(gate > weights)}: a gate behind BatchNorm is the better place "
        f"than the weights before it ({gate:.3f} against {weights:.3f} of `taylor_fo`)."
    )


def _joint(networks: Sequence[Json]) -> str:
    found = _spearmans(networks, "taylor_fo_joint")
    if not found:
        return ""
    return (
        f"`taylor_fo_joint`, (Σ g·w)² before the BatchNorm, has {found[0]:.2f}: the networks "
        "are in eval mode. In train mode BatchNorm makes the loss indifferent to the scale of a "
        "filter, and that sum is 0 but for rounding."
    )


def _norms(networks: Sequence[Json]) -> str:
    parts, risen = [], []
    first = values(networks, "taylor_fo_bn", "spearman")
    most = -1.0
    for name in ("magnitude_l1", "magnitude_l2", "bn_scale"):
        plain = values(networks, UNSCALED.format(name), "spearman")
        seen, inside = (values(networks, name, "spearman", scope) for scope in ("all", "within"))
        if seen and inside:
            found = f"{mean(seen):.2f} over all layers, {mean(inside):.2f} within one"
            found += f", unscaled {mean(plain):.2f} over all" if plain else ""
            parts.append(f"`{name}` {found}")
            most = max(most, mean(seen), mean(plain) if plain else -1.0)
            if plain and mean(plain) > mean(seen) + _CLEARLY:
                risen.append(f"`{name}`")
    if not parts:
        return ""
    less = " know less" if first and mean(first) > most else ""
    text = (
        f"Norms{less}: {'; '.join(parts)}. Those of weights are taken relative to their layer's "
        "mean, as `tk.Pruner` ranks them; unscaled means as they are."
    )
    if risen:
        text += (
            " Contradicted: that the scale of a layer says nothing of its worth. Dividing it out "
            f"takes {', '.join(risen)} further from the oracle."
        )
    return text


def _control(networks: Sequence[Json]) -> str:
    draws = [abs(d) for n in networks for d in n["criteria"].get("random", {}).get("draws", [])]
    if not draws:
        return ""
    return (
        f"`random` is the mean of {len(draws) // len(networks)} draws for each network "
        f"({mean(values(networks, 'random', 'spearman')):.3f}). A single draw's coefficient is "
        f"{mean(draws):.2f} on average, whatever its sign, and {max(draws):.2f} at most: no figure "
        "of this size means anything."
    )


def _one_shot(networks: Sequence[Json]) -> str:
    once = accuracy_at(networks, "oracle", "one_shot", 0.5)
    if not once:
        return ""
    stepwise = accuracy_at(networks, "oracle", "rescored", 0.5)
    others = [
        f"`{name}` {mean(seen):.0%}"
        for name in ("taylor_fo_bn", "taylor_so_diag", "magnitude_l2", "random")
        if (seen := accuracy_at(networks, name, "one_shot", 0.5))
    ]
    again = f", and {mean(stepwise):.0%} when it is asked again at every step" if stepwise else ""
    text = (
        f"Half of the filters removed in one shot: the oracle's own order leaves {mean(once):.0%} "
        f"accuracy{again} ({', '.join(others)} in one shot)."
    )
    if stepwise and mean(stepwise) > mean(once) + _POINT:
        text += (
            " Contradicted: that what single filters are worth adds up. The worth of a filter "
            "grows as its neighbours go, whole layers are emptied, and no ranking made beforehand "
            "can know."
        )
    control = accuracy_at(networks, "random", "one_shot", 0.5)
    if control and mean(once) < mean(control) + 10 * _POINT:
        text += " A one-shot curve at such a fraction does not tell criteria apart."
    return text


def _order_of_the_oracle(networks: Sequence[Json]) -> str:
    oracle = accuracy_at(networks, "oracle", "rescored", 0.5)
    if not oracle:
        return ""
    found = {
        name: accuracy_at(networks, name, "rescored", 0.5)
        for name in ("taylor_fo_bn", "taylor_so_diag", "obd_bn")
    }
    better = [
        f"`{name}` {mean(seen):.0%}"
        for name, seen in found.items()
        if seen and mean(seen) > mean(oracle) + _POINT
    ]
    if not better:
        return ""
    return (
        "Contradicted: that the oracle's order bounds all others. Asked again at every step, it "
        f"leaves {mean(oracle):.0%} at half the filters; {', '.join(better)}. It is greedy: it "
        "takes the filter that costs least now."
    )


def _after_training(networks: Sequence[Json]) -> str:
    fractions = [step / 20 for step in range(1, 19)]
    overtaken = [
        fraction
        for fraction in fractions
        if (ours := accuracy_at(networks, "taylor_fo_bn", "finetuned", fraction))
        and (control := accuracy_at(networks, "random", "finetuned", fraction))
        and mean(control) > mean(ours) + _POINT
    ]
    half, control = (
        accuracy_at(networks, name, "finetuned", 0.5) for name in ("taylor_fo_bn", "random")
    )
    if not (half and control):
        return ""
    text = (
        f"With training between steps and half of the filters gone, the accuracy is "
        f"{mean(control):.1%} if they are random ones, with `taylor_fo_bn` {mean(half):.1%}."
    )
    if mean(half) - mean(control) < 2 * _POINT:
        text += " Training makes up for the choice; what a criterion is worth shows without it."
    if overtaken:
        where = ", ".join(f"{fraction:.0%}" for fraction in overtaken)
        text += (
            f" Contradicted: that a better score is always the better pruning. With {where} of the "
            "filters removed, random ones leave more. A ranking over all layers takes far more of "
            "one layer than of another, a random one thins all alike."
        )
    return text
