"""What the pruner makes of the networks of tests/zoo at their own sizes, and what it takes.

Where those are tiny configurations, networks of the same kind follow at sizes in use.

    python -m tools.zoo_table                 # all of them, into bench/results/zoo/result.json
    python -m tools.zoo_table --published     # those of tests/zoo/published.py, into published.json
    python -m tools.zoo_table gpt2 dpn68      # these again, the others as they were
    python -m tools.docs_blocks               # docs/networks.md shows what is kept

Each network has a process of its own, one thread and ten minutes. Times are of the processor, the
least of a few runs on the example inputs, one example each: the model in eval mode forward, and
forward and backward; forward under a mode that does nothing; tracing it; building a pruner, with
the proof. Then it is pruned as the tests do it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from taylor_kernels import Pruner, system
from taylor_kernels.tracing import trace
from taylor_kernels.tracing.run.running import call
from tests.zoo import judging
from tests.zoo.networks import NETWORKS, Network
from tests.zoo.published import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path("bench/results/zoo/result.json")
PUBLISHED_RESULT = Path("bench/results/zoo/published.json")
PACKAGES = ("torch", "pytorchcv", "transformers", "monai", "efficientnet_pytorch")
SECONDS = 600.0
ALL: dict[str, Network] = {**NETWORKS, **PUBLISHED}


class Empty(TorchDispatchMode):
    """Runs every operation as it is."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def under_an_empty_mode(run: Callable[[], Any]) -> None:
    """Run it under a mode, and with hooks on all modules, that do nothing: what any trace of
    operations in Python takes."""
    handles = [
        register_module_forward_pre_hook(lambda *_: None),
        register_module_forward_hook(lambda *_: None),
    ]
    try:
        with Empty():
            run()
    finally:
        for handle in handles:
            handle.remove()


def least(run: Callable[[], Any], times: int = 3) -> float:
    """Processor seconds of the fastest of a few runs: of short ones as many as take half a second,
    of long ones the first will do."""
    found: list[float] = []
    while (len(found) < times or sum(found) < 0.5) and sum(found) < 30:
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def measured(name: str) -> dict[str, Any]:
    """One network, in this process."""
    torch.set_num_threads(1)
    network = ALL[name]
    _warm_up()
    model, inputs = network.built(network.sizes[1])
    model.eval()

    def forward() -> None:
        with torch.no_grad():
            call(model, inputs)

    read = network.outputs

    def both() -> None:
        judging.loss(model, inputs, read).backward()
        model.zero_grad()

    def build() -> tuple[Pruner, torch.optim.Optimizer]:
        return judging.new_pruner(model, inputs, network.params, read=read)

    seconds = {
        "forward": least(forward),
        "forward_backward": least(both),
        "empty_mode": least(lambda: under_an_empty_mode(forward)),
        "trace": least(lambda: trace(model, inputs, outputs=read)),
        "build": least(lambda: build()[0].close()),
    }
    pruner, optimizer = build()
    verdict = judging.prune(model, inputs, pruner, optimizer, read)
    return {
        "package": network.package,
        "size": network.sizes[1],
        "parameters": pruner.whole.params,
        "target": network.params,
        "seconds": seconds,
        **asdict(verdict),
    }


def _warm_up() -> None:
    """What the first pruner of a process imports and allocates is no network's."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    judging.new_pruner(model, torch.randn(1, 3, 8, 8), 0.7)[0].close()


def apart(name: str) -> dict[str, Any]:
    """One network, in a process of its own; {"failed": why} where nothing comes of it."""
    command = [sys.executable, "-m", "tools.zoo_table", "--one", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    failed = {"package": ALL[name].package}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {**failed, "failed": f"takes more than {SECONDS:g} seconds"}
    if done.returncode:
        return {**failed, "failed": done.stderr.strip().splitlines()[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def keep(names: list[str]) -> None:
    """Measure these networks and write the result after each."""
    for networks, result in ((NETWORKS, RESULT), (PUBLISHED, PUBLISHED_RESULT)):
        path = ROOT / result
        kept = json.loads(path.read_text())["networks"] if path.exists() else {}
        for name in (name for name in names if name in networks):
            kept[name] = apart(name)
            found = {
                "machine": {"processor": system.cpu_model(), "threads": 1},
                "versions": system.package_versions(*PACKAGES),
                "networks": {known: kept[known] for known in networks if known in kept},
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(name, kept[name].get("failed", kept[name].get("seconds")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", choices=[[], *ALL], metavar="network")
    parser.add_argument("--one", choices=ALL, help="print one as JSON, in this process")
    parser.add_argument("--published", action="store_true", help="those at sizes in use")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.one)))
    else:
        keep(given.names or list(PUBLISHED if given.published else ALL))


if __name__ == "__main__":
    main()
