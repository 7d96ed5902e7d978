"""What to tell a user whose model does not run under a trace."""

from __future__ import annotations

import traceback
from pathlib import PurePath

#: Where PyTorch takes gradients: torch.autograd.grad and backward(), torch.func.grad and the like.
_DIFFERENTIATING = ("torch.autograd", "torch._functorch")


def refusal(error: Exception, module: str) -> str:
    """Why the model cannot be traced, and what to do.

    Args:
        error: that it raised.
        module: the name of the one that was running, "" if that is not known.
    """
    text = said(error)
    seen = f"{text[:300]} in {module!r}" if module else text[:300]
    if _takes_gradients(error):
        return (
            f"model: it takes gradients inside of forward ({seen}), and a trace runs it without; "
            "hand over the module inside it that is differentiated, with example inputs of that: "
            "what goes from it goes from this model too"
        )
    return (
        f"example_inputs: the model does not run on them ({seen}); pass a tensor, a tuple of "
        "arguments or a dict of keyword arguments on the model's device"
    )


def said(error: Exception, *, with_type: bool = True) -> str:
    """What an error says, in one line; where that is nothing, the line of code that raised it.

    Args:
        with_type: begin with its type, as is done where it says nothing.
    """
    text, kind = " ".join(str(error).split()), type(error).__name__
    if text:
        return f"{kind}: {text}" if with_type else text
    steps = traceback.extract_tb(error.__traceback__, limit=-1)
    if not steps:
        return kind
    last = steps[0]
    return f"{kind} at {last.line!r} in {PurePath(last.filename).name}, line {last.lineno}"


def _takes_gradients(error: Exception) -> bool:
    step = error.__traceback__
    while step is not None:
        if str(step.tb_frame.f_globals.get("__name__", "")).startswith(_DIFFERENTIATING):
            return True
        step = step.tb_next
    return False
