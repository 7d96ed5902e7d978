"""Pruning at initialization: which weights of a network that has not learned anything are kept.

SNIP (Lee et al., ICLR 2019), GraSP (Wang et al., ICLR 2020) and SynFlow (Tanaka et al., NeurIPS
2020), and magnitude and random scores beside them. Every mask is cut by one exact global threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taylor_kernels.checks import (
    check_choice,
    check_count,
    check_module,
    check_number,
    integer,
    is_iterable,
)
from taylor_kernels.methods.masks import Held, masks_of, ranked_weights

Loss = Callable[[Any, Any], Tensor]
Batches = Iterable[tuple[Any, Any]]
#: GraSP divides logits by it, so that no softmax of a new network is saturated.
TEMPERATURE = 200.0


class InitCriterion(NamedTuple):
    """A score of every weight of a new network.

    Attributes:
        score: (model, batches, loss) -> name -> score, of the network as it is masked now.
        rounds: in how many steps the published method goes from all weights to the kept ones.
        needs_data: whether batches and a loss are read.
    """

    name: str
    formula: str
    source: str
    score: Callable[[nn.Module, Batches, Loss | None], dict[str, Tensor]]
    rounds: int
    needs_data: bool


def snip(model: nn.Module, batches: Batches, loss: Loss | None) -> dict[str, Tensor]:
    """|w·g|: how the loss changes as a gate on the weight closes. g is summed over batches."""
    weights = ranked_weights(model)
    totals = [torch.zeros_like(w) for w in weights.values()]
    for inputs, targets in batches:
        assert loss is not None
        value = loss(model(inputs), targets)
        for total, grad in zip(totals, _grads(value, weights), strict=True):
            total += grad
    scores = ((w.detach() * g).abs() for w, g in zip(weights.values(), totals, strict=True))
    return dict(zip(weights, scores, strict=True))


def grasp(
    model: nn.Module, batches: Batches, loss: Loss | None, temperature: float = TEMPERATURE
) -> dict[str, Tensor]:
    """w·(Hg), H the Hessian: the greatest are kept, those whose going would lower |g|² most.

    The paper scores −w·(Hg) and removes the greatest, which is the same. H and g are sums over all
    batches, so g is summed in a first pass over them.
    """
    weights, batches = ranked_weights(model), list(batches)
    whole = [torch.zeros_like(w) for w in weights.values()]
    totals = [torch.zeros_like(w) for w in weights.values()]
    for inputs, targets in batches:
        assert loss is not None
        value = loss(model(inputs) / temperature, targets)
        for total, grad in zip(whole, _grads(value, weights), strict=True):
            total += grad
    for inputs, targets in batches:
        assert loss is not None
        value = loss(model(inputs) / temperature, targets)
        grads = _grads(value, weights, create_graph=True)
        product = sum((g * fixed).sum() for g, fixed in zip(grads, whole, strict=True))
        assert isinstance(product, Tensor)
        for total, hg in zip(totals, _grads(product, weights), strict=True):
            total += hg
    scores = (w.detach() * hg for w, hg in zip(weights.values(), totals, strict=True))
    return dict(zip(weights, scores, strict=True))


def synflow(model: nn.Module, batches: Batches, loss: Loss | None = None) -> dict[str, Tensor]:
    """|w·∂R/∂w|, R the sum of outputs for an input of ones in the network of |weights|.

    In eval mode and float64: through deep networks R leaves the range of float32. Of the batches
    only the shape of one example is read.
    """
    inputs, _ = next(iter(batches))
    weights = ranked_weights(model)
    with _linear(model):
        ones = torch.ones_like(inputs[:1], dtype=torch.float64)
        grads = _grads(model(ones).sum(), weights)
        scores = [(w.detach() * g).abs() for w, g in zip(weights.values(), grads, strict=True)]
    # Only their order counts, and that of float64 fits into float32 once they are scaled.
    most = max(score.max() for score in scores).clamp_min(torch.finfo(torch.float64).tiny)
    return {name: (each / most).float() for name, each in zip(weights, scores, strict=True)}


def magnitude(model: nn.Module, batches: Batches, loss: Loss | None = None) -> dict[str, Tensor]:
    """|w|."""
    return {name: w.detach().abs() for name, w in ranked_weights(model).items()}


def drawn(model: nn.Module, batches: Batches, loss: Loss | None = None) -> dict[str, Tensor]:
    """Uniform in (0, 1), from PyTorch's own generator; what is masked stays so."""
    return {
        name: torch.rand_like(w) * (w.detach() != 0) for name, w in ranked_weights(model).items()
    }


CRITERIA = {
    one.name: one
    for one in (
        InitCriterion("snip", "|w·g|", "Lee et al., ICLR 2019", snip, 1, True),
        InitCriterion("grasp", "w·(Hg)", "Wang et al., ICLR 2020", grasp, 1, True),
        InitCriterion("synflow", "|w·∂R/∂w|", "Tanaka et al., NeurIPS 2020", synflow, 100, True),
        InitCriterion("magnitude", "|w|", "", magnitude, 1, False),
        InitCriterion("random", "uniform", "", drawn, 1, False),
    )
}


def at_init(
    model: nn.Module,
    criterion: str,
    keep: float,
    batches: Batches = (),
    loss: Loss | None = None,
    *,
    rounds: int | None = None,
    scope: str = "global",
    granularity: str = "weight",
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks of the weights to keep of a new network, which stays as it is.

    Each round scores the network as the last one masked it, and keeps the fraction
    keep^(round / rounds). `methods.masks.Held` holds masks while the network is trained.

    Args:
        criterion: "snip", "grasp", "synflow", "magnitude" or "random".
        keep: the fraction of the weights of linear layers and 2-D convolutions, in (0, 1].
        batches: (inputs, targets) pairs; of synflow only the inputs' shape counts.
        loss: loss(model(inputs), targets) -> a scalar.
        rounds: by default those of the paper: 100 for synflow, else 1.
        scope, granularity: as those of `methods.masks.masks_of`.
        masks: earlier ones to start from, whose cut weights stay out while others are left.

    Returns:
        Name of the parameter -> bool mask.

    Raises:
        ValueError: an unknown criterion, a number out of its range, data that the criterion needs
            and was not given, or scores that are not finite.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> import taylor_kernels as tk
        >>> layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
        >>> model = torch.nn.Sequential(*layers)
        >>> batch = torch.randn(32, 8), torch.randint(0, 4, (32,))
        >>> masks = tk.methods.at_init(model, "snip", 0.25, [batch], F.cross_entropy)
        >>> sum(int(mask.sum()) for mask in masks.values())
        48
    """
    check_module(model)
    check_choice("criterion", criterion, CRITERIA)
    check_number("keep", keep, lambda part: 0 < part <= 1, "the fraction to keep, in (0, 1]")
    if not is_iterable(batches) or isinstance(batches, Tensor):
        raise TypeError(f"batches: expected (inputs, targets) pairs, got {type(batches).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected a function, got {type(loss).__name__}")
    chosen, batches = CRITERIA[criterion], list(batches)
    rounds = chosen.rounds if rounds is None else integer("rounds", rounds)
    check_count("rounds", rounds)
    if chosen.needs_data and not batches:
        raise ValueError(f"batches: {criterion} reads data; pass at least one (inputs, targets)")
    if chosen.needs_data and loss is None and chosen.score is not synflow:
        raise ValueError(f"loss: {criterion} needs one, such as torch.nn.functional.cross_entropy")
    found = dict(masks or {})
    with as_it_was(model):
        for weight in ranked_weights(model).values():
            weight.requires_grad_()  # frozen ones are ranked as the others are
        for number in range(1, rounds + 1):
            with Held(model, found):
                scores = chosen.score(model, batches, loss)
            fraction = keep ** (number / rounds)
            found = masks_of(scores, fraction, scope=scope, granularity=granularity, among=found)
    return found


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers, gradients and modes are put back at the end."""
    tensors = [*model.parameters(), *model.buffers()]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    values = [t.detach().clone() for t in tensors]
    grads = [p.grad for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for table, before in buffers:  # a forward pass may put others in their places
            table.update(before)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad
        for module, training in modes:
            module.training = training


@contextmanager
def _linear(model: nn.Module) -> Iterator[None]:
    """The network with the magnitudes of its parameters and buffers, in float64 and eval mode."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kept = [t.data for t in tensors]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double().abs()
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
        for module, training in modes:
            module.training = training


def _grads(
    value: Tensor, weights: dict[str, nn.Parameter], *, create_graph: bool = False
) -> list[Tensor]:
    """Of each weight; zeros where the value does not depend on it."""
    found = torch.autograd.grad(
        value, list(weights.values()), create_graph=create_graph, allow_unused=True
    )
    return [
        torch.zeros_like(w) if g is None else g
        for w, g in zip(weights.values(), found, strict=True)
    ]
