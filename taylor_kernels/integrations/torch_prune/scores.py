"""The scores that a pruning method carries, looked up by the module and name that it is used on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from taylor_kernels.importance import Importance
from taylor_kernels.layout import accumulator
from taylor_kernels.parameter_fisher import ParameterFisher
from taylor_kernels.statistics.layers import filter_axis, filter_count, is_layer

#: A parameter as torch.nn.utils.prune names it.
Place = tuple[nn.Module, str]
#: Where scores of single weights, and of filters, come from.
WeightSource = ParameterFisher | Mapping[str, Tensor] | None
FilterSource = Importance | Mapping[str, Tensor]

#: In this order Lightning's ModelPruning takes what it is not told.
_NAMES = ("weight", "bias")


class WeightScores:
    """A score for each weight of a model; see `unstructured`."""

    def __init__(
        self,
        model: nn.Module,
        source: WeightSource | Callable[[], WeightSource],
        parameters: Sequence[Place] | None,
    ) -> None:
        known = (ParameterFisher, Mapping)
        if source is not None and not isinstance(source, known) and not callable(source):
            raise TypeError(
                "scores: expected None, a tk.ParameterFisher, {parameter's name: tensor} or a "
                f"function that returns one, got {type(source).__name__}"
            )
        self._model = model
        self._source = source
        self._names = _names_of(model)
        self._parameters = None if parameters is None else list(parameters)

    def layers(self) -> list[Place]:
        """The weights of all layers that have filters."""
        return layer_weights(self._model)

    def of(self, module: nn.Module, name: str) -> Tensor:
        """Scores in the shape of a parameter.

        Raises:
            ValueError: it is none of the model's, or has no scores, or these do not fit.
            RuntimeError: it has no gradient, or the meter has counted nothing yet.
        """
        return self._reader()(module, name)

    def of_values(self, values: Tensor) -> Tensor:
        """Scores in the place of the values, not yet masked, of some parameters after each other.

        Raises:
            ValueError: they are not those of `parameters`, or cannot be told apart.
        """
        read = self._reader()
        found = [
            _left(module, name, read(module, name)).to(values.device)
            for module, name in self._places(values)
        ]
        return torch.cat(found) if found else values

    def _reader(self) -> Callable[[nn.Module, str], Tensor]:
        source = self._source
        if callable(source) and not isinstance(source, (ParameterFisher, Mapping)):
            source = source()
        names: Mapping[nn.Parameter, list[str]]
        if isinstance(source, ParameterFisher):
            squares = source.compute()
            names = {parameter: [name] for name, parameter in source._parameters.items()}
        else:
            squares, names = dict(source or {}), self._names

        @torch.no_grad()
        def read(module: nn.Module, name: str) -> Tensor:
            parameter = _held(module, name)
            if parameter not in self._names:
                raise ValueError(
                    f"{type(module).__name__}.{name}: is no parameter of the model that has the "
                    "scores"
                )
            what, wide = self._names[parameter][0], parameter.to(accumulator(parameter.dtype))
            if source is None:
                if parameter.grad is None:
                    raise RuntimeError(
                        f"{what}: has no gradient; prune after backward() and before zero_grad(), "
                        "and leave frozen parameters out"
                    )
                return (parameter.grad.to(wide.dtype) * wide).square()
            score = next((squares[n] for n in names.get(parameter, ()) if n in squares), None)
            if isinstance(source, ParameterFisher) and score is not None:
                score = 0.5 * score * wide.square()
            return _checked(what, score, parameter.shape)

        return read

    def _places(self, values: Tensor) -> Iterator[Place]:
        """The parameters whose values these are."""
        if self._parameters is not None:
            mine = [_left(*place, getattr(*place).detach()) for place in self._parameters]
            if not torch.equal(torch.cat(mine).to(values), values):
                raise ValueError(
                    "parameters: their values are not those that are to be pruned; hand the same "
                    "list, in the same order, to unstructured(parameters=) and to the pruning, "
                    "and no importance_scores"
                )
            yield from self._parameters
            return
        left = {
            place: _left(*place, getattr(*place).detach()).to(values)
            for place in _places(self._model, _NAMES)
        }
        left = {place: mine for place, mine in left.items() if len(mine)}
        at = 0
        while at < len(values):
            found = [
                p for p, mine in left.items() if torch.equal(values[at : at + len(mine)], mine)
            ]
            if len(found) != 1:
                raise ValueError(
                    "parameters: "
                    + ("several" if found else "none")
                    + f" of the model's have the values that are to be pruned from {at} on; hand "
                    "unstructured(parameters=) the list of (module, name) that is pruned, and the "
                    "pruning no importance_scores"
                )
            yield found[0]
            at += len(left.pop(found[0]))


class FilterScores:
    """A score for each filter of a model's layers; see `structured`."""

    def __init__(self, model: nn.Module, source: FilterSource | Callable[[], FilterSource]) -> None:
        if not isinstance(source, (Importance, Mapping)) and not callable(source):
            raise TypeError(
                "scores: expected a tk.Importance, {layer's name: tensor} or a function that "
                f"returns one, got {type(source).__name__}"
            )
        self._model = model
        self._source = source
        self._names = {module: name for name, module in model.named_modules()}

    def layers(self) -> list[Place]:
        """The weights of the layers that have scores; of all layers where that is not known."""
        source = self._source
        known = source._layers if isinstance(source, Importance) else source
        scored = layer_weights(self._model)
        if isinstance(known, Mapping):
            scored = [place for place in scored if self._names[place[0]] in known]
        return scored

    def of(self, module: nn.Module, name: str) -> tuple[Tensor, int]:
        """Scores in the shape of a layer's weight, and the dimension along which filters lie.

        Raises:
            ValueError: it is none of the model's, or has no scores, or these do not fit.
            RuntimeError: the meter has counted nothing yet.
        """
        what = self._names.get(module)
        if what is None or name != "weight" or not is_layer(module):
            raise ValueError(
                f"{type(module).__name__}.{name}: has no filters of the model that has the scores; "
                "structured pruning takes the weights of its convolutions and linear layers"
            )
        axis, count = filter_axis(module), filter_count(module)
        shape = _held(module, name).shape
        if shape[axis] != count:
            raise ValueError(
                f"{what}: the filters of a transposed convolution with groups do not lie along one "
                "dimension of its weight, so that no structured pruning of PyTorch's masks them"
            )
        score = _checked(what, self._read().get(what), torch.Size([count]))
        return score.view(-1, *[1] * (len(shape) - axis - 1)).expand(shape), axis

    def _read(self) -> Mapping[str, Tensor]:
        source = self._source
        if callable(source) and not isinstance(source, (Importance, Mapping)):
            source = source()
        return source.compute() if isinstance(source, Importance) else source


def layer_weights(model: nn.Module) -> list[Place]:
    """The weights of a model's convolutions and linear layers."""
    return [(module, name) for module, name in _places(model, ("weight",)) if is_layer(module)]


def _places(model: nn.Module, names: Sequence[str]) -> Iterator[Place]:
    """All parameters of these names, in the order in which ModelPruning takes them."""
    for name in names:
        for module in model.modules():
            if module._parameters.get(f"{name}_orig", module._parameters.get(name)) is not None:
                yield module, name


def _names_of(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every name of every parameter; one that is masked has that of before, too."""
    names: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module._parameters.items():
            if parameter is not None:
                own = {local, local.removesuffix("_orig")}
                whole = [f"{path}.{name}".lstrip(".") for name in sorted(own)]
                names.setdefault(parameter, []).extend(whole)
    return names


def _held(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that is trained: masked ones have another name."""
    parameter = module._parameters.get(f"{name}_orig", module._parameters.get(name))
    if parameter is None:
        raise ValueError(f"name: {type(module).__name__} has no parameter {name!r}")
    return parameter


def _left(module: nn.Module, name: str, table: Tensor) -> Tensor:
    """A flat view of what is not masked."""
    mask = getattr(module, f"{name}_mask", None)
    return table.flatten() if mask is None else table[mask == 1]


def _checked(what: str, score: Tensor | None, shape: torch.Size) -> Tensor:
    if score is None:
        raise ValueError(f"{what}: has no scores; give it some, or leave it out of what is pruned")
    if score.shape != shape:
        raise ValueError(
            f"{what}: its scores are of shape {tuple(score.shape)}, not {tuple(shape)}"
        )
    if not (score >= 0).all():
        raise ValueError(f"{what}: some of its scores are negative or nan, which rank nothing")
    return score.detach()
