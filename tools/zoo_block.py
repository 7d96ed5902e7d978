"""What docs/networks.md quotes of the kept run over the zoo: a table for each package."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from bench.markdown import ms, table

#: Relative to the repository; `python -m tools.zoo_table` writes them.
ZOO = Path("bench/results/zoo/result.json")
PUBLISHED = Path("bench/results/zoo/published.json")
HEAD = (
    "network", "layers that can be pruned", "of the FLOPs", "forward + backward, ms",
    "building a pruner", "an empty mode", "tracing", "parameters left", "masked − removed",
)  # fmt: skip
#: What building a pruner may take of a forward and backward pass, and a trace of a forward pass.
BUILD, TRACE = 5.0, 3.0
#: Networks whose passes take less, in seconds, are small ones: what operations take of Python
#: decides.
SMALL = 0.01
#: Why the last layer of nearly every network stays.
OUTPUT = "reaches the output of the model"


def zoo_block(result: dict[str, Any]) -> str:
    """The tables, what stays and why, and where it was measured."""
    networks = result["networks"]
    parts = []
    for package, some in groupby(networks.items(), lambda item: item[1]["package"]):
        rows = [_row(name, one) for name, one in some]
        parts += [f"### {package} {result['versions'][package]}", table(HEAD, rows)]
    parts += [
        _limits(networks),
        "What stays beside the layers that reach the output, and why:",
        "\n".join(_staying(networks)),
        _source(result, ZOO, ""),
    ]
    return "\n\n".join(parts)


def published_block(result: dict[str, Any]) -> str:
    """The same of networks at the sizes that they are published in, in one table."""
    networks = result["networks"]
    done = [one for one in networks.values() if "seconds" in one]
    return "\n\n".join(
        [
            table(HEAD, [_row(name, one) for name, one in networks.items()]),
            f"Of these {_count(done)} keep to the limits of a build and of a trace.",
            _source(result, PUBLISHED, " --published"),
        ]
    )


def _source(result: dict[str, Any], path: Path, option: str) -> str:
    machine = result["machine"]
    return (
        f"{machine['processor']}, {machine['threads']} thread; PyTorch "
        f"{result['versions']['torch']}. Source: `{path.as_posix()}`, written by "
        f"`python -m tools.zoo_table{option}`."
    )


def build_ratio(one: dict[str, Any]) -> float:
    return one["seconds"]["build"] / one["seconds"]["forward_backward"]


def trace_ratio(one: dict[str, Any]) -> float:
    return one["seconds"]["trace"] / one["seconds"]["forward"]


def _cost(ratio: float, limit: float, seconds: float) -> str:
    """How many passes it took, bold where these are more than the limit, and how long."""
    mark = "**" if ratio > limit else ""
    return f"{mark}{ratio:.1f}×{mark}, {ms(seconds)} ms"


def _limits(networks: dict[str, dict[str, Any]]) -> str:
    """How many networks keep to the limits, the small ones apart."""
    done = [one for one in networks.values() if "seconds" in one]
    small = [one for one in done if one["seconds"]["forward_backward"] < SMALL]
    large = [one for one in done if one["seconds"]["forward_backward"] >= SMALL]

    longest = max((one["seconds"]["build"] for one in small), default=0.0)
    return (
        f"The aim is a build of at most {BUILD:g}× a forward and backward pass and a trace of at "
        f"most {TRACE:g}× a forward pass; bold figures are over it. Of networks whose passes take "
        f"{SMALL * 1e3:g} ms and more {_count(large)} keep to it, of smaller ones {_count(small)}: "
        f"there a build takes {longest * 1e3:.0f} ms at most."
    )


def _count(of: list[dict[str, Any]]) -> str:
    build = sum(build_ratio(one) <= BUILD for one in of)
    trace = sum(trace_ratio(one) <= TRACE for one in of)
    return f"{build} and {trace} of {len(of)}"


def _row(name: str, one: dict[str, Any]) -> list[str]:
    if "failed" in one:
        return [name, one["failed"].replace("|", "\\|"), *["–"] * (len(HEAD) - 2)]
    seconds, forward = one["seconds"], one["seconds"]["forward"]
    size = f", {one['size']}²" if one["size"] else ""
    return [
        name + size,
        f"{one['prunable']} of {one['layers']}",
        f"{100 * one['flops']:.1f}%" if "flops" in one else "–",  # not measured in older runs
        ms(seconds["forward_backward"]),
        _cost(build_ratio(one), BUILD, seconds["build"]),
        f"{seconds['empty_mode'] / forward:.1f}×" if "empty_mode" in seconds else "–",
        _cost(trace_ratio(one), TRACE, seconds["trace"]),
        f"{100 * one['left']:.1f}%" + ("" if one["reached"] else ", target not reached"),
        "0" if one["error"] == 0 else f"{one['error']:.0e}",
    ]


def _staying(networks: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each network that keeps more than its output."""
    lines = []
    for name, one in networks.items():
        found = {k: n for k, n in one.get("reasons", {}).items() if k != OUTPUT}
        if found:
            texts = [f"{n} × {reason}" for reason, n in found.items()]
            lines.append(f"- {name}: {'; '.join(texts)}")
    return lines
