"""What the methods' studies show: means over seeds, a table for a method and one over all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from taylor_kernels.studies.report import Table

if TYPE_CHECKING:
    from taylor_kernels.studies.methods.study import MethodStudy
    from taylor_kernels.studies.results import Json


def problems_of(result: Json) -> list[tuple[str, str]]:
    """The (network, data) pairs of a result, in its order."""
    return list(dict.fromkeys((run["network"], run["data"]) for run in result["runs"]))


def ways_of(result: Json) -> list[str]:
    return list(dict.fromkeys(run["way"] for run in result["runs"]))


def runs_of(result: Json, way: str, problem: tuple[str, str]) -> list[Json]:
    """The runs of one way on one problem, a seed each."""
    return [
        run
        for run in result["runs"]
        if run["way"] == way and (run["network"], run["data"]) == problem
    ]


def means(result: Json, way: str, key: str) -> Iterator[tuple[tuple[str, str], float]]:
    """(problem, mean over seeds) of each problem that the way was run on."""
    for problem in problems_of(result):
        runs = runs_of(result, way, problem)
        if runs:
            yield problem, mean(run[key] for run in runs)


def percent(values: Sequence[float]) -> str:
    """Their mean in percent, and their range where there are several."""
    each = [100 * value for value in values]
    extent = f" ({min(each):.1f}–{max(each):.1f})" if len(each) > 1 else ""
    return f"{mean(each):.1f}{extent}"


def accuracy_table(
    result: Json, more: Mapping[str, Callable[[Sequence[Json]], str]], caption: str = ""
) -> Table:
    """Accuracy of every way on every problem, and what `more` says of a way's runs."""
    rows = [
        [
            ", ".join(problem),
            way,
            percent([run["accuracy"] for run in runs]),
            *(words(runs) for words in more.values()),
        ]
        for problem in problems_of(result)
        for way in ways_of(result)
        if (runs := runs_of(result, way, problem))
    ]
    return Table(
        ["network, data", "way", "accuracy, %", *more],
        rows,
        caption,
        numeric=range(2, 3 + len(more)),
    )


def search_table(study: MethodStudy, result: Json) -> Table:
    """What each setting that was tried gave, on seeds that are not reported."""
    rows, seeds = [], set()
    runs = result["search"]["runs"]
    places = dict.fromkeys((run["network"], run["data"], run["way"]) for run in runs)
    for *problem, way in places:
        chosen = study.ways[way].settings_of(tuple(problem))
        found: dict[str, list[Json]] = {}
        for run in runs:
            if (run["network"], run["data"], run["way"]) == (*problem, way):
                found.setdefault(_in_words(run["tried"]), []).append(run)
                seeds.add(run["seed"])
        for words, each in found.items():
            taken = chosen | each[0]["tried"] == chosen
            accuracies = percent([run["accuracy"] for run in each])
            rows.append([", ".join(problem), way, words, accuracies, "chosen" if taken else ""])
    caption = f"Seeds {', '.join(map(str, sorted(seeds)))}, which no other table has."
    head = ["network, data", "way", "setting", "accuracy, %", ""]
    return Table(head, rows, caption, numeric=range(3, 4))


def _in_words(settings: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
    )


def summary_row(result: Json) -> list[str]:
    """A method's row of the table over all methods, made of its kept results."""
    summary = result["summary"]
    return [
        f"{result['method']} ({result['source']})",
        result["removes"],
        summary["accuracy"],
        summary["compression"],
        result.get("speed", {}).get("words", "–"),
        f"`{result['file']}`",
    ]


SUMMARY_HEAD = ["method", "removes", "accuracy, %", "compression", "measured speed", "source"]


def facts_of(study: MethodStudy) -> Json:
    """What the kept result says of the method."""
    return {key: getattr(study, key) for key in ("name", "method", "removes", "source", "file")}
