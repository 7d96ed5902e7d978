"""The criteria that there are, by name."""

from __future__ import annotations

import difflib

from taylor_kernels.criteria.criterion import Criterion

_CRITERIA: dict[str, Criterion] = {}


def register_criterion(criterion: Criterion) -> Criterion:
    """Make a criterion known by its name.

    Raises:
        TypeError: it is no `Criterion`.
        ValueError: the name is taken.

    Example:
        >>> import taylor_kernels as tk
        >>> criterion = tk.Criterion("weight_sum", "magnitudes", lambda table: table[:, 0])
        >>> tk.register_criterion(criterion) is criterion
        True
        >>> "weight_sum" in tk.criterion_names()
        True
    """
    if not isinstance(criterion, Criterion):
        raise TypeError(
            f"criterion: expected a tk.Criterion, got {type(criterion).__name__}; make one of a "
            "name, a statistic and a score function"
        )
    if criterion.name in _CRITERIA:
        raise ValueError(
            f"criterion: {criterion.name!r} is registered already; choose another name"
        )
    _CRITERIA[criterion.name] = criterion
    return criterion


def criterion_names() -> list[str]:
    """The names of all registered criteria.

    Example:
        >>> import taylor_kernels as tk
        >>> tk.criterion_names()[:3]
        ['taylor_fo', 'taylor_fo_joint', 'taylor_abs']
    """
    return list(_CRITERIA)


def get_criterion(criterion: str | Criterion) -> Criterion:
    """The criterion of that name; a `Criterion` is returned as it is.

    Raises:
        TypeError: it is neither a name nor a `Criterion`.
        ValueError: no such name; the message holds the nearest right ones.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if not isinstance(criterion, str):
        raise TypeError(
            f"criterion: expected a name or a tk.Criterion, got {type(criterion).__name__}"
        )
    if criterion not in _CRITERIA:
        near = _near(criterion)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"there are {criterion_names()}"
        )
        raise ValueError(f"criterion: {criterion!r} is not known; {hint}")
    return _CRITERIA[criterion]


def _near(name: str) -> list[str]:
    """At most three names that may have been meant: this one in other letters, those that have its
    words, or those that are spelt alike."""
    name = name.lower().replace("-", "_").replace(" ", "_")
    if name in _CRITERIA:
        return [name]
    holding = [known for known in _CRITERIA if set(name.split("_")) <= set(known.split("_"))]
    return holding[:3] or difflib.get_close_matches(name, _CRITERIA, n=3, cutoff=0.4)
