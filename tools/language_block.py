"""What the pages quote of `taylor-kernels language`: perplexities, speed, the first criterion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.markdown import table
from taylor_kernels.studies.language.findings import (
    FAMILIES,
    STAGES,
    better,
    bits,
    cells,
    in_percent,
    near,
    one_of_each,
    perplexity,
    remarks,
    sizes,
    unequal,
)
from taylor_kernels.studies.language.pages import method, perplexity_table, speed_table
from taylor_kernels.studies.oracle.tables import half_table
from taylor_kernels.studies.report import Table
from taylor_kernels.studies.results import Json

#: Relative to the repository; `cp runs/language/{result.json,language.png}` keeps them there.
LANGUAGE = Path("bench/results/language/result.json")
#: The criterion that is quoted of the study's networks.
_OF_IMAGES = "taylor_fo_bn"
#: A column of the study's table, for each of its networks.
_RESCORED = ": scored again at each step"


def language_block(result: Json) -> str:
    """Perplexity as pruned, and trained on."""
    parts = [_shown(perplexity_table(result, stage)) for stage in STAGES]
    machine = f"{result['machine']['cpu']}, {result['machine']['threads']} thread"
    source = f"Source: `{LANGUAGE.as_posix()}`, written by `{result['command']}`; {machine}."
    return "\n\n".join([*parts, source])


def language_speed_block(result: Json) -> str:
    return _shown(speed_table(result))


def language_method_block(result: Json) -> str:
    return method(result)


def language_findings(result: Json, study: Json) -> str:
    """Which criterion is first, here and of the study's networks on digits."""
    criteria = one_of_each(result["settings"]["criteria"])
    images = half_table(study)
    columns = [n for n, name in enumerate(images.columns) if name.endswith(_RESCORED)]
    shown = [
        f"{images.columns[n].removesuffix(_RESCORED)} "
        + ", ".join(
            f"`{row[0]}` {row[n]}%"
            for row in images.rows
            if row[0] in (_OF_IMAGES, "magnitude_l2", "random")
        )
        for n in columns
    ]
    taylor, magnitude, random = (criteria[family] for family in FAMILIES)
    every = cells(result)
    first = (
        f"On digits with half of the filters gone, scored again at each step without training, "
        f"accuracy is: {'; '.join(shown)}. Taylor scores come first there. Magnitude and "
        "random, not far from the 10% of a guess, have no order that could be looked for "
        f"elsewhere. The criteria differ too: `{_OF_IMAGES}` reads gates behind BatchNorm, which "
        f"this model has not; `{taylor}` reads weights and their gradients."
    )
    pairs = ((taylor, magnitude), (taylor, random), (random, magnitude))
    counts = [f"Here there are {len(every)} cells, of a kind and a fraction each."]
    counts += [f"{_counted(result, *pair)}." for pair in pairs]
    if sized := [cell for cell in every if unequal(result, *cell)]:
        counts.append(
            f"In {_named(sized)} the models are not of one size, so that a gap there is not of the "
            "criterion alone."
        )
    return "\n\n".join([first, " ".join(counts), "\n".join(f"- {r}" for r in remarks(result))])


def _counted(result: Json, one: str, other: str) -> str:
    """In how many cells the one criterion is better, and in which of them by chance perhaps."""
    every, said = cells(result), []
    for stage, words in STAGES.items():
        found = better(result, one, other, stage)
        doubtful = [cell for cell in found if near(result, *cell, one, other, stage)]
        notes = [] if found == every else [_named(found)]
        notes += [f"within the range of draws: {_named(doubtful)}"] if doubtful else []
        count = "all" if found == every else str(len(found))
        said.append(f"{count} {words}" + (f" ({'; '.join(notes)})" if notes else ""))
    return f"`{one}` is better than `{other}` in {' and in '.join(said)}"


def _named(found: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{kind} {fraction:.0%}" for kind, fraction in found)


def language_row(result: Json) -> tuple[str, str, str, Path]:
    """The README's row: all kinds together at the largest fraction."""
    settings, dense = result["settings"], result["dense"]
    fraction = settings["fractions"][-1]
    left = sizes(result, "all", fraction)
    compared = one_of_each(settings["criteria"]).values()
    pairs = [
        f"`{name}` "
        + " → ".join(perplexity(bits(result, "all", fraction, name, stage)) for stage in STAGES)
        + f" ({in_percent(left[name])})"
        for name in compared
    ]
    speed = result["speed"]["models"][f"all {fraction:g}"]
    every = in_percent([share for name in compared for share in left[name]])
    return (
        f"Perplexity of a byte, as pruned to {every} of the parameters → trained on",
        f"dense {perplexity(dense['bits'])} → {perplexity(dense['recovered'])}, "
        f"{', '.join(pairs)}; `{result['speed']['criterion']}` {speed['ratio']:.1f}× the tokens/s",
        f"[Llama of {dense['parameters'] / 1e6:.1f} M](docs/language.md), CPU, 1 thread",
        LANGUAGE,
    )


def _shown(made: Table) -> str:
    return "\n\n".join((table(made.columns, made.rows), made.caption))
