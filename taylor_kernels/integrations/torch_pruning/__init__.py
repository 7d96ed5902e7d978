"""Torch-Pruning's importances on the kernels of this package.

    from taylor_kernels.integrations.torch_pruning import GroupTaylorImportance

    pruner = tp.pruner.BasePruner(model, example, importance=GroupTaylorImportance(), ...)

Each class is a subclass of Torch-Pruning's own with its constructor. By default all parameters that
go with a channel count, as Torch-Pruning's own do not; `strict_compat=True` gives its numbers.
`tk_importance` puts any criterion of this package behind the same door.
"""

try:
    import torch_pruning as _library  # noqa: F401 - says now whether it is there
except ModuleNotFoundError as error:
    from taylor_kernels.integrations import absent

    raise absent(error, "torch_pruning", "'torch-pruning>=1.6.1,<1.7'", "1.6.1") from None

from taylor_kernels.integrations.torch_pruning.criterion import CriterionImportance, tk_importance
from taylor_kernels.integrations.torch_pruning.hessian import (
    GroupHessianImportance,
    HessianImportance,
)
from taylor_kernels.integrations.torch_pruning.obdc import OBDCImportance
from taylor_kernels.integrations.torch_pruning.taylor import GroupTaylorImportance, TaylorImportance

__all__ = [
    "CriterionImportance",
    "GroupHessianImportance",
    "GroupTaylorImportance",
    "HessianImportance",
    "OBDCImportance",
    "TaylorImportance",
    "tk_importance",
]
