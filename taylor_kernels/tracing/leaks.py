"""Ways in which values leave PyTorch's sight: channels that take them cannot be followed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from taylor_kernels.tracing.record import Reason
from taylor_kernels.tracing.recorder import Recorder

_LEAKS = {
    Tensor.numpy: "numpy",
    Tensor.__array__: "numpy",
    Tensor.tolist: "tolist",
    Tensor.__dlpack__: "dlpack",
}


class Leaks(TorchFunctionMode):
    """Writes down which channels become numpy arrays or Python lists."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        if func in _LEAKS:
            name, module = _LEAKS[func], self._recorder.module
            reason = Reason(f"leaves PyTorch by {name} in {module!r}", module, name)
            for vector in self._recorder.labels(args[0]).vectors():
                self._recorder.record.fix(vector, reason)
        return func(*args, **(kwargs or {}))
