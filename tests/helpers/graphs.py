"""What tests on a GPU share: their mark, CUDA graphs and streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.helpers.cases import same_bits

#: For `pytestmark`.
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def check_replay(run: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
    """Replays of `run` on inputs filled anew have the bits of calling it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for tensor in inputs:
            tensor.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(*both) for both in zip(captured, run(), strict=True))


def run_behind_a_late_copy(
    run: Callable[[Tensor], Sequence[Tensor]], values: Tensor
) -> Sequence[Tensor]:
    """run(a tensor that gets its values late, on the stream that is current during the call).

    What runs on another stream reads zeros. The first call compiles kernels and copies tables of
    addresses, either of which may wait until the copy is through; so it is the second that counts.
    """
    late = torch.zeros_like(values)
    run(late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(values)
        got = run(late)
    stream.synchronize()
    return got
