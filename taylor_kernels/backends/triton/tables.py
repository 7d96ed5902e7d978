"""Tables of integers in device memory, by which one Triton launch reaches many tensors."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

#: Tables kept for calls that repeat, such as those of a training loop; a table is some kilobytes.
KEPT = 32

_lock = threading.Lock()
_tables: OrderedDict[tuple[torch.device, bytes], Tensor] = OrderedDict()
_captured: dict[int, Tensor] = {}


def device_table(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor of the values, copied to the device only if no earlier call did.

    Raises:
        RuntimeError: the values are new and a CUDA graph is being captured.
    """
    key = (device, array("q", values).tobytes())
    on_gpu = device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    with _lock:
        table = _tables.get(key)
        if table is None:
            if capturing:
                raise RuntimeError(
                    "Triton backend: these tensors are new, and a table of their addresses cannot "
                    "be copied while a CUDA graph is captured; call the op on them once before, "
                    "or use backend='cuda', whose kernels need no table"
                )
            table = _tables[key] = torch.tensor(values, dtype=torch.int64, device=device)
            if len(_tables) > KEPT:
                _tables.popitem(last=False)
        _tables.move_to_end(key)
        if capturing:  # the graph reads it at every replay, for as long as it lives
            _captured[table.data_ptr()] = table
    if on_gpu and not capturing:
        # Its memory must not be given to others before this stream has read it, even if the table
        # was made on another stream and is dropped from here meanwhile.
        table.record_stream(torch.cuda.current_stream(device))
    return table
