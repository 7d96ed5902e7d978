"""Criteria: how a filter's raw statistics become its score. Arithmetic only, no kernel is called.

A criterion names its statistic (taylor_kernels/statistics) and a function from a table of that,
[filters, columns], to scores. Of coupled filters the pruner first makes one row, then a score:
Taylor statistics add up (the shared gate of Molchanov et al.), magnitudes are averaged, since a
channel does not matter more for being made by more layers. Importing this package registers those
that it brings.
"""

from taylor_kernels.criteria.builtin import BUILTIN
from taylor_kernels.criteria.criterion import Criterion
from taylor_kernels.criteria.registry import criterion_names, get_criterion, register_criterion

__all__ = ["Criterion", "criterion_names", "get_criterion", "register_criterion"]

for _criterion in BUILTIN:
    register_criterion(_criterion)
