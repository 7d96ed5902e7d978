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

    What runs on another stream reads zeros. That shows only if the host runs ahead of the copy: a
    call that compiles a kernel, or copies a table of new addresses, waits for it. So the call is
    repeated on that stream until it has compiled all, and meets its own outputs' memory again.
    """
    late = torch.zeros_like(values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(late)
        stream.synchronize()
        torch.cuda._sleep(500_000_000)  # a quarter of a second
        late.copy_(values)
        got = run(late)
        waited = stream.query()
    stream.synchronize()
    assert not waited, "the call waited for the GPU, so that it proves nothing of its stream"
    return got
