"""CUDA graphs in tests: what is captured once is replayed on new values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.helpers.cases import same_bits


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
