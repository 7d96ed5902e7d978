"""The job behind `taylor-kernels compare`: measure networks, write the result and its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch

from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.oracle import findings
from taylor_kernels.studies.oracle.digits import ARCHITECTURES, digits_problem, fine_tune
from taylor_kernels.studies.oracle.late_norms import late_norms
from taylor_kernels.studies.oracle.measure import measure
from taylor_kernels.studies.oracle.pages import build_report
from taylor_kernels.studies.oracle.scores import CannotScore
from taylor_kernels.studies.oracle.settings import FineTuning, OracleSettings
from taylor_kernels.studies.oracle.tables import summary_table, target_table
from taylor_kernels.studies.oracle.user_model import import_users_modules, user_problem
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.results import circumstances, rounded, write_results

if TYPE_CHECKING:
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json

#: A user's model is pruned and scored again under these, of the criteria that are compared.
_RESCORED = ("taylor_fo_bn", "taylor_so_diag", "obd_bn", "magnitude_l2", "random")


def run(settings: OracleSettings, log: ProgressLog) -> tuple[Json, list[Table]]:
    """Compare, and write `report.html`, PNGs and `result.json` to `settings.out`.

    Returns:
        What result.json holds, and the tables that sum it up.

    Raises:
        Mistake: an option cannot be right, or what it names cannot be used.
    """
    import_users_modules(settings)
    settings.check()
    device = settings.torch_device()
    cache = settings.open_cache()
    start = time.perf_counter()
    threads = torch.get_num_threads()
    try:
        compare = _digits if settings.model is None else _user_model
        result = compare(settings, device, cache, log)
        used = torch.get_num_threads()  # the user's module may have set it
    except CannotScore as error:
        raise Mistake(str(error)) from error
    finally:
        torch.set_num_threads(threads)
    result |= circumstances(settings.command(), device, used, time.perf_counter() - start)
    tables = [summary_table(result)]
    if result["kind"] == "digits":
        tables.append(target_table(result))
        result["targets"] = [asdict(target) for target in findings.targets(result)]
    with log.task("report", 1) as advance:
        write_results(settings.out, result, build_report(result, settings.out))
        advance()
    return result, tables


def _digits(settings: OracleSettings, device: torch.device, cache: Cache, log: ProgressLog) -> Json:
    recipe = settings.recipe
    torch.set_num_threads(recipe.threads)
    networks = []
    seeds = range(settings.seed, settings.seed + recipe.seeds)
    for architecture in recipe.architectures:
        for seed in seeds:
            problem, facts = digits_problem(architecture, seed, recipe.schedule, device, cache, log)
            schedule = recipe.finetune_schedule
            training = FineTuning(
                partial(fine_tune, seed=seed, schedule=schedule, device=device),
                [fine_tune],
                {"seed": seed, "threads": recipe.threads, **asdict(schedule)},
            )
            first = seed == settings.seed
            plan = settings.plan(rescored=recipe.rescored, training=training, first=first)
            found = measure(problem, plan, cache, log)
            networks.append({"architecture": architecture, "seed": seed, **facts, **found})
    words = " and ".join(ARCHITECTURES[name][1] for name in recipe.architectures)
    facts_of_study = asdict(recipe) | {"seeds": list(seeds), "words": words}
    result = _result("digits", facts_of_study, networks)
    if recipe.late_norms is not None:
        late = late_norms(recipe.late_norms, settings.seed, device, cache, log)
        result["late_norms"] = rounded(late)
    return result


def _user_model(
    settings: OracleSettings, device: torch.device, cache: Cache, log: ProgressLog
) -> Json:
    problem, left_out = user_problem(settings, device)
    for layer, why in left_out.items():
        log.say(f"layer {layer} is left out: {why}")
    plan = settings.plan(rescored=_RESCORED)
    found = measure(problem, plan, cache, log)
    name = problem.name.partition(":")[2]
    network = {"architecture": name, "seed": settings.seed, **found}
    facts = {"minibatches": plan.minibatches, "left_out": left_out}
    return _result("user_model", facts, [network])


def _result(kind: str, settings: Json, networks: Sequence[Json]) -> Json:
    return {"schema": 1, "kind": kind, "settings": settings, "networks": list(networks)}
