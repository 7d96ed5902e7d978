"""What README.md and docs/ hold between <!-- name:begin --> and <!-- name:end -->, made anew.

    python -m tools.docs_blocks            # rewrites the pages that differ
    python -m tools.docs_blocks --check    # exits with 1 if one does

`python -m bench` and `python -m bench.study` keep their results themselves. Those of `make demo`
and `taylor-kernels language` are kept by copying result.json, and language.png, from runs/demo and
runs/language to bench/results/. Then this.

Tables of criteria and statistics come from the package's own registries, figures from
bench/results, the example from examples/. A test compares all of them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench import report
from bench.figures import Results, load
from bench.markdown import table
from taylor_kernels import criteria
from taylor_kernels.statistics import statistics_table
from taylor_kernels.studies.oracle import findings
from taylor_kernels.studies.oracle.remarks import remarks
from tools.door_blocks import (
    DOORS,
    FIGURES,
    continual_block,
    doors_table,
    figures_block,
    overhead_block,
)
from tools.issue_slots_block import BEFORE, NOW, issue_slots_block
from tools.language_block import (
    LANGUAGE,
    language_block,
    language_findings,
    language_method_block,
    language_row,
    language_speed_block,
)
from tools.method_blocks import method_blocks, methods_table
from tools.ranks_block import RANKS, ranks_block
from tools.result_blocks import (
    SAMPLING,
    bench_block,
    demo_block,
    headline_block,
    late_norms_block,
    sampling_block,
    study_block,
)
from tools.step_block import STEP, step_block
from tools.stream_block import STREAM, stream_block
from tools.zoo_block import PUBLISHED, ZOO, published_block, zoo_block

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = Path("examples/prune_digits.py")
STUDY = Path("bench/results/study/result.json")
DEMO = Path("bench/results/demo/result.json")
CPU = Path("bench/results/cpu/latest.json")
#: The criteria that the README names.
FIVE = ("taylor_fo_bn", "taylor_fo_gate", "taylor_so_diag", "obd_fisher", "magnitude_l2")
MARKED = re.compile(r"<!-- ([a-z0-9-]+):begin -->\n(.*?)<!-- \1:end -->", re.DOTALL)


def escaped(cells: Iterable[str]) -> list[str]:
    """Cells that a | does not end."""
    return [cell.replace("|", "\\|") for cell in cells]


def plain_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of words, which are aligned to the left."""
    lines = [head, [":--"] * len(head), *map(escaped, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def example(path: Path = EXAMPLE) -> str:
    """An example as a reader would paste it."""
    code = (ROOT / path).read_text().split('"""\n\n', 1)[1]
    return f"```python\n{code}```"


def criteria_table() -> str:
    """Every criterion that the package registers."""
    rows = [
        [f"`{one.name}`", one.formula, one.needs, one.reference]
        for one in map(criteria.get_criterion, criteria.criterion_names())
    ]
    return plain_table(["criterion", "score of a filter", "needs", "from"], rows)


def five_criteria() -> str:
    """A few of them, without where they come from."""
    rows = [[f"`{one.name}`", one.formula, one.needs] for one in map(criteria.get_criterion, FIVE)]
    return plain_table(["criterion", "score of a filter", "needs"], rows)


@cache
def study() -> dict[str, Any]:
    return json.loads((ROOT / STUDY).read_text())


@cache
def demo() -> dict[str, Any]:
    return json.loads((ROOT / DEMO).read_text())


@cache
def language() -> dict[str, Any]:
    return json.loads((ROOT / LANGUAGE).read_text())


@cache
def bench_results(path: Path) -> Results:
    results = load(ROOT / path)
    results.path = path  # as it is quoted
    return results


def cpu() -> Results:
    return bench_results(CPU)


def study_findings() -> str:
    """A list for each architecture, under its name."""
    lists: dict[str, list[str]] = {}
    for remark in remarks(study()):
        name, text = re.fullmatch(r"\*\*(.+?)\.\*\* (.*)", remark, re.DOTALL).groups()
        lists.setdefault(name, []).append(f"- {text}")
    return "\n\n".join(f"### {name}\n\n" + "\n".join(found) for name, found in lists.items())


def study_targets() -> str:
    rows = [escaped(target.row()) for target in findings.targets(study())]
    return table(["target", "limit", "measured: mean (range of seeds)", ""], rows)


def bench_targets() -> str:
    rows = [target.row() for target in report.all_targets(cpu())]
    return table(["target", "limit", "measured", ""], rows)


def results() -> str:
    """The README's rows: what, how much, measured on what, and the file it stands in."""
    rows = [
        [what, figure, where, f"`{source.as_posix()}`"] for what, figure, where, source in _rows()
    ]
    return plain_table(["what", "measured", "on", "source"], rows)


def _rows() -> Iterator[tuple[str, str, str, Path]]:
    groups = findings.groups(study())
    agreement = "; ".join(
        f"{name} "
        + ", ".join(f"{findings.mean(findings.values(networks, c, 'spearman')):.3f}" for c in _TWO)
        for name, networks in groups.items()
    )
    yield (
        "Rank correlation with really removing each filter: " + ", ".join(f"`{c}`" for c in _TWO),
        agreement,
        "networks on digits, 3 seeds",
        STUDY,
    )
    accuracies = [
        f"`{name}` {100 * findings.mean(values):.1f}%" for name, values in _as_pruned(demo())
    ]
    yield (
        "Accuracy as pruned to half the FLOPs, before fine-tuning; afterwards all end close",
        ", ".join(accuracies),
        "ResNet on digits, 3 seeds",
        DEMO,
    )
    yield language_row(language())


_TWO = ("taylor_fo_bn", "taylor_so_diag")


def _as_pruned(result: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    for name in result["settings"]["criteria"]:
        runs = [run for run in result["runs"] if run["criterion"] == name]
        yield name, [run["accuracy_before_finetuning"] for run in runs]


_STEP = ROOT / STEP
BLOCKS: dict[str, Callable[[], str]] = {
    "bench": lambda: bench_block(cpu()),
    "bench-targets": bench_targets,
    "continual": continual_block,
    "criteria": criteria_table,
    "demo": lambda: demo_block(demo()),
    "doors": doors_table,
    "example": example,
    "findings": study_findings,
    "five-criteria": five_criteria,
    "headline": lambda: headline_block(cpu()),
    "issue-slots": lambda: issue_slots_block(
        *(json.loads((ROOT / path).read_text()) for path in (BEFORE, NOW))
    ),
    "language": lambda: language_block(language()),
    "language-findings": lambda: language_findings(language(), study()),
    "language-method": lambda: language_method_block(language()),
    "language-speed": lambda: language_speed_block(language()),
    "late-norms": lambda: late_norms_block(study()),
    "methods": methods_table,
    "ranks": lambda: ranks_block(json.loads((ROOT / RANKS).read_text())),
    "results": results,
    "sampling": lambda: sampling_block(json.loads((ROOT / SAMPLING).read_text())),
    "statistics": statistics_table,
    # Without a result there is nothing to quote, so no page can have it.
    **({"step": lambda: step_block(json.loads(_STEP.read_text()))} if _STEP.exists() else {}),
    "stream": lambda: stream_block(json.loads((ROOT / STREAM).read_text())),
    "study": lambda: study_block(study()),
    "study-targets": study_targets,
    "zoo": lambda: zoo_block(json.loads((ROOT / ZOO).read_text())),
    "published": lambda: published_block(json.loads((ROOT / PUBLISHED).read_text())),
    **method_blocks(),
}
for _path in sorted((ROOT / "examples").glob("trainer_*.py")):
    BLOCKS[_path.stem.replace("_", "-")] = partial(example, _path.relative_to(ROOT))
for _door in DOORS:
    _example = Path("examples") / f"{_door.example}.py"
    BLOCKS[f"door-example-{_door.slug}"] = partial(example, _example)
    BLOCKS[f"door-figures-{_door.slug}"] = partial(FIGURES.get(_door.name, figures_block), _door)
    BLOCKS[f"{_door.slug}-overhead"] = partial(overhead_block, _door)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """The page's text with every block as it is to be.

    Raises:
        ValueError: markers that do not pair, or that name no block.
    """
    found = MARKED.findall(text)
    markers = re.findall(r"<!-- [a-z0-9-]+:(?:begin|end) -->", text)
    if len(markers) != 2 * len(found):
        raise ValueError(f"markers do not pair: {', '.join(markers)}")
    if unknown := [name for name, _ in found if name not in BLOCKS]:
        raise ValueError(f"no such block: {', '.join(unknown)}; there are {', '.join(BLOCKS)}")
    return MARKED.sub(
        lambda m: f"<!-- {m[1]}:begin -->\n{BLOCKS[m[1]]()}\n<!-- {m[1]}:end -->", text
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    options = parser.parse_args(arguments)
    stale = []
    for page in pages():
        text = page.read_text()
        new = filled(text)
        if new != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not options.check:
                page.write_text(new)
    for name in stale:
        print(f"{name}: {'differs' if options.check else 'rewritten'}", file=sys.stderr)
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
