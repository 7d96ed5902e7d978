"""The statistics that criteria can be computed from, by name."""

from __future__ import annotations

import inspect
from typing import TypeVar

from taylor_kernels.statistics.base import READS, Statistic

_STATISTICS: dict[str, type[Statistic]] = {}
_S = TypeVar("_S", bound=type[Statistic])


def register_statistic(statistic: _S) -> _S:
    """Make a statistic known by its `name`; a decorator of subclasses of `tk.Statistic`.

    Raises:
        TypeError: it is no class of a statistic, or has no collect().
        ValueError: its name is missing or taken, or it reads something unknown.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> @tk.register_statistic
        ... class GreatestWeight(tk.Statistic):
        ...     name = "greatest_weight"
        ...     columns = "1: max abs(w)"
        ...     reads = "weights"
        ...
        ...     def collect(self, *, loss_scale=1.0, closure=None):
        ...         weights = [layer.weight.detach() for layer in self.layers.values()]
        ...         return [weight.abs().flatten(1).amax(1, keepdim=True) for weight in weights]
        >>> criterion = tk.Criterion(
        ...     "greatest_weight", "greatest_weight", lambda table: table[:, 0], coupled="mean"
        ... )
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
        >>> imp = tk.Importance(model, criterion)
        >>> imp.update()
        >>> imp.compute()
        {'': tensor([3., 2.])}
    """
    if not (isinstance(statistic, type) and issubclass(statistic, Statistic)):
        raise TypeError(f"statistic: expected a subclass of tk.Statistic, got {statistic!r}")
    shown = statistic.__name__
    if inspect.isabstract(statistic):
        raise TypeError(f"statistic: {shown} has no collect()")
    name = getattr(statistic, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"statistic: {shown} has no name; set the class attribute `name`")
    if name in _STATISTICS:
        raise ValueError(f"statistic: {name!r} is registered already; choose another name")
    if getattr(statistic, "reads", None) not in READS:
        raise ValueError(
            f"statistic: what {shown} reads is {getattr(statistic, 'reads', None)!r}; set the "
            f"class attribute `reads` to one of {', '.join(map(repr, READS))}"
        )
    if not isinstance(getattr(statistic, "columns", None), str):
        raise ValueError(
            f"statistic: {shown} does not say what its columns are; set the class attribute "
            "`columns`"
        )
    _STATISTICS[name] = statistic
    return statistic


def statistic_names() -> list[str]:
    """The names of all registered statistics.

    Example:
        >>> import taylor_kernels as tk
        >>> "moments" in tk.statistic_names()
        True
    """
    return list(_STATISTICS)


def get_statistic(name: str) -> type[Statistic]:
    """The statistic of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _STATISTICS:
        raise ValueError(f"statistic: {name!r} is not one of {', '.join(_STATISTICS)}")
    return _STATISTICS[name]


def statistics_table() -> str:
    """All registered statistics as a table in Markdown."""
    rows = [("statistic", "columns of a layer's table", "reads"), (":--", ":--", ":--")]
    for name, one in _STATISTICS.items():
        beside = "" if one.prunable else "; not for the pruner"
        rows.append((f"`{name}`", f"{one.columns}{beside}".replace("|", "\\|"), one.reads))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
