"""A compression method's study: accuracy on small problems beside its baselines, and its speed.

    python -m bench.methods gsm            # runs it, or goes on; writes bench/results/methods/
    python -m bench.methods gsm --speed    # measures its kernels alone, keeps the rest
    python -m bench.methods gsm --search   # tries its settings on seeds that are not reported

A study is a module of taylor_kernels/studies/methods/ with a `STUDY`; its speed is measured by that
or by bench/speed_<name>.py. Runs are kept in
runs/methods/cache as they finish. `python -m tools.docs_blocks` puts tables into the documentation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.methods.pages import facts_of, search_table
from taylor_kernels.studies.methods.study import THREADS, MethodStudy, run, search
from taylor_kernels.studies.plotting import draw
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.report import print_table
from taylor_kernels.studies.results import Json, circumstances, readable, rounded

ROOT = Path(__file__).resolve().parent.parent
KEPT = Path("bench/results/methods")
#: Every study.
STUDIES = ("adaptive", "at_init", "filter_gsm", "gsm", "mirror", "spp")


def find_study(name: str) -> MethodStudy:
    return import_module(f"taylor_kernels.studies.methods.{name}").STUDY


def find_speed(name: str) -> Callable[[], Json] | None:
    """What bench/speed_<name>.py measures, if there is one."""
    if find_spec(f"bench.speed_{name}") is None:
        return None
    return import_module(f"bench.speed_{name}").measure


def keep(study: MethodStudy, found: Json) -> Json:
    """Add to what is kept of a study, and draw its plot anew."""
    file = ROOT / KEPT / f"{study.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(file.read_text()) if file.exists() else {"schema": 1, "runs": []}
    if "runs" in found:
        new = {_place(run) for run in found["runs"]}
        others = [run for run in result["runs"] if _place(run) not in new]
        found = found | {"runs": _in_order(study, others + found["runs"])}
    if "search" in found:
        runs = [*result.get("search", {"runs": []})["runs"], *found["search"]["runs"]]
        found = {"search": found["search"] | {"runs": _of_searches(study, runs)}}
    result |= facts_of(study) | found
    result = rounded(result)
    if result["runs"]:
        result["summary"] = dict(study.summary(result))
        draw(study.plot(result), file.with_suffix(".png"), alt=study.method, caption="")
    file.write_text(readable(result))
    return result


def _place(run: Json) -> tuple[str, str, str]:
    return run["network"], run["data"], run["way"]


def _in_order(study: MethodStudy, runs: Sequence[Json]) -> list[Json]:
    """As the study has problems and ways, without those that it has no more."""
    places = [(*problem, way) for problem in study.problems for way in study.ways]
    found = [run for run in runs if _place(run) in places]
    return sorted(found, key=lambda run: (places.index(_place(run)), run["seed"]))


def _of_searches(study: MethodStudy, runs: Sequence[Json]) -> list[Json]:
    """As the study has settings to try, the last run of each, without those that it has no more."""
    of = {(*_place(run), json.dumps(run["tried"]), run["seed"]): run for run in runs}
    places = [
        (*each.problem, each.way, json.dumps(dict(tried)), seed)
        for each in study.searches
        for tried in each.tried
        for seed in each.seeds
    ]
    return [of[place] for place in places if place in of]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", help="a module of taylor_kernels/studies/methods")
    parser.add_argument("--speed", action="store_true", help="measure speed alone")
    parser.add_argument("--search", action="store_true", help="try the settings of its searches")
    parser.add_argument("--network", help="of the study's networks this one; others stay kept")
    parser.add_argument("--data", help="of its data sets this one")
    parser.add_argument("--way", action="append", default=[], help="of its ways this one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("runs/methods/cache"))
    options = parser.parse_args(arguments)
    study, start = find_study(options.method), time.perf_counter()
    command = f"python -m bench.methods {options.method}{' --search' if options.search else ''}"
    if options.speed:
        measure = study.speed or find_speed(options.method)
        if measure is None:
            parser.error(f"{options.method} has no speed to measure")
        measured = measure()
        print(measured["words"])
        seconds, threads = time.perf_counter() - start, torch.get_num_threads()
        told = circumstances(f"{command} --speed", torch.device("cpu"), threads, seconds)
        keep(study, {"speed": measured | told})
        return 0
    problems = [
        problem
        for problem in study.problems
        if options.network in (None, problem[0]) and options.data in (None, problem[1])
    ]
    if not problems:
        parser.error(f"{options.method} has no such network and data; it has {study.problems}")
    for name in ("network", "data"):
        if value := getattr(options, name):
            command += f" --{name} {value}"
    if unknown := set(options.way) - set(study.ways):
        parser.error(f"--way: {sorted(unknown)} are not ways of {options.method}")
    command += "".join(f" --way '{way}'" for way in options.way)
    cache, log = Cache(options.cache), ProgressLog()
    if options.search:
        runs = search(study, cache, log, ways=options.way, problems=problems)
    else:
        runs = run(
            study, cache, log, seeds=options.seeds, ways=options.way, problems=problems
        )  # fmt: skip
    seconds = sum(one["seconds"] for one in runs)
    told = circumstances(command, torch.device("cpu"), THREADS, seconds)
    if options.search:
        result = keep(study, {"search": {"runs": runs} | told})
        print_table(search_table(study, result), Console())
        return 0
    result = keep(study, {"runs": runs} | told)
    for made in (study.table, *study.more.values()):
        print_table(made(result), Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
