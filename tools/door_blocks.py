"""What the documentation says of doors into other libraries, from kept results of benches.

A new door is a row of `DOORS`. Its page, its example and its results are found by its name:
`door-example-<name>` and `door-figures-<name>` are blocks of its page, the cases of its bench are
called (name, kind), and `bench/results/doors/<name>.json` keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bench.doors_report import beyond_a_step, memory_share
from bench.figures import Case, Results, load
from bench.markdown import ms, number, table
from bench.report import machine_line

ROOT = Path(__file__).resolve().parent.parent
CONTINUAL = Path("bench/results/continual/digits.json")


class Measured(NamedTuple):
    """What one kind of a door's bench is called: in the README's table, and on the door's page."""

    short: str
    long: str


class Door(NamedTuple):
    """A row of the table of doors.

    Attributes:
        name: of the module in `integrations`, and of what belongs to it.
        title: what the library is called.
        faster, right: what gets faster, and what gets right.
        example: a file of examples/, without its suffix.
        measured: the kinds of its bench that are shown; how many times as fast is read from the
            results.
    """

    name: str
    title: str
    faster: str
    right: str
    example: str
    measured: Mapping[str, Measured]

    @property
    def slug(self) -> str:
        return self.name.replace("_", "-")

    @property
    def path(self) -> Path:
        return Path("bench/results/doors") / f"{self.name}.json"

    @property
    def results(self) -> Results:
        results = load(ROOT / self.path)
        results.path = self.path  # as it is quoted
        return results

    def cases(self, results: Results) -> Iterator[tuple[Measured, Case, float]]:
        """What was measured, and the time of the fastest other way over ours."""
        for case in results.of(self.name):
            ours, theirs = case.ours, case.fastest(role="peer")
            kind = self.measured.get(" ".join(case.name[1:]))
            if kind is not None and ours is not None and theirs is not None:
                yield kind, case, theirs.median / ours.median

    def row(self) -> list[str]:
        found = self.cases(self.results) if (ROOT / self.path).exists() else ()
        return [
            f"[{self.title}](docs/{self.slug}.md)",
            f"`integrations.{self.name}`",
            self.faster or "–",
            ", ".join(f"{kind.short} {ratio:.1f}×" for kind, _, ratio in found) or "–",
            self.right,
        ]


DOORS = (
    Door(
        "torch_pruning",
        "Torch-Pruning",
        "Taylor, Hessian and OBDC importances",
        "BatchNorm, depthwise, grouped and frozen layers; every example counts",
        "torch_pruning_importance",
        {
            "taylor": Measured("Taylor", "Taylor scores of all groups of ResNet-50"),
            "hessian": Measured("Hessian", "Hessian of ResNet-18, 32 images, passes included"),
            "obdc": Measured("OBDC", "OBDC of a ConvNet, 32 images, passes included"),
        },
    ),
    Door(
        "avalanche",
        "Avalanche",
        "",
        "squares of each example's gradient at any batch size, not of the minibatch's mean",
        "continual_digits",
        {
            "mlp": Measured("exact EWC", "exact EWC of a small MLP"),
            "convnet": Measured("of a ConvNet", "exact EWC of a ConvNet"),
            "resnet18": Measured("of ResNet-18", "exact EWC of ResNet-18"),
        },
    ),
    Door(
        "torch_prune",
        "torch.nn.utils.prune, Lightning",
        "",
        "methods carry Taylor scores, of weights or filters, `ModelPruning`'s too",
        "torch_prune_methods",
        {},
    ),
    Door(
        "modelopt",
        "NVIDIA Model-Optimizer",
        "",
        "scores of gradients rank channels, in place of norms, not added to them",
        "modelopt_importance",
        {},
    ),
    Door(
        "laplace",
        "laplace-torch",
        "diagonal empirical Fisher and Gauss-Newton matrix",
        "memory of a few copies of the parameters; dict inputs, tokens, last layers",
        "laplace_diagonal",
        {
            "ef-resnet18": Measured("Fisher", "Fisher of ResNet-18"),
            "ggn-resnet18": Measured("GGN", "GGN of ResNet-18"),
            "ef-vit": Measured("of a ViT", "Fisher of a ViT"),
            "ggn-vit": Measured("GGN of it", "GGN of a ViT"),
        },
    ),
    Door(
        "backpack",
        "BackPACK",
        "`sum_grad_squared`, `batch_l2`",
        "groups, padding modes, norms; no gradients of all examples",
        "backpack_squares",
        {
            "sum_grad_squared-convnet": Measured("squares", "squares of a ConvNet"),
            "sum_grad_squared-resnet18": Measured("of ResNet-18", "squares of ResNet-18"),
            "batch_l2-convnet": Measured("norms", "norms of a ConvNet"),
            "batch_l2-resnet18": Measured("of ResNet-18", "norms of ResNet-18"),
        },
    ),
    Door(
        "opacus",
        "Opacus",
        "norms of convolutions in ghost clipping",
        "no gradients of all examples; linear layers with several positions",
        "opacus_ghost_clipping",
        {"step": Measured("a step", "step of a ResNet-18 with GroupNorm")},
    ),
)


def doors_table() -> str:
    """A row for each library."""
    head = ["library", "import", "what gets faster", "by", "what gets right"]
    lines = [head, [":--"] * len(head), *(door.row() for door in DOORS)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures_block(door: Door) -> str:
    """Time and peak memory of each kind beside the library's own way."""
    results, rows = door.results, []
    for kind, case, ratio in door.cases(results):
        ours, theirs = case.ours, case.fastest(role="peer")
        assert ours is not None
        assert theirs is not None
        share = memory_share(case)
        rows.append(
            [
                kind.long,
                ms(theirs.median),
                ms(ours.median),
                f"{ratio:.1f}×",
                number(theirs.info["peak_mib"], "{:.1f}"),
                number(ours.info["peak_mib"], "{:.1f}"),
                "–" if share is None else f"{100 * share:.0f}%",
            ]
        )
    head = ["", "its own, ms", "here, ms", "faster", "its peak MiB", "peak MiB here", "share"]
    return f"{table(head, rows)}\n\n{_source(results)}"


def laplace_block(door: Door) -> str:
    """Every backend's time over a training step's, and its memory beyond that step."""
    results, rows = door.results, []
    for case in results.of(door.name):
        plain = case.get("plain")
        for entry in case.entries:
            if plain is None or entry is plain:
                continue
            beyond = beyond_a_step(case, entry.label)
            rows.append(
                [
                    door.measured[case.name[1]].long,
                    "here" if entry is case.ours else entry.label,
                    ms(entry.median),
                    f"{entry.median / plain.median:.1f}",
                    number(entry.info["peak_mib"], "{:.0f}"),
                    number(beyond and round(beyond, 1) + 0.0, "{:.1f}"),
                ]
            )
    head = ["", "backend", "ms", "× a training step", "peak MiB", "beyond a step, × parameters"]
    return f"{table(head, rows)}\n\n{_source(results)}"


#: Door -> what its page shows in place of `figures_block`.
FIGURES: dict[str, Callable[[Door], str]] = {"laplace": laplace_block}


def _source(results: Results) -> str:
    source = f"Source: `{results.path.as_posix()}`, written by the command in `bench/README.md`."
    return f"{machine_line(results)}. {source}"


def overhead_block(door: Door) -> str:
    """Time of ours over that of the library's call as it is, which has another answer."""
    rows = []
    for kind, case, _ in door.cases(door.results):
        ours, wrong = case.ours, case.fastest(role="extra")
        if ours is not None and wrong is not None:
            ratio = ours.median / wrong.median
            rows.append([kind.long, ms(wrong.median), ms(ours.median), f"{ratio:.2f}×"])
    return table(["", "its call as it is, ms", "here, ms", "over it"], rows)


def continual_block() -> str:
    """What is kept of earlier pairs of digits, by the way in which importances are measured."""
    ways = json.loads((ROOT / CONTINUAL).read_text())["ways"]
    rows = []
    for name, way in ways.items():
        seconds = f"{way['seconds']:.2f}" if way["seconds"] else "–"
        kept = (f"{100 * way[what]:.1f}%" for what in ("accuracy", "forgetting"))
        rows.append([name, f"{way['penalty']:g}", *kept, seconds])
    head = ["importances", "penalty", "accuracy at the end", "forgotten", "measuring, s"]
    return table(head, rows)
