"""A small Llama of transformers learns Python's standard library byte by byte, and is pruned.

Neurons of the gated feed-forward layers and attention heads, with the key and value head that they
share, go by first-order Taylor scores while training goes on. Takes half a minute on one core.
"""

import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import taylor_kernels as tk

torch.manual_seed(0)
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
data = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8).long()
held_out, data = data[: 32 * 128].view(32, 128), data[32 * 128 :]

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=4, use_cache=False,
)  # fmt: skip
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def batch(size=8, length=128):
    start = torch.randint(len(data) - length, (size, 1))
    return data[start + torch.arange(length)]


def train(steps, pruner=None):
    model.train()
    for _ in range(steps):
        text = batch()
        optimizer.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        if pruner is not None and not pruner.done:
            pruner.step()
        optimizer.step()


def report(name):
    with torch.no_grad():
        perplexity = model.eval()(input_ids=held_out, labels=held_out).loss.exp().item()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: perplexity {perplexity:.2f} a byte, {parameters:,} parameters")
    return perplexity


train(80)
dense = report("dense")

pruner = tk.Pruner(
    model, {"input_ids": batch(1)}, "taylor_fo", params=0.7, every=3, per_step=0.1,
    optimizer=optimizer,
)  # fmt: skip
while not pruner.done:
    train(3, pruner)
model = pruner.compact()
pruned = report("pruned to 70% of its parameters")
train(30)
recovered = report("after training on")
tk.save_pruned("pruned.safetensors", pruner)  # layers of different widths: no config makes them
