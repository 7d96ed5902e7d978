"""`python -m bench.bench_stream`: memory that scoring a language model takes beside a plain step.

A Llama of transformers with 194 M parameters and random weights, one text of 128 and of 512 tokens;
each way in a process of its own. Then the same ways on paper, from figures of one layer that the
meta device gives: beside what was measured, and for a Llama of 8 B parameters. Into
bench/results/stream/result.json, which `python -m tools.docs_blocks` shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import taylor_kernels as tk
from bench.harness import Provider, peak_memory
from taylor_kernels import system

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path("bench/results/stream/result.json")
TOKENS, LARGE_TOKENS = (128, 512), (512, 4096)
#: Of a plain step's peak beyond the weights, streaming leaves this much at most, of a short text.
LIMIT = 0.6
MODELS: dict[str, dict[str, Any]] = {}
MODELS["small"] = dict(
    vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=10,
    num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False,
)  # fmt: skip
MODELS["large"] = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
#: Of the models of one and of two layers, whose activations are counted.
VOCABULARY = 1024
#: way: criterion, whether its gradients are streamed, whether inside tk.scoring.
WAYS: dict[str, tuple[str | None, bool, bool]] = {
    "forward + backward": (None, False, False),
    "taylor_fo": ("taylor_fo", False, False),
    "taylor_fo, stream=True": ("taylor_fo", True, False),
    "forward + backward in tk.scoring": (None, False, True),
    "taylor_fo_gate in tk.scoring": ("taylor_fo_gate", False, True),
}


def llama(settings: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**settings, max_position_embeddings=4096, use_cache=False))


def step(model: nn.Module, way: str, tokens: int) -> Callable[[], None]:
    """One text forward and backward, scored in this way."""
    criterion, stream, scoring = WAYS[way]
    text = torch.randint(int(model.config.vocab_size), (1, tokens))  # type: ignore[union-attr, arg-type]
    meter = None if criterion is None else tk.Importance(model, criterion, stream=stream)

    def run() -> None:
        with tk.scoring(model) if scoring else nullcontext():
            model(input_ids=text, labels=text).loss.backward()
            if meter is not None:
                meter.update()

    return run


def measured(way: str, tokens: int) -> dict[str, int]:
    """Bytes in this process: the weights, and the peak of a step beyond them."""
    torch.manual_seed(0)
    model = llama(MODELS["small"])
    run = step(model, way, tokens)
    one = Provider(way, run, None, "ours", before=model.zero_grad)
    run()
    peak = peak_memory(one, torch.device("cpu"))
    if peak is None:
        raise SystemExit("/proc/self/clear_refs cannot be written here, so no peak is known")
    return {"weights": sum(p.nbytes for p in model.parameters()), "peak": peak}


def apart(way: str, tokens: int) -> dict[str, int]:
    command = [sys.executable, "-m", "bench.bench_stream", "--one", way, "--tokens", str(tokens)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True,
        stdout=subprocess.PIPE, text=True, timeout=600,
    )  # fmt: skip
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps for the backward pass, parameters left out -> bytes."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # an address is not given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and not isinstance(tensor, nn.Parameter):
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@cache
def saved(name: str, layers: int, dtype: torch.dtype, scoring: bool) -> float:
    """Bytes a token that a forward pass leaves for the backward pass, by a model of few layers.

    Its vocabulary is small, so that what grows with that is counted apart.
    """
    few = {**MODELS[name], "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    model = llama(few).to(dtype)
    text = torch.zeros(1, TOKENS[0], dtype=torch.int64)
    with tk.scoring(model) if scoring else nullcontext(), counted(model) as kept:
        model(input_ids=text, labels=text)
    return sum(kept.values()) / TOKENS[0]


def on_paper(name: str, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of the weights, and of each way's peak beyond them.

    The backward pass is walked from the loss down. At each layer there are the activations of those
    below, and the gradients of those above: all of them, or the largest of its own, or none. At the
    head the gradient of the logits comes to them; gates hold each layer's output besides.
    """
    settings = MODELS[name]
    with torch.device("meta"):
        model = llama(settings).to(dtype)
    layers, size = settings["num_hidden_layers"], dtype.itemsize
    weights = {n: p.numel() * size for n, p in model.named_parameters()}
    block = [b for n, b in weights.items() if ".layers.0." in n]
    head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    outputs = (
        tokens
        * size
        * sum(
            m.out_features
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and n != "lm_head"
        )
    )
    # The loss is float32: logits, their logarithms, which stay, and the gradient of each.
    logit = tokens * settings["vocab_size"]
    peaks = {}
    for way, (criterion, stream, scoring) in WAYS.items():
        one, two = (saved(name, n, dtype, scoring) for n in (1, 2))
        layer, beside = tokens * (two - one), tokens * (2 * one - two - 4 * VOCABULARY)
        activations = layers * layer + beside + (outputs if criterion == "taylor_fo_gate" else 0)
        stages = [activations + (4 + 4 + size) * logit + (0 if scoring else head)]
        for above in range(1, layers + 1):
            there = max(block) if stream else head + above * sum(block)
            stages.append(activations * (layers - above + 1) / layers + (0 if scoring else there))
        at_end = embedding if stream else sum(weights.values())
        peaks[way] = int(max(*stages, 0 if scoring else at_end))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": sum(weights.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "gates": outputs,
        "peaks": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", choices=WAYS, help="print one as JSON, in this process")
    parser.add_argument("--tokens", type=int, default=TOKENS[0])
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.one, given.tokens)))
        return
    paper = {str(t): on_paper("small", t, torch.float32) for t in TOKENS}
    large = {str(t): on_paper("large", t, torch.bfloat16) for t in LARGE_TOKENS}
    found = {str(t): {way: apart(way, t) for way in WAYS} for t in TOKENS}
    result = {
        "machine": {"processor": system.cpu_model(), "threads": torch.get_num_threads()},
        "versions": system.package_versions("torch", "transformers"),
        "measured": found,
        "paper": paper,
        "large": large,
    }
    (ROOT / RESULT).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    ways = found[str(TOKENS[0])]  # a longer text's activations outweigh any gradient
    share = ways["taylor_fo, stream=True"]["peak"] / ways["forward + backward"]["peak"]
    print(f"streamed over plain at {TOKENS[0]} tokens: {share:.2f}, limit {LIMIT}")
    raise SystemExit(share > LIMIT)


if __name__ == "__main__":
    main()
