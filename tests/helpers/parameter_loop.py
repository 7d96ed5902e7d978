"""The Fisher diagonal of every parameter by a loop over examples, and by tk.ParameterFisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

import taylor_kernels as tk

#: Of a batch, the loss: a mean over its examples.
Loss = Callable[[nn.Module, Tensor], Tensor]


def mean_of_own(model: nn.Module, x: Tensor) -> Tensor:
    """A mean over examples of a loss of each example's output, whatever its shape."""
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.linspace(-1, 2, out[0].numel(), dtype=out.dtype).view(out[0].shape)
    return (out * weights).sin().sum() / len(out)


def by_loop(
    model: nn.Module, batches: Iterable[Tensor], loss: Loss = mean_of_own
) -> dict[str, Tensor]:
    """mean_n g_n², every example alone."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ones = [x[None] for batch in batches for x in batch]
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for one in ones:
        grads = torch.autograd.grad(loss(model, one), [*parameters.values()], allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            total[name] += 0 if grad is None else grad.square()
    return {name: squares / len(ones) for name, squares in total.items()}


def metered(
    model: nn.Module,
    batches: Sequence[Tensor],
    loss: Loss = mean_of_own,
    *,
    closure: bool = False,
    **options,
) -> dict[str, Tensor]:
    """The same by the meter: by backward() and update(), or by a closure."""
    meter = tk.ParameterFisher(model, **options)
    for batch in batches:
        if closure:
            meter.update(closure=lambda batch=batch: loss(model, batch))
        else:
            loss(model, batch).backward()
            meter.update()
    found = meter.compute()
    meter.close()
    return found


def close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Element by element, up to rounding of the parameter's largest."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        assert want.max() > 0, name
        atol = rtol * want.max().item()
        torch.testing.assert_close(got[name].to(want.dtype), want, rtol=rtol, atol=atol)
