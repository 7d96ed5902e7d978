"""What docs/scoring.md quotes of `python -m bench.bench_stream`: memory beyond the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.markdown import table

#: Relative to the repository.
STREAM = Path("bench/results/stream/result.json")


def stream_block(result: dict[str, Any]) -> str:
    """Measured and on paper at 194 M parameters; on paper at 8 B."""
    lengths, large = [*result["measured"]], [*result["large"]]
    head = [
        "a step, beyond the weights",
        *(f"{t} tokens: measured, MB" for t in lengths),
        *(f"{t} tokens: on paper" for t in lengths),
        *(f"8 B, {t} tokens: on paper, GB" for t in large),
    ]
    rows = [
        [
            way,
            *(_with_share(result["measured"][t], way) for t in lengths),
            *(f"{result['paper'][t]['peaks'][way] / 1e6:.0f}" for t in lengths),
            *(f"{result['large'][t]['peaks'][way] / 1e9:.1f}" for t in large),
        ]
        for way in next(iter(result["measured"].values()))
    ]
    weights = next(iter(next(iter(result["measured"].values())).values()))["weights"]
    big = result["large"][large[0]]
    machine, versions = result["machine"], result["versions"]
    return "\n\n".join(
        (
            table(head, rows),
            f"A Llama of transformers with random weights and one text: "
            f"{result['paper'][lengths[0]]['parameters'] / 1e6:.0f} M parameters in float32, "
            f"{weights / 1e6:.0f} MB of weights, and {big['parameters'] / 1e9:.1f} B in bfloat16, "
            f"{big['weights'] / 1e9:.1f} GB. In brackets: over a plain step. "
            f"{machine['processor']}; "
            f"PyTorch {versions['torch']}, transformers {versions['transformers']}. Source: "
            f"`{STREAM.as_posix()}`, written by `python -m bench.bench_stream`.",
        )
    )


def _with_share(ways: dict[str, dict[str, int]], way: str) -> str:
    plain = next(iter(ways.values()))["peak"]
    return f"{ways[way]['peak'] / 1e6:.0f} ({ways[way]['peak'] / plain:.2f}×)"
