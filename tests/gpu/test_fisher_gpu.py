"""conv2d_fisher and linear_fisher on a GPU: right values, the same bits, streams and graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from taylor_kernels.ops.conv2d_fisher import conv2d_fisher, linear_fisher
from tests.helpers import cases
from tests.helpers.fisher_cases import (
    TF32_C,
    FisherCase,
    fisher_cases,
    fisher_reference64,
    random_fisher_inputs,
)
from tests.helpers.fisher_limits import LIMIT_CASES, both_orders
from tests.helpers.graphs import NEEDS_GPU, check_replay, run_behind_a_late_copy

pytestmark = NEEDS_GPU

#: Layers of ResNet-50, ResNeXt-50, MobileNet v2, a ViT and a head; more work than can be emulated.
LAYERS = [
    case
    for layer in [
        FisherCase("stem", (4, 3, 224, 224), (64, 3, 7, 7), (2, 2), (3, 3)),
        FisherCase("layer1_1x1", (4, 256, 56, 56), (64, 256, 1, 1)),
        FisherCase("layer1_3x3", (4, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1)),
        FisherCase("layer2_stride", (4, 128, 56, 56), (128, 128, 3, 3), (2, 2), (1, 1)),
        FisherCase("layer2_downsample", (4, 256, 56, 56), (512, 256, 1, 1), (2, 2)),
        FisherCase("layer3_3x3", (4, 256, 14, 14), (256, 256, 3, 3), padding=(1, 1)),
        FisherCase("layer4_3x3", (4, 512, 7, 7), (512, 512, 3, 3), padding=(1, 1)),
        FisherCase("layer4_expand", (4, 512, 7, 7), (2048, 512, 1, 1)),
        FisherCase("resnext", (4, 128, 56, 56), (128, 4, 3, 3), padding=(1, 1), groups=32),
        FisherCase("depthwise", (4, 96, 112, 112), (96, 1, 3, 3), (2, 2), (1, 1), groups=96),
        FisherCase("depthwise_5x5", (4, 240, 28, 28), (240, 1, 5, 5), padding=(2, 2), groups=240),
        FisherCase("vit_mlp", (8, 768, 197, 1), (3072, 768, 1, 1)),
        FisherCase("tokens", (2, 512, 2048, 1), (512, 512, 1, 1)),
        FisherCase("head", (512, 2048, 1, 1), (10, 2048, 1, 1)),
        FisherCase("many_examples", (5000, 3, 2, 2), (5, 3, 1, 1)),
    ]
    for case in both_orders(layer)
]
CASES = [*fisher_cases(), *LIMIT_CASES, *LAYERS]
#: What the Triton kernel compiles anew for most cases runs in one dtype each.
RUNS = [
    *(("cuda", case, dtype) for case in CASES for dtype in cases.DTYPES),
    *(("triton", case, cases.DTYPES[i % 3]) for i, case in enumerate([*fisher_cases(), *LAYERS])),
]
TF32_RUNS = [*(("cuda", case) for case in CASES), *(("triton", case) for case in LAYERS[::3])]


def name(value: object) -> str:
    return value.name if isinstance(value, FisherCase) else str(value)


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """float32 factors are not rounded unless a test asks for it."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def weights_of(backend: str, case: FisherCase, weight: Tensor, dtype: torch.dtype) -> list:
    """None, the weight and the weight in the inputs' dtype; for Triton one of the latter, since it
    compiles its kernels for each."""
    every = [None, weight, weight.to(dtype)]
    return every if backend == "cuda" else [None, every[1 + CASES.index(case) // 3 % 2]]


def layers_for(backend: str) -> list[FisherCase]:
    """Layers for tests beside that of right values: Triton compiles its kernel for nearly each."""
    return LAYERS if backend == "cuda" else LAYERS[::5]


def fisher(
    x: Tensor, dy: Tensor, case: FisherCase, backend: str, weight: Tensor | None = None
) -> Tensor:
    return conv2d_fisher(x, case.size, dy, *case.geometry, weight=weight, backend=backend)


@pytest.mark.parametrize(("backend", "case", "dtype"), RUNS, ids=name, indirect=["backend"])
def test_matches_float64(backend: str, case: FisherCase, dtype: torch.dtype) -> None:
    x, dy, weight = random_fisher_inputs(case, dtype, "cuda")
    for scaled in weights_of(backend, case, weight, dtype):
        got = fisher(x, dy, case, backend, scaled)
        cases.assert_close(got, *fisher_reference64(x, dy, case, scaled))
        assert cases.same_bits(got, fisher(x, dy, case, backend, scaled))


@pytest.mark.parametrize(("backend", "case"), TF32_RUNS, ids=name, indirect=["backend"])
def test_tf32_is_as_close_as_its_factors(backend: str, case: FisherCase) -> None:
    x, dy, weight = random_fisher_inputs(case, torch.float32, "cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        for scaled in (None, weight):
            got = fisher(x, dy, case, backend, scaled)
            cases.assert_close(got, *fisher_reference64(x, dy, case, scaled), c=TF32_C)
            assert cases.same_bits(got, fisher(x, dy, case, backend, scaled))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_sums_of_one_sign(dtype: torch.dtype, backend: str) -> None:
    """Tensor cores cut off what does not fit: one long sum of them would be far off."""
    for case in both_orders(FisherCase("long", (2, 48, 90, 90), (70, 48, 1, 1))):
        x, dy, _ = random_fisher_inputs(case, dtype, "cuda")
        x, dy = x.abs(), dy.abs()
        cases.assert_close(fisher(x, dy, case, backend), *fisher_reference64(x, dy, case))


@pytest.mark.parametrize("shape", [(64,), (4, 197), (2, 8, 130)], ids=str)
def test_linear_sums_tokens_inside_the_example(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(*shape, 384, device="cuda")
    dy = torch.randn(*shape, 200, device="cuda")
    tokens = (t.double().reshape(shape[0], -1, t.size(-1)) for t in (x, dy))
    expected = torch.einsum("nti,nto->noi", *tokens).square().sum(0)
    got = linear_fisher(x, dy, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)


def test_bits_do_not_depend_on_alignment(backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton picks another order of sums for unaligned tensors")
    for case in [*LIMIT_CASES, *LAYERS]:
        x, dy, _ = random_fisher_inputs(case, torch.bfloat16, "cuda")
        moved = (
            t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride()).copy_(t) for t in (x, dy)
        )
        assert cases.same_bits(fisher(x, dy, case, backend), fisher(*moved, case, backend)), (
            case.name
        )


def test_non_finite_values_stay_in_their_filter(backend: str) -> None:
    for case in layers_for(backend):
        x, dy, _ = random_fisher_inputs(case, torch.bfloat16, "cuda")
        if dy.size(1) < 8:
            continue
        dy[0, 3, -1, -1], dy[-1, 7, 0, 0] = float("inf"), float("nan")
        bad = ~fisher(x, dy, case, backend).flatten(1).isfinite().all(1)
        assert bad.nonzero().flatten().tolist() == [3, 7], case.name


def test_graph_replay_sees_new_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # filling memory is no part of what is captured
    layers = layers_for(backend)
    inputs = [random_fisher_inputs(case, torch.bfloat16, "cuda") for case in layers]

    def run() -> list[Tensor]:
        return [
            fisher(x, dy, case, backend, scaled)
            for case, (x, dy, weight) in zip(layers, inputs, strict=True)
            for scaled in (None, weight)
        ]

    check_replay(run, [dy for _, dy, _ in inputs])


def test_runs_on_the_current_stream(backend: str) -> None:
    case = FisherCase("layer", (16, 128, 28, 28), (128, 128, 3, 3), padding=(1, 1))
    x, dy, _ = random_fisher_inputs(case, torch.bfloat16, "cuda")
    (got,) = run_behind_a_late_copy(lambda late: [fisher(x, late, case, backend)], dy)
    assert cases.same_bits(got, fisher(x, dy, case, backend))


def test_second_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    case = FisherCase("layer", (4, 64, 28, 28), (64, 64, 3, 3), padding=(1, 1))
    x, dy, _ = random_fisher_inputs(case, torch.float16, "cuda:1")
    got = fisher(x, dy, case, backend)
    assert got.device == x.device
    cases.assert_close(got, *fisher_reference64(x, dy, case))


@pytest.mark.large
def test_more_than_2_to_31_elements(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.zeros(2**15 + 1, 64, 32, 32, **half)  # many examples
    dy = torch.zeros(2**15 + 1, 8, 32, 32, **half)
    x[0, 5], dy[0, 1] = 2, 1
    x[-1, 63], dy[-1, 7] = 1, 3
    got = conv2d_fisher(x, (8, 64, 1, 1), dy, backend=backend)
    found = {tuple(at[:2]): got[tuple(at)].item() for at in got.nonzero().tolist()}
    assert found == {(1, 5): (2 * 1024) ** 2, (7, 63): (3 * 1024) ** 2}
    del x, dy, got

    x = torch.zeros(1, 3, 2**15, 2**15, **half)  # one large example
    dy = torch.zeros(1, 2, 2**13, 2**13, **half)
    x[0, 2, -4, -4], dy[0, :, -1, -1] = 3, 2
    x[0, 1, 0, 4], dy[0, :, 0, 1] = 1, 5
    got = conv2d_fisher(x, (2, 3, 1, 1), dy, stride=4, backend=backend)
    assert got.flatten(1).tolist() == [[0, 25, 36]] * 2


def test_backends_agree() -> None:
    missing = [name for name in ("cuda", "triton") if not tk.available_backends()[name]]
    if missing:
        pytest.skip(f"no {missing[0]} backend here")
    for case in layers_for("triton"):
        x, dy, _ = random_fisher_inputs(case, torch.bfloat16, "cuda")
        _, bound = fisher_reference64(x, dy, case)
        cases.assert_close(
            fisher(x, dy, case, "cuda"), fisher(x, dy, case, "triton").double(), bound
        )
