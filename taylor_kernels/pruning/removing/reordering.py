"""The order of what is left, where channels change places as others go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from taylor_kernels.pruning.removing.optimizer_state import masked_state
from taylor_kernels.tracing.run.shared_memory import place_of


def reorder(
    tensors: Mapping[str, Tensor],
    orders: Mapping[str, Mapping[int, Tensor]],
    optimizers: Iterable[Optimizer] = (),
) -> None:
    """Put what lies along dimensions of tensors in another order, in place, with their gradients
    and the optimizers' state.

    Args:
        tensors: from which indices have been deleted.
        orders: tensor -> dimension -> which of the places [n] comes first, second and so on.
    """
    done = set()
    for name, own in orders.items():
        tensor = tensors[name]
        held = [(tensor.detach(), own)]
        if tensor.grad is not None:
            held.append((tensor.grad, own))
        held += masked_state(optimizers, name, tensor, own)
        for value, dims in held:
            if value.numel() and (place := place_of(value)) not in done:  # names may share memory
                done.add(place)
                for dim, order in dims.items():
                    with torch.no_grad():
                        value.copy_(value.index_select(dim, order.to(value.device)))
