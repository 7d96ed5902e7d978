"""Ways in which values leave PyTorch's sight: channels that take them cannot be followed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from taylor_kernels.tracing.notes.atoms import Reason
from taylor_kernels.tracing.run.recorder import Recorder

_LEAKS = {"numpy": "numpy", "__array__": "numpy", "tolist": "tolist", "__dlpack__": "dlpack"}


@contextmanager
def leaks_seen(recorder: Recorder) -> Iterator[None]:
    """Inside, what becomes a numpy array or a Python list in this thread is written down.

    These methods of tensors run no operation, so that no dispatch mode sees them. A mode for
    functions does, but is asked at every function and every attribute of a tensor.
    """
    mine = threading.get_ident()

    def watched(method: Callable, name: str) -> Callable:
        @wraps(method)
        def leaving(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == mine:
                if recorder.hollow is not None:
                    recorder.hollow.reads(tensor)
                module = recorder.module
                if recorder in _get_current_dispatch_mode_stack():  # else a rule looks at labels
                    recorder.record.asked.add(module)
                reason = Reason(f"leaves PyTorch by {name} in {module!r}", module, name)
                for vector in recorder.labels(tensor).vectors():
                    recorder.record.fix(vector, reason)
            return method(tensor, *args, **kwargs)

        return leaving

    with ExitStack() as stack:
        for attribute, name in _LEAKS.items():
            own = vars(Tensor).get(attribute)  # else it is the base class's
            setattr(Tensor, attribute, watched(getattr(Tensor, attribute), name))
            if own is None:
                stack.callback(delattr, Tensor, attribute)
            else:
                stack.callback(setattr, Tensor, attribute, own)
        yield
