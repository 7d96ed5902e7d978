"""Says whether a change of the code changed a single bit of what the package computes.

    python tools/same_bits.py record before.json    # on the old code
    python tools/same_bits.py compare before.json   # on the new code: names what differs, exits 1

Inputs are drawn from fixed seeds: every op on every backend and instruction set that this machine
has, every criterion on two networks, and prunings with their masks, scores and compacted weights.
Only public names are used, so that the file outlives a move of the code behind them. Both runs must
be on one machine, since PyTorch's own products differ between processors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import taylor_kernels as tk

SHAPES = ((7,), (16, 3), (33, 130), (8, 4, 3, 3), (64, 32, 1, 1), (5, 6, 2, 3, 3), (300, 1030))
ACTIVATIONS = (((4, 9), 1), ((3, 16, 7, 5), 1), ((2, 33, 24), 2), ((2, 64, 40, 40), 1))
CONVOLUTIONS = (  # input, weight, stride, padding, dilation, groups
    ((3, 4, 9, 8), (6, 4, 3, 3), 1, 1, 1, 1),
    ((2, 8, 11, 7), (12, 2, 3, 2), 2, 1, 1, 4),
    ((2, 5, 12, 12), (7, 5, 2, 2), 1, 0, 2, 1),
    ((4, 64, 14, 14), (96, 64, 1, 1), 1, 0, 1, 1),
)
HALF_TYPES = (torch.float16, torch.bfloat16)


def digest(value: Any) -> str:
    """A hash of every number in nested containers, and of how they are nested."""
    found = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, dict):
            for key in part:
                found.update(str(key).encode())
                take(part[key])
        elif isinstance(part, (list, tuple)):
            found.update(str(len(part)).encode())
            for item in part:
                take(item)
        else:
            found.update(repr(part).encode())

    take(value)
    return found.hexdigest()


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with channels innermost, or with gaps between them."""
    if layout == "last" and tensor.dim() > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "gaps":
        return torch.stack((tensor, tensor + 1), -1)[..., 0]
    return tensor


def backends() -> Iterator[tuple[str, str]]:
    """(name to report, backend) of what runs on CPU tensors here, each instruction set chosen."""
    yield "reference", "reference"
    try:
        native: Any = import_module("taylor_kernels._native")
    except ImportError:
        return
    chosen = native.cpu_isa()
    for isa in native.cpu_isas():
        native.set_cpu_isa(isa)
        yield f"cpu {isa}", "cpu"
    native.set_cpu_isa(chosen)


def ops() -> Iterator[tuple[str, Any]]:
    """Every op on every backend."""
    for label, backend in backends():
        for dtype in (torch.float32, torch.float64, *HALF_TYPES):
            if dtype == torch.float64 and backend != "cpu":
                continue
            for layout in ("plain", "last", "gaps"):
                at = f"{label}, {dtype}, {layout}"
                yield from _parameter_ops(at, backend, dtype, layout)
                yield from _activation_ops(at, backend, dtype, layout)
            signs = tk.rademacher_like(
                [torch.empty(n, dtype=dtype) for n in (1, 127, 5000)], seed=3, backend=backend
            )
            yield f"rademacher_like, {label}, {dtype}", signs


def _parameter_ops(
    at: str, backend: str, dtype: torch.dtype, layout: str
) -> Iterator[tuple[str, Any]]:
    w, g, h = (
        [laid_out(drawn(i + part, *shape, dtype=dtype), layout) for i, shape in enumerate(SHAPES)]
        for part in (100, 200, 300)
    )
    for axis, lists in ((0, (w, g, h)), ((0, 1), (w[1:], g[1:], h[1:]))):
        w_, g_, h_ = lists
        yield f"filter_moments {axis}, {at}", tk.filter_moments(w_, g_, dim=axis, backend=backend)
        second = tk.second_order_moments(w_, g_, h_, dim=axis, backend=backend)
        yield f"second_order_moments {axis}, {at}", second
        curvature = tk.hutchinson_moments(w_, h_, seed=11, dim=axis, backend=backend)
        yield f"hutchinson_moments {axis}, {at}", curvature
    grouped = tk.filter_moments(w[3], g[3], dim=(0, 1), groups=4, backend=backend)
    yield f"filter_moments grouped, {at}", grouped


def _activation_ops(
    at: str, backend: str, dtype: torch.dtype, layout: str
) -> Iterator[tuple[str, Any]]:
    for number, (shape, channel_dim) in enumerate(ACTIVATIONS):
        y, dy = (laid_out(drawn(i + number, *shape, dtype=dtype), layout) for i in (400, 500))
        bias = drawn(600 + number, shape[channel_dim], dtype=dtype)
        for name, shift in (("", None), (" with bias", bias)):
            gates = tk.gate_gradients(y, dy, bias=shift, channel_dim=channel_dim, backend=backend)
            yield f"gate_gradients{name} {shape}, {at}", gates
    for number, (shape, size, stride, padding, dilation, groups) in enumerate(CONVOLUTIONS):
        x = laid_out(drawn(700 + number, *shape, dtype=dtype), layout)
        w = drawn(800 + number, *size, dtype=dtype)
        made = nn.functional.conv2d(x.float(), w.float(), None, stride, padding, dilation, groups)
        dy = laid_out(drawn(900 + number, *made.shape, dtype=dtype), layout)
        for name, weight in (("", None), (" with weight", w)):
            fisher = tk.conv2d_fisher(
                x, size, dy, stride, padding, dilation, groups, weight=weight, backend=backend
            )
            yield f"conv2d_fisher{name} {size}, {at}", fisher
    tokens, dtokens = drawn(1, 3, 17, 24, dtype=dtype), drawn(2, 3, 17, 40, dtype=dtype)
    yield f"linear_fisher, {at}", tk.linear_fisher(tokens, dtokens, backend=backend)


class Branches(nn.Module):
    """A residual sum, a concatenation, a depthwise, a grouped and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.body = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU(), nn.Conv2d(12, 12, 1, groups=3)
        )
        self.side = nn.Sequential(nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6), nn.Tanh())
        self.up = nn.ConvTranspose2d(18, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.body(x)
        x = torch.cat((x, self.side(x)), 1)
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(),
        nn.Linear(16, 4),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "branches": (Branches, (6, 3, 8, 8), 5),
    "perceptron": (perceptron, (16, 10), 4),
}


def criteria() -> Iterator[tuple[str, Any]]:
    """Every criterion on every network, over three minibatches, in both modes of BatchNorm."""
    for name, (make, shape, classes) in NETWORKS.items():
        for criterion in tk.criterion_names():
            for train in (True, False):
                torch.manual_seed(5)
                model = make().train(train)
                meter = tk.Importance(model, criterion)
                for number in range(3):
                    _pass(model, shape, classes, number, meter)
                mode = "train" if train else "eval"
                found = [meter.compute(), meter.standard_error(), meter.state_dict()]
                yield f"Importance {criterion}, {name}, {mode}", found


def _pass(model: nn.Module, shape: tuple[int, ...], classes: int, number: int, meter: Any) -> Any:
    """One minibatch for a meter or a pruner."""
    x = drawn(1000 + number, *shape)
    y = torch.randint(classes, shape[:1], generator=torch.Generator().manual_seed(number))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    read = meter.update if hasattr(meter, "update") else meter.step
    model.zero_grad()
    if meter.needs_closure:
        return read(closure=loss)
    loss().backward()
    return read()


def prunings() -> Iterator[tuple[str, Any]]:
    """Whole prunings: records, scores, masks, and what is left after compact()."""
    for name, (make, shape, classes) in NETWORKS.items():
        for criterion in tk.criterion_names():
            if criterion in ("oracle", "bn_scale"):
                continue
            torch.manual_seed(6)
            model = make()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            pruner = tk.Pruner(
                model, drawn(7, *shape), criterion, filters=0.6, every=2, per_step=3,
                optimizer=optimizer,
            )  # fmt: skip
            for number in range(20):
                _pass(model, shape, classes, number, pruner)
                optimizer.step()
            found = [
                list(map(repr, pruner.history)), pruner.scores(), pruner.skipped,
                pruner.compact().state_dict(),
                {
                    name: optimizer.state[parameter].get("momentum_buffer")
                    for name, parameter in model.named_parameters()
                },
            ]  # fmt: skip
            yield f"Pruner {criterion}, {name}", found


def outputs() -> dict[str, str]:
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for part in (ops, criteria, prunings):
        for name, value in part():
            assert name not in found, name
            found[name] = digest(value)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    found = outputs()
    if options.what == "record":
        options.file.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
        print(f"{len(found)} outputs recorded in {options.file}")
        return 0
    kept = json.loads(options.file.read_text(encoding="utf-8"))
    differing = [name for name in kept if found.get(name) != kept[name]]
    new = len(found.keys() - kept.keys())
    for name in differing:
        print(f"{'differs' if name in found else 'is gone'}: {name}")
    print(f"{len(kept) - len(differing)} of {len(kept)} outputs have the same bits; {new} are new")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
