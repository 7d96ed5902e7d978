"""What the documentation quotes of the compression methods' studies, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

from bench.markdown import table
from bench.methods import KEPT, ROOT, STUDIES, find_study
from taylor_kernels.methods.frame import FRAMES, Frame
from taylor_kernels.methods.pruning_at_init import CRITERIA
from taylor_kernels.studies.methods.pages import SUMMARY_HEAD, search_table, summary_row
from taylor_kernels.studies.results import Json


def kept_results() -> dict[str, Json]:
    """Name of each study that has runs -> what is kept of it."""
    found = {file.stem: json.loads(file.read_text()) for file in (ROOT / KEPT).glob("*.json")}
    return {name: found[name] for name in sorted(found) if found[name]["runs"]}


def methods_table() -> str:
    """A row for each method."""
    rows = [summary_row(result) for result in kept_results().values()]
    return table(SUMMARY_HEAD, rows)


def study_block(name: str, more: str = "") -> str:
    """A method's own table, or a further one, with its caption and source."""
    if name not in (kept := kept_results()):
        return f"Not measured yet: `python -m bench.methods {name}` does it."
    result, study = kept[name], find_study(name)
    made = study.more[more](result) if more else study.table(result)
    source = _source(name, " --speed" if more == "speed" else "")
    return "\n\n".join((table(made.columns, made.rows), f"{made.caption} {source}".strip()))


def search_block(name: str) -> str:
    """What was tried before a study's settings were chosen."""
    result, study = kept_results().get(name, {}), find_study(name)
    if "search" not in result:
        return f"Not tried yet: `python -m bench.methods {name} --search` does it."
    made = search_table(study, result)
    source = _source(name, " --search")
    return "\n\n".join((table(made.columns, made.rows), f"{made.caption} {source}"))


def _source(name: str, more: str = "") -> str:
    """The command that makes all of it; the file has the last one, which may have made a part."""
    kept = (KEPT / name).as_posix()
    return f"Source: `{kept}.json`, written by `python -m bench.methods {name}{more}`."


def criteria_at_init() -> str:
    """A row for each criterion of new networks."""
    rows = [
        [f"`{one.name}`", one.formula.replace("|", "\\|"), one.source, str(one.rounds)]
        for one in CRITERIA.values()
    ]
    return table(["criterion", "score of a weight", "from", "rounds"], rows)


def frames_table() -> str:
    """A row for each named setting of the frame."""
    rows = [
        [
            f"{frame.name} ({frame.source})",
            {"start": "0", "end": "K"}[frame.mask_from],
            {"start": "0", "early": "early", "end": "K"}[frame.weights_from],
            f"`{frame.criterion}`",
            frame.granularity,
            frame.scope,
            _schedule(frame),
        ]
        for frame in FRAMES.values()
    ]
    head = ["method", "kM", "kW", "criterion", "granularity", "scope", "schedule"]
    return table(head, rows)


def _schedule(frame: Frame) -> str:
    if frame.times > 1:
        return f"trained and cut {frame.times} times"
    return f"{frame.rounds} rounds" if frame.rounds > 1 else "one shot"


def method_blocks() -> dict[str, Callable[[], str]]:
    """`method-<study>` for each study, `-<name>` behind that for a further table, and the tables of
    settings."""
    found: dict[str, Callable[[], str]] = {"at-init": criteria_at_init, "frames": frames_table}
    for name in STUDIES:
        block = f"method-{name.replace('_', '-')}"
        found[block] = partial(study_block, name)
        if find_study(name).searches:
            found[f"{block}-search"] = partial(search_block, name)
        for more in find_study(name).more:
            found[f"{block}-{more}"] = partial(study_block, name, more)
    return found
