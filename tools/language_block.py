"""What the pages quote of `taylor-kernels language`: perplexities, speed, the order of criteria."""

from __future__ import annotations

from pathlib import Path

from bench.markdown import table
from taylor_kernels.studies.language.findings import (
    STAGES,
    bits,
    differences,
    one_of_each,
    perplexity,
    remarks,
)
from taylor_kernels.studies.language.pages import (
    method,
    perplexity_table,
    shares,
    speed_table,
)
from taylor_kernels.studies.oracle.tables import half_table
from taylor_kernels.studies.report import Table
from taylor_kernels.studies.results import Json

#: Relative to the repository; `cp runs/language/{result.json,language.png}` keeps them there.
LANGUAGE = Path("bench/results/language/result.json")
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
    """The order of criteria, beside that of the study's networks on digits."""
    criteria = list(one_of_each(result["settings"]["criteria"]).values())
    images = half_table(study)
    columns = [n for n, name in enumerate(images.columns) if name.endswith(_RESCORED)]
    shown = [
        f"{images.columns[n].removesuffix(_RESCORED)} "
        + ", ".join(
            f"`{row[0]}` {row[n]}%"
            for row in images.rows
            if row[0] in ("taylor_fo_bn", "magnitude_l2", "random")
        )
        for n in columns
    ]
    total = len(result["settings"]["kinds"]) * len(result["settings"]["fractions"])
    counts = []
    for stage, words in STAGES.items():
        found = differences(result, stage)
        where = ", ".join(f"{kind} {fraction:.0%}" for kind, fraction in found)
        counts.append(f"{words} in {len(found)} of {total}" + (f" ({where})" if found else ""))
    both = ", ".join(f"`{name}`" for name in criteria)
    first = (
        "On digits with half of the filters gone, scored again at each step without training, "
        f"accuracy is: {'; '.join(shown)}. Taylor comes first; magnitude and random are near "
        f"chance. Of the language model two of {both} stand the other way round: "
        f"{'; '.join(counts)}. Models of one row differ in size (see the tables)."
    )
    return "\n\n".join([first, "\n".join(f"- {one}" for one in remarks(result))])


def language_row(result: Json) -> tuple[str, str, str, Path]:
    """The README's row: all kinds together at the largest fraction."""
    settings, dense = result["settings"], result["dense"]
    fraction = settings["fractions"][-1]
    pairs = [
        f"`{name}` "
        + " → ".join(perplexity(bits(result, "all", fraction, name, stage)) for stage in STAGES)
        for name in one_of_each(settings["criteria"]).values()
    ]
    speed = result["speed"]["models"][f"all {fraction:g}"]
    sizes = [100 * share for share in shares(result, "all", fraction)]
    left = f"{min(sizes):.0f}–{max(sizes):.0f}%"
    return (
        f"Perplexity of a byte, as pruned to {left} of the parameters → trained on",
        f"dense {perplexity(dense['bits'])} → {perplexity(dense['recovered'])}, "
        f"{', '.join(pairs)}; {speed['ratio']:.1f}× the tokens/s",
        f"[Llama of {dense['parameters'] / 1e6:.1f} M](docs/language.md), CPU, 1 thread",
        LANGUAGE,
    )


def _shown(made: Table) -> str:
    return "\n\n".join((table(made.columns, made.rows), made.caption))
