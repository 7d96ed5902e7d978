"""Which parameters of a model are followed, and each in which way.

A parameter whose module is of a known kind needs that module's input and the gradient of its
output. For any other a module that holds it is run once more for each example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from taylor_kernels.checks import check_names
from taylor_kernels.parameter_fisher.kinds import Kind, kinds_of
from taylor_kernels.parameter_fisher.rerun import differentiable

#: Modules whose parameters other code uses in their place, so that they are not called themselves.
_UNITS = (nn.MultiheadAttention,)
_NEVER_CALLED = (
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    parametrize.ParametrizationList,
)


def find_parameters(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The trained parameters of a model by name: all, or those that `names` match."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if names is not None:
        names = check_names("parameters", names)
    for pattern in names or ():
        if not any(_matches(name, pattern) for name in trained):
            raise ValueError(
                f"parameters: {pattern!r} matches no trained parameter; there are "
                f"{', '.join(trained) or 'none'}"
            )
    if names is not None:
        trained = {n: p for n, p in trained.items() if any(_matches(n, x) for x in names)}
    if not trained:
        raise ValueError("model: has no trained parameter, so that there is nothing to follow")
    return trained


def _matches(name: str, pattern: str) -> bool:
    """A name that holds brackets, as a key of a ModuleDict may, stands for itself."""
    return name == pattern or fnmatchcase(name, pattern)


def find_ways(
    model: nn.Module, names: Mapping[nn.Parameter, str]
) -> tuple[dict[str, dict[str, Kind]], dict[str, dict[str, str]]]:
    """{module: {parameter: kind}}, and {module to be run again: {parameter: name there}}.

    Args:
        names: the parameters that are followed -> their names in the model.
    """
    modules = dict(model.named_modules())
    kinds: dict[str, dict[str, Kind]] = {}
    units: dict[str, dict[str, str]] = {}
    inside = [
        name
        for name, module in modules.items()
        if isinstance(module, _UNITS) or parametrize.is_parametrized(module)
    ]
    for path, module in modules.items():
        own = {
            local: names[p]
            for local, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if p in names
        }
        if not own:
            continue
        unit = next((u for u in inside if not u or f"{path}.".startswith(f"{u}.")), None)
        known = kinds_of(module) if unit is None else {}
        if known:
            kinds[path] = {name: known[local] for local, name in own.items()}
            continue
        if unit is None:
            unit = path
            while isinstance(modules[unit], _NEVER_CALLED):
                unit = unit.rpartition(".")[0]
        within = path[len(unit) + 1 :] if unit else path
        for local, name in own.items():
            units.setdefault(unit, {})[name] = f"{within}.{local}" if within else local
    return kinds, units


def uses_in_graph(output: Any, names: Mapping[nn.Parameter, str]) -> dict[str, int]:
    """How often the graph of an output uses each parameter: name -> uses, of those that it uses.

    Args:
        names: the parameters to look for -> their names.
    """
    found: dict[str, int] = {}
    visited = set()
    stack = [tensor.grad_fn for tensor in differentiable(output) if tensor.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        for following, _ in node.next_functions:
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is None:
                stack.append(following)
            elif variable in names:
                name = names[variable]
                found[name] = found.get(name, 0) + 1
    return found


def parents(path: str) -> Iterator[str]:
    """Of a module's path, those of all that hold it, the whole model excepted."""
    while path := path.rpartition(".")[0]:
        yield path
