"""Buffers in whose place code puts other tensors, as what it works out of parameters in each run.

No operation reads or writes the one that was there, so that nothing says which channels it lies on:
its values' successor does.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from taylor_kernels.tracing.run.recorder import Recorder


def follow_replaced(
    recorder: Recorder, names: Mapping[nn.Module, str], before: Mapping[str, Tensor]
) -> None:
    """A run has come to its end: a buffer has the channels of the tensor that is in its place now.

    Args:
        names: of the model's modules.
        before: the parameters and buffers before the run.
    """
    for module, prefix in names.items():
        for leaf, now in module._buffers.items():
            old = before.get(f"{prefix}.{leaf}" if prefix else leaf)
            if old is None or now is None or now is old or now.shape != old.shape:
                continue
            pairs = zip(recorder.labels(old).dims, recorder.labels(now).dims, strict=True)
            for mine, its in pairs:
                recorder.record.join(mine, its, (prefix, "assignment"))
