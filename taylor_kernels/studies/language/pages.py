"""What the language-model study shows: its tables and the sections of its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from taylor_kernels.studies.language.findings import (
    ALIKE,
    STAGES,
    bits,
    chosen,
    perplexity,
    remarks,
)
from taylor_kernels.studies.language.kinds import KINDS
from taylor_kernels.studies.language.plots import curves
from taylor_kernels.studies.plotting import draw
from taylor_kernels.studies.report import Report, Section, Table, Text
from taylor_kernels.studies.results import Json, footer, threads_in_words

MB = 1e6


def perplexity_table(result: Json, stage: str) -> Table:
    """Perplexity and bits of a byte, of each kind and fraction under each criterion."""
    settings, dense = result["settings"], result["dense"]
    criteria = settings["criteria"]
    rows = []
    for kind in settings["kinds"]:
        for fraction in settings["fractions"]:
            rows.append(
                [
                    kind,
                    f"{fraction:.0%}",
                    _share(result, kind, fraction),
                    *(_cell(result, kind, fraction, name, stage) for name in criteria),
                ]
            )
    words = "" if stage == "bits" else _recovery(result)
    random = ", mean and range of draws for `random`" if "random" in criteria else ""
    caption = (
        f"Perplexity of a byte of held-out text, in brackets bits{random}; dense "
        f"{_with_bits(dense[stage])}{words}. Parameters: the share that is left, where they differ "
        "under one criterion after the other: a pruning takes whole blocks, which overshoot."
    )
    return Table([STAGES[stage], "gone", "parameters", *criteria], rows, caption)


def summary_table(result: Json) -> Table:
    """Perplexity as pruned and trained on, for a terminal."""
    settings, dense = result["settings"], result["dense"]

    def pair(values: Sequence[float]) -> str:
        return " → ".join(map(perplexity, values))

    rows = [["dense", "", *[pair([dense[stage] for stage in STAGES])] * len(settings["criteria"])]]
    for kind in settings["kinds"]:
        for fraction in settings["fractions"]:
            pairs = [
                pair([bits(result, kind, fraction, name, stage) for stage in STAGES])
                for name in settings["criteria"]
            ]
            rows.append([kind, f"{fraction:.0%}", *pairs])
    caption = "Perplexity of a byte of held-out text: as pruned → trained on."
    return Table(["", "gone", *settings["criteria"]], rows, caption)


def speed_table(result: Json) -> Table:
    """Size, speed and memory of the dense model and of the first criterion's."""
    speed, rows = result["speed"], []
    models = speed["models"]
    for name, one in models.items():
        rows.append(
            [
                _words(name),
                f"{one['parameters'] / 1e6:.2f}",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['ratio']:.2f}×",
                *(f"{one[key] / MB:.1f}" for key in ("weights", "forward", "step")),
            ]
        )
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {threads_in_words(result)}"
    caption = (
        f"Models of `{speed['criterion']}`. Tokens a second: of a forward pass of "
        f"{speed['tokens']:,} tokens, median of {result['recipe']['repeats']}, all models in turns "
        f"in one process; {where}. Memory: bytes of tensors at the peak of a forward pass, and of "
        "a training step without the optimizer's state, weights included; counted."
    )
    head = ["", "parameters, M", "tokens/s", "× dense", "weights, MB", "forward, MB", "step, MB"]
    return Table(head, rows, caption)


def build_report(result: Json, folder: Path) -> Report:
    """The report of a result; writes its plot to `folder` as PNG."""
    return Report(
        title="A small language model, pruned",
        lead=_lead(result),
        sections=[
            Section(
                "Perplexity against what is gone",
                [
                    draw(
                        curves(result),
                        folder / "language.png",
                        alt="Perplexity against the fraction gone, a panel for each kind of unit, "
                        "as pruned above and trained on below.",
                        caption="Above: as pruned; below: trained on. Dotted: the dense model, "
                        "below trained on as long. Band: range of the draws.",
                    ),
                    *(perplexity_table(result, stage) for stage in STAGES),
                ],
            ),
            Section("Speed and memory", [speed_table(result)]),
            Section("The order of criteria", [Text(_order_words(result))]),
            Section("How it was done", [Text(method(result))]),
        ],
        footer=footer(result),
    )


def method(result: Json) -> str:
    """The study in words."""
    recipe, text, settings = result["recipe"], result["text"], result["settings"]
    sizes, dense, recovery = recipe["sizes"], recipe["dense"], recipe["recovery"]
    scoring, scored = recipe["scoring"], recipe["scored"]
    kinds = "; ".join(f"{name}: of {KINDS[name].of}" for name in settings["kinds"])
    each = max(cell["difference"] for cell in result["cells"])
    return (
        f"A Llama over bytes ({sizes['layers']} layers of width {sizes['width']}, "
        f"{sizes['heads']} heads over {sizes['groups']} key and value heads, {sizes['hidden']} "
        f"neurons in a feed-forward layer; RMSNorm, rotary positions, SwiGLU; "
        f"{result['dense']['parameters']:,} parameters) is trained on "
        f"{text['train_bytes'] / 1e6:.1f} MB of Python's standard library for {dense['steps']} "
        f"steps of {dense['windows']} × {dense['length']} bytes by AdamW. Perplexity is of "
        f"{recipe['judged']} windows of {sizes['context']} bytes, spread over "
        f"{text['held_out_modules']} modules that it has not seen.\n\n"
        f"The fraction that goes is, {kinds}. It goes in {scoring['rounds']} rounds, branches one "
        f"by one, each after scores on {scoring['minibatches']} new minibatches of "
        f"{scored['windows']} × {scored['length']} bytes; weights do not change in between. "
        f"Training on, with a new AdamW: {recovery['steps']} steps of {recovery['windows']} × "
        f"{recovery['length']} bytes, the same for all and for the dense model. One dense model, "
        f"seed {settings['seed']}.\n\n"
        "In every cell the logits with units masked were compared in float64 with those after "
        f"their removal: they differ by {each:.0e} of the largest at most."
    )


def _lead(result: Json) -> str:
    settings = result["settings"]
    first, fraction = settings["criteria"][0], settings["fractions"][-1]
    kind = settings["kinds"][-1]
    one = result["speed"]["models"][f"{kind} {fraction:g}"]
    pruned, trained = (bits(result, kind, fraction, first, stage) for stage in STAGES)
    dense = result["dense"]
    return (
        f"`{first}` takes {fraction:.0%} ({kind}: {KINDS[kind].of}) of a Llama of "
        f"{dense['parameters'] / 1e6:.1f} M parameters: perplexity of a byte goes from "
        f"{perplexity(dense['bits'])} to {perplexity(pruned)}, and to **{perplexity(trained)}** by "
        f"training on ({perplexity(dense['recovered'])} if the dense model is), at "
        f"{one['ratio']:.2f}× the tokens a second."
    )


def _order_words(result: Json) -> str:
    return "\n\n".join(
        [
            "On image networks, with half of the filters gone and no training in between, Taylor "
            "scores are before magnitude, and that before random, which are near chance both. "
            f"Alike: within {ALIKE} bits.",
            *remarks(result),
        ]
    )


def _recovery(result: Json) -> str:
    recovery = result["recipe"]["recovery"]
    return f", trained on as the others for {recovery['steps']} steps"


def shares(result: Json, kind: str, fraction: float) -> list[float]:
    """The fraction of the parameters that is left under each criterion, the mean over draws."""
    return [
        mean(cell["parameters"] for cell in chosen(result, kind, fraction, name))
        / result["dense"]["parameters"]
        for name in result["settings"]["criteria"]
    ]


def _share(result: Json, kind: str, fraction: float) -> str:
    found = [f"{100 * share:.0f}" for share in shares(result, kind, fraction)]
    return f"{'/'.join(found if len(set(found)) > 1 else found[:1])}%"


def _cell(result: Json, kind: str, fraction: float, criterion: str, stage: str) -> str:
    values = [cell[stage] for cell in chosen(result, kind, fraction, criterion)]
    if len(values) == 1:
        return _with_bits(values[0])
    low, high = perplexity(min(values)), perplexity(max(values))
    return f"{_with_bits(mean(values))}, {low}–{high}"


def _with_bits(value: float) -> str:
    return f"{perplexity(value)} ({value:.2f})"


def _words(name: str) -> str:
    kind, _, fraction = name.rpartition(" ")
    return f"{kind} {float(fraction):.0%}" if kind else name
