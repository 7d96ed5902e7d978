"""What an error of a model says of where and why a run has failed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from taylor_kernels.tracing.run.refusals import said


def innermost_module(error: Exception, modules: Mapping[str, nn.Module]) -> str:
    """The innermost module whose method raised an error, or passed it on; "" for the model.

    Args:
        modules: dict(model.named_modules()).
    """
    found, step = "", error.__traceback__
    names = {id(module): name for name, module in modules.items()}
    while step is not None:
        found = names.get(id(step.tb_frame.f_locals.get("self")), found)
        step = step.tb_next
    return found


def short(error: Exception) -> str:
    """What it says, in one line of at most 120 characters; the code that raised it where it says
    nothing, as an assertion without a message."""
    text = said(error, with_type=False)
    return text if len(text) <= 120 else text[:117] + "..."
