"""`python -m bench.continual`: EWC on five pairs of digits, one after the other.

Avalanche's plugin as it is, the same measuring importances one example at a time, and ours; each
under the penalty, of some, that leaves it the best accuracy over all pairs at the end. Forgetting
is the accuracy of a pair just after it was learned less that at the end. Results: bench/results.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.helpers.stubs import OF_AVALANCHE, stubs_of

RESULTS = Path(__file__).parent / "results" / "continual" / "digits.json"
SEEDS = 3
PENALTIES = (1.0, 10.0, 100.0)
BATCH = 32


def pairs() -> list[TensorDataset]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images).float().flatten(1) / 16, torch.tensor(digits.target)
    zero = torch.zeros(len(y), dtype=torch.int64)
    return [TensorDataset(x[s], y[s] % 2, zero[s]) for s in (y // 2 == p for p in range(5))]


def accuracy(model: nn.Module, pair: TensorDataset) -> float:
    with torch.no_grad():
        return (model(pair.tensors[0]).argmax(1) == pair.tensors[1]).float().mean().item()


def run(plugin: object, batch_size: int, seed: int) -> dict[str, float]:
    """Learn all pairs in turn: accuracy at the end, forgetting, seconds for the importances."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 2))
    loss, data, measuring = nn.CrossEntropyLoss(), pairs(), 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    learned = []
    saved: list[tuple[dict, dict]] = []
    for pair in data:
        for _ in range(10):
            for batch in torch.randperm(len(pair)).split(BATCH):
                optimizer.zero_grad()
                value = loss(model(pair.tensors[0][batch]), pair.tensors[1][batch])
                for importances, old in saved:
                    for name, p in model.named_parameters():
                        value = (
                            value
                            + plugin.ewc_lambda
                            * (  # type: ignore[attr-defined]
                                importances[name].data * (p - old[name]).square()
                            ).sum()
                        )
                value.backward()
                optimizer.step()
        learned.append(accuracy(model, pair))
        if plugin is not None:
            start = time.perf_counter()
            found = plugin.compute_importances(  # type: ignore[attr-defined]
                model, loss, optimizer, pair, "cpu", batch_size
            )
            measuring += time.perf_counter() - start
            saved.append((found, {n: p.detach().clone() for n, p in model.named_parameters()}))
    end = [accuracy(model, pair) for pair in data]
    forgotten = [a - b for a, b in zip(learned[:-1], end[:-1], strict=True)]
    return {
        "accuracy": statistics.mean(end),
        "forgetting": statistics.mean(forgotten),
        "seconds": measuring,
    }


def main() -> None:
    with stubs_of(OF_AVALANCHE):
        from avalanche.training.plugins import EWCPlugin as Theirs

    from taylor_kernels.integrations.avalanche import EWCPlugin as Ours

    torch.set_num_threads(1)
    ways = {
        "no penalty": (None, BATCH, (0.0,)),
        "Avalanche": (Theirs, BATCH, PENALTIES),
        "Avalanche, batch size 1": (Theirs, 1, PENALTIES),
        "ours": (Ours, BATCH, PENALTIES),
    }
    table = {}
    for label, (kind, batch_size, penalties) in ways.items():
        tried = []
        for penalty in penalties:
            runs = [run(kind and kind(penalty), batch_size, seed) for seed in range(SEEDS)]
            tried.append(
                {"penalty": penalty}
                | {key: statistics.mean(r[key] for r in runs) for key in runs[0]}
            )
        table[label] = max(tried, key=lambda row: row["accuracy"]) | {"tried": tried}
        best = {k: v for k, v in table[label].items() if k != "tried"}
        print(f"{label:24}", "  ".join(f"{key} {value:.3f}" for key, value in best.items()))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": "python -m bench.continual", "torch": torch.__version__, "ways": table}
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
