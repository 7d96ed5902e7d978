"""conv2d_fisher and linear_fisher layer by layer, against PyTorch's own weight gradient.

That gradient is the same products summed without the squares: the least that an implicit GEMM over
x and dy could take. CPU: ResNet-18 and the ConvNet on 32 images of 32². GPU: ResNet-50 on 64 images
of 224², in channels_last for half types, and a Llama block on 8 x 2048 tokens; the matrix units'
peak is a square matmul's of that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from bench import reference
from bench.harness import Provider, matmul_flops
from bench.models import ConvNet, resnet18, resnet50
from bench.ours import our_backends
from bench.reference import EPS32
from bench.shapes import Layer, layers_of, transformer_layers

#: (network, device) -> layers of different shapes
NETWORKS: dict[tuple[str, str], list[Layer]] = {
    ("convnet", "cpu"): layers_of(ConvNet(), (32, 3, 32, 32)),
    ("resnet18", "cpu"): layers_of(resnet18(), (32, 3, 32, 32)),
    ("transformer", "cuda"): transformer_layers(),
    ("resnet50", "cuda"): layers_of(resnet50(), (64, 3, 224, 224)),
}
#: name -> dtype, whether float32 products may be TF32
PRECISIONS = {
    "cpu": {"fp32": (torch.float32, False)},
    "cuda": {
        "bf16": (torch.bfloat16, False),
        "fp16": (torch.float16, False),
        "tf32": (torch.float32, True),
        "fp32": (torch.float32, False),
    },
}
CASES = [
    (network, on, precision, layer)
    for (network, on), layers in NETWORKS.items()
    for precision in PRECISIONS[on]
    for layer in layers
]
GRADIENT = "weight gradient"
OURS = "ours"
#: The backend that a user does not get, if there are two.
OTHERS = ("ours (triton)", "ours (cuda)")
ROUNDS = 15
#: Of a product of two float32 that were rounded to TF32, with ten bits after the point.
TF32_EPS = 2.0**-10
#: Largest error in units of a rounding coarser than float32's: a rounded product is off by one unit
#: at most, however many are added.
COARSE = 4.0


def inputs(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, dy and w of a trained network's magnitudes."""
    torch.manual_seed(0)
    shapes = (layer.input, layer.output, layer.weight)
    x, dy, w = (torch.randn(shape, device=device) for shape in shapes)
    x, dy, w = x.to(dtype), (dy * 0.01).to(dtype), (w * 0.05).to(dtype)
    if x.dim() == 4 and dtype.itemsize == 2:
        x, dy, w = (t.to(memory_format=torch.channels_last) for t in (x, dy, w))
    return x, dy, w


def providers(layer: Layer, dtype: torch.dtype, tf32: bool, device: torch.device) -> list[Provider]:
    x, dy, w = inputs(layer, dtype, device)
    eps = TF32_EPS if tf32 else EPS32
    expected = reference.fisher(x, dy, w, layer.stride, layer.padding, eps)

    def ours(backend: str | None) -> Callable[[], Tensor]:
        if w.dim() == 2:
            return lambda: tk.linear_fisher(x, dy, weight=w, backend=backend)
        return lambda: tk.conv2d_fisher(
            x, w.shape, dy, layer.stride, layer.padding, weight=w, backend=backend
        )

    def gradient() -> Tensor:
        if w.dim() == 2:
            return dy.flatten(0, -2).T @ x.flatten(0, -2)
        stride, padding = [layer.stride] * 2, [layer.padding] * 2
        wanted = [False, True, False]
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )[1]

    def provider(
        label: str, run: Callable[[], Tensor], name: str, role: str, rounding: float
    ) -> Provider:
        value, scale = expected[name]
        limits = {name: (value, scale * (rounding / EPS32))}
        most = reference.TOLERANCE if rounding == EPS32 else COARSE

        def check(got: Tensor) -> float:
            return reference.check({name: got.flatten()}, limits, most)

        return Provider(label, run, check, role)

    # PyTorch rounds its gradient to the inputs' type; ours stays float32.
    stored = max(eps, torch.finfo(dtype).eps)
    every = [
        provider(GRADIENT, gradient, "grads", "peer", stored),
        provider(OURS, ours(None), "squares", "ours", eps),
    ]
    for label, backend in our_backends(device, "conv2d_fisher", dtype).items():
        if label in OTHERS:
            every.append(provider(label, ours(backend), "squares", "extra", eps))
    return every


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Whether float32 products may be TF32; and cuDNN tries all it has."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = tf32, tf32, True
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


@lru_cache
def peak(dtype: torch.dtype, tf32: bool, device: torch.device) -> float | None:
    """Operations a second of a large square matmul, on a GPU."""
    with products(tf32):
        return matmul_flops(dtype, device) if device.type == "cuda" else None


@pytest.mark.quick(layer=[min(layers, key=lambda each: each.flops) for layers in NETWORKS.values()])
@pytest.mark.parametrize("label", [GRADIENT, OURS, *OTHERS])
@pytest.mark.parametrize(
    ("network", "on", "precision", "layer"),
    CASES,
    ids=lambda value: value.name if isinstance(value, Layer) else None,
)
def bench_conv2d_fisher(
    network, on, precision, layer, label, device, measured, record, rounds
) -> None:
    dtype, tf32 = PRECISIONS[on][precision]
    case = ("conv2d_fisher", f"{network}-{precision}", layer.name)
    turns = rounds(ROUNDS) if on == "cpu" else ROUNDS  # a GPU's take no time
    with products(tf32):
        results = measured.get(case, lambda: providers(layer, dtype, tf32, device), turns)
    most = peak(dtype, tf32, device)
    found = results.get(label)
    speed = None if found is None or found.unavailable else layer.flops / found.median
    record(
        case,
        results,
        label,
        input=list(layer.input),
        weight=list(layer.weight),
        stride=layer.stride,
        count=layer.count,
        gflops=None if speed is None else speed / 1e9,
        percent_of_peak=None if speed is None or most is None else 100 * speed / most,
        ratio_to_gradient=None if speed is None else found.median / results[GRADIENT].median,
    )
