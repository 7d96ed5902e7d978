"""torch.nn.utils.prune, and Lightning's ModelPruning on top of it, with Taylor scores.

    from taylor_kernels.integrations.torch_prune import structured, unstructured

PyTorch's methods rank by the weights' magnitude unless every call is handed `importance_scores`.
Here a method carries its scores: it is a class that is used like `prune.L1Unstructured`, alone,
with `prune.global_unstructured`, or as the `pruning_fn` of Lightning's `ModelPruning`.
"""

from taylor_kernels.integrations.torch_prune.methods import (
    TaylorStructured,
    TaylorUnstructured,
    model_pruning,
    structured,
    unstructured,
)

__all__ = [
    "TaylorStructured",
    "TaylorUnstructured",
    "model_pruning",
    "structured",
    "unstructured",
]
