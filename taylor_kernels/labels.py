"""Labels drawn from the model: the literal Monte-Carlo form of the Fisher matrix."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def draw_labels(logits: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """One label for each row of logits, drawn from their softmax.

    With them in place of the true labels `obd_fisher` scores with the Fisher matrix of the model
    itself, whose expectation for softmax and cross entropy is the Gauss-Newton matrix.
    `obd_fisher_mc` has the same expectation with far less variance: prefer it where the model can
    be called from a closure.

    Args:
        logits: [..., classes], floating; classes last, so for images pass
            `logits.movedim(1, -1)` of [N, classes, H, W].
        generator: on the logits' device; None takes PyTorch's own.

    Returns:
        int64, the shape of `logits` without its last dimension.

    Raises:
        TypeError: no floating tensor.
        ValueError: no dimension of classes, or none in it.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> model = torch.nn.Linear(4, 3)
        >>> imp = tk.Importance(model, "obd_fisher")
        >>> logits = model(torch.randn(8, 4))
        >>> torch.nn.functional.cross_entropy(logits, tk.draw_labels(logits)).backward()
        >>> imp.update()
        >>> tk.draw_labels(torch.tensor([[0.0, 99.0], [99.0, 0.0]]))
        tensor([1, 0])
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a floating tensor, got {what}")
    if not logits.dim() or not logits.size(-1):
        raise ValueError(f"logits: has shape {tuple(logits.shape)}; expected [..., classes]")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.to(dtype).softmax(-1).reshape(-1, logits.size(-1))
    if not len(rows):
        return logits.new_empty(logits.shape[:-1], dtype=torch.int64)
    return torch.multinomial(rows, 1, generator=generator).view(logits.shape[:-1])
