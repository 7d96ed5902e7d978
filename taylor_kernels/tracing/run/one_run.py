"""One run of a model on its example inputs, of which a recorder hears."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from taylor_kernels.tracing.run.checked_widths import checks_widths, keep_what_it_read
from taylor_kernels.tracing.run.leaks import leaks_seen
from taylor_kernels.tracing.run.recorder import Recorder
from taylor_kernels.tracing.run.running import call, copied, tensors_in
from taylor_kernels.tracing.run.siblings import Siblings


def run_once(
    recorder: Recorder, model: nn.Module, names: Mapping[nn.Module, str], example_inputs: Any
) -> Any:
    """Run the model on the example inputs; the recorder hears of operations and modules."""
    siblings = Siblings(() if recorder.blind else names)
    mine = threading.get_ident()  # PyTorch calls these hooks for modules of all threads

    def entered(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == mine:
            with torch._C.DisableTorchFunction():
                recorder.enter(module, args)

    def left(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if threading.get_ident() != mine:
            return
        kwargs, output = rest if len(rest) > 1 else ({}, *rest)  # without them after an error
        siblings.ran(module, args, kwargs, output)
        if output is not None and not recorder.blind and checks_widths(module):
            keep_what_it_read(recorder, module, names.get(module, ""), args, kwargs)
        with torch._C.DisableTorchFunction():
            recorder.leave(module, kwargs, output)

    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(entered),
        torch.nn.modules.module.register_module_forward_hook(
            left,
            with_kwargs=True,
            always_call=True,
        ),
    ]
    try:
        with torch._C._AutoDispatchBelowAutograd(), recorder, leaks_seen(recorder):
            inputs = copied(example_inputs)
            if recorder.hollow is not None:
                recorder.hollow.given(tensors_in(inputs))
            outputs = call(model, inputs)
            siblings.run_others(recorder)
            return outputs
    finally:
        for handle in handles:
            handle.remove()
            # PyTorch leaves this mark behind, and torch.compile warns of global hooks for it.
            torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)
