"""What to tell a user whose model does not run under a trace."""

from __future__ import annotations

#: Where PyTorch takes gradients: torch.autograd.grad and backward(), torch.func.grad and the like.
_DIFFERENTIATING = ("torch.autograd", "torch._functorch")


def refusal(error: Exception, module: str) -> str:
    """Why the model cannot be traced, and what to do.

    Args:
        error: that it raised.
        module: the name of the one that was running, "" if that is not known.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
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


def _takes_gradients(error: Exception) -> bool:
    step = error.__traceback__
    while step is not None:
        if str(step.tb_frame.f_globals.get("__name__", "")).startswith(_DIFFERENTIATING):
            return True
        step = step.tb_next
    return False
