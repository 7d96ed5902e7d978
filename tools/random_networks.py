"""Thousands of draws of the random networks of tests/tracing, and a record of what came of them.

    python -m tools.random_networks                          # 2,000 draws of each property
    python -m tools.random_networks labels --seed 3          # of this one, the others as they were
    python -m tools.random_networks labels --seed 4 --more   # added to what is kept of it

A fault ends the run with the network that shows it, made small, as it ends the test. The record is
bench/results/zoo/random_networks.json; docs/tracing.md tells of it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from hypothesis import seed, settings

from tests.helpers import samples

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path("bench/results/zoo/random_networks.json")
PROPERTIES = {
    "removal": "test_masking_a_unit_is_removing_it",
    "labels": "test_what_moves_is_just_what_carries_the_label",
    "filters": "test_what_moves_with_a_channel_goes_with_it",
}


def _commit() -> str:
    """The commit, with a + where files that it holds have been changed since; "unknown" where git
    does not say."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        number = git(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip()
    except OSError:
        return "unknown"
    if not number:
        return "unknown"
    # The record itself is of no draw.
    changed = git(["git", "status", "--porcelain", "-uno", "--", ".", f":!{RESULT}"]).stdout
    return str(number) + "+" * bool(changed.strip())


def _tests(draws: int) -> ModuleType:
    """The properties, whose settings are made as they are imported."""
    os.environ[samples.DRAWS] = str(draws)
    settings.register_profile("kept", deadline=None, database=None)
    settings.load_profile("kept")
    return importlib.import_module("tests.tracing.test_random_networks")


def drawn(test: Any, number: int) -> dict[str, Any]:
    """Run a property on so many draws.

    Raises:
        Exception: what the smallest network that was found to be wrong raises.
    """
    torch.set_num_threads(1)
    kinds: Counter[str] = Counter()
    count = 0
    inner = test.hypothesis.inner_test

    @functools.wraps(inner)
    def counted(**drawn: Any) -> None:
        nonlocal count
        torch.manual_seed(drawn["seed"])
        inner(**drawn)
        count += 1  # not where the draw was of no use to the property
        kinds.update([*drawn["kinds"], *([drawn["last"]] if "last" in drawn else [])])

    test.hypothesis.inner_test = counted
    start = time.process_time()
    seed(number)(test)()
    return {
        "draws": count,
        "wrong": 0,
        "seed": number,
        "seconds": round(time.process_time() - start, 1),
        "commit": _commit(),
        "torch": torch.__version__,
        "pieces": dict(sorted(kinds.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", choices=[[], *PROPERTIES], metavar="property")
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--more", action="store_true", help="keep the runs before, too")
    given = parser.parse_args()
    path = ROOT / RESULT
    tests = _tests(given.draws)
    for name in given.names or PROPERTIES:
        run = drawn(getattr(tests, PROPERTIES[name]), given.seed)
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept[name] = [*(kept.get(name, []) if given.more else []), run]
        path.write_text(json.dumps(kept, indent=1) + "\n")
        print(name, {key: run[key] for key in ("draws", "wrong", "seed", "seconds")})


if __name__ == "__main__":
    main()
