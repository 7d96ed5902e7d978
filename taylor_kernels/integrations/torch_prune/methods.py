"""Pruning methods of torch.nn.utils.prune that carry their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import prune

from taylor_kernels.integrations import absent
from taylor_kernels.integrations.torch_prune.scores import (
    FilterScores,
    FilterSource,
    Place,
    WeightScores,
    WeightSource,
)


class TaylorUnstructured(prune.L1Unstructured):
    """Masks the weights with the least scores; `unstructured` makes a class of it that has some.

    Args:
        amount: how many, or which share of those that are left.
    """

    scores: ClassVar[WeightScores]

    def __init__(self, amount: float, *, scored: bool = False) -> None:
        super().__init__(amount)
        self._scored = scored  # what compute_mask is given are scores

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, importance_scores: Tensor | None = None
    ) -> Any:
        """Mask a parameter of a module, as `prune.L1Unstructured.apply`.

        Raises:
            ValueError, RuntimeError: there are no scores for it; nothing is changed.
        """
        found = cls.scores.of(module, name) if importance_scores is None else importance_scores
        return super(prune.L1Unstructured, cls).apply(
            module, name, amount=amount, scored=True, importance_scores=found
        )

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """1 and 0 in the shape of t.

        `prune.global_unstructured` hands over the values of parameters, one after the other; their
        scores are put in their place.
        """
        return super().compute_mask(t if self._scored else self.scores.of_values(t), default_mask)

    def __reduce__(self) -> Any:
        """As a part of a saved model it is the mask that counts, and no score."""
        return _without_scores, (TaylorUnstructured, vars(self))


class TaylorStructured(prune.LnStructured):
    """Masks the filters with the least scores; `structured` makes a class of it that has some.

    Args:
        amount: how many, or which share of those that are left.
        dim: of the weight, along which filters lie.
    """

    scores: ClassVar[FilterScores]

    def __init__(self, amount: float, dim: int = 0) -> None:
        super().__init__(amount, n=math.inf, dim=dim)  # the scores of a filter's weights are equal

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str = "weight",
        amount: float = 0.0,
        importance_scores: Tensor | None = None,
    ) -> Any:
        """Mask filters of a module's weight, as `prune.LnStructured.apply`; `dim` is the layer's.

        Raises:
            ValueError, RuntimeError: there are no scores for it; nothing is changed.
        """
        found, dim = cls.scores.of(module, name)
        found = found if importance_scores is None else importance_scores
        return super(prune.LnStructured, cls).apply(
            module, name, amount=amount, dim=dim, importance_scores=found
        )

    def __reduce__(self) -> Any:
        """As a part of a saved model it is the mask that counts, and no score."""
        return _without_scores, (TaylorStructured, vars(self))


def _without_scores(kind: type, attributes: dict[str, Any]) -> Any:
    made: Any = object.__new__(kind)
    vars(made).update(attributes)
    return made


def unstructured(
    model: nn.Module,
    scores: WeightSource | Callable[[], WeightSource] = None,
    *,
    parameters: Sequence[Place] | None = None,
) -> type[TaylorUnstructured]:
    """A pruning method that masks single weights of a model, those with the least scores.

    Scores are looked up whenever it is used, so that a meter may go on between two prunings.

    Args:
        model: whose parameters are to be pruned.
        scores: where they come from:
            None: (g·w)² of the gradients that are there, of the last minibatch or of an
            accumulation (Molchanov et al., CVPR 2019, for single weights);
            a `tk.ParameterFisher` on the model: ½·w²·mean_n g_n², optimal brain damage (LeCun et
            al., NeurIPS 1989) with the diagonal of the empirical Fisher matrix;
            {parameter's name: scores of its shape};
            or a function without arguments that returns one of these.
        parameters: what `prune.global_unstructured` or `ModelPruning` is given, in the same order.
            None: they are recognised by their values, which takes a comparison of all of them.

    Returns:
        A class: `.apply(module, name, amount)`, `prune.global_unstructured(parameters, it,
        amount=...)`, `ModelPruning(it, amount=...)`.

    Raises:
        TypeError: `scores` is none of these. What is wrong with scores themselves is told when the
            method is used, as a ValueError or RuntimeError that names the parameter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.utils import prune
        >>> from taylor_kernels.integrations.torch_prune import unstructured
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model(torch.randn(32, 8)).square().mean().backward()
        >>> places = [(model[0], "weight"), (model[2], "weight")]
        >>> prune.global_unstructured(places, unstructured(model), amount=0.25)
        >>> int(sum((module.weight == 0).sum() for module, _ in places))
        48
    """
    found = WeightScores(model, scores, parameters)
    return type(
        "TaylorUnstructured", (TaylorUnstructured,), {"scores": found, "__module__": __name__}
    )


def structured(
    model: nn.Module, scores: FilterSource | Callable[[], FilterSource]
) -> type[TaylorStructured]:
    """A pruning method that masks whole filters of a model's layers, those with the least scores.

    Args:
        model: whose layers are to be pruned.
        scores: a `tk.Importance` on the model, {layer's name: [filters]}, or a function without
            arguments that returns one of these; looked up whenever the method is used.

    Returns:
        A class: `.apply(module, "weight", amount)`. PyTorch has no global structured pruning;
        `tk.Pruner` does that, and what goes together goes together there.

    Raises:
        TypeError: `scores` is none of these.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> from torch import nn
        >>> from torch.nn.utils import prune
        >>> from taylor_kernels.integrations.torch_prune import structured
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
        >>> importance = tk.Importance(model, "taylor_fo_bn")
        >>> model(torch.randn(4, 3, 9, 9)).square().mean().backward()
        >>> importance.update()
        >>> method = structured(model, importance).apply(model[0], "weight", amount=0.5)
        >>> int(model[0].weight.flatten(1).any(1).sum())
        4
        >>> prune.remove(model[0], "weight").weight.shape
        torch.Size([8, 3, 3, 3])
    """
    found = FilterScores(model, scores)
    return type("TaylorStructured", (TaylorStructured,), {"scores": found, "__module__": __name__})


def model_pruning(
    method: type[TaylorUnstructured] | type[TaylorStructured],
    *,
    parameters_to_prune: Sequence[Place] = (),
    **options: Any,
) -> Any:
    """Lightning's `ModelPruning` that takes the amount from each parameter by itself.

    Lightning takes a class with `use_global_unstructured=True` alone, which suits `unstructured`:
    `ModelPruning(unstructured(model), amount=0.3)`. A structured method, and one that is to prune
    each layer by itself, come to it by this function.

    Args:
        method: made by `structured` or `unstructured`.
        parameters_to_prune: [(module, name)]; nothing means the weights of all layers that have
            filters.
        options: further ones of `ModelPruning`, but for `pruning_fn` and `use_global_unstructured`.

    Raises:
        ModuleNotFoundError: Lightning is not installed.
    """
    try:
        from lightning.pytorch.callbacks import ModelPruning
    except ModuleNotFoundError as error:
        raise absent(error, "lightning", "lightning", "2.6.6") from error
    callback = ModelPruning(
        "l1_unstructured",  # a name is needed, and replaced
        parameters_to_prune=list(parameters_to_prune) or method.scores.layers(),
        use_global_unstructured=False,
        **options,
    )
    callback.pruning_fn = method.apply
    callback._pruning_method_name = method.__name__
    return callback
