"""What every statistic is: a meter on some layers of a model that gives a table per layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from taylor_kernels.statistics.hooks.sites import GateSites
from taylor_kernels.statistics.hooks.streaming import GradientStream
from taylor_kernels.statistics.layers import Layers, filter_count
from taylor_kernels.statistics.tables import PackedTables

#: Runs the model and returns the loss, a scalar.
Closure = Callable[[], Tensor]

#: What must be there before a statistic is collected, from the least to the most:
#: the weights alone; a forward pass; a forward and a backward pass, which scoring() may spare the
#: weight gradients; the same with weight gradients; nothing, since the statistic runs the model
#: itself through a closure.
Reads = Literal["weights", "forward", "activations", "weight gradients", "closure"]
READS = get_args(Reads)
AcrossRanks = Literal["sum", "mean", "examples", "whole"]


class Statistic(ABC):
    """A meter on `layers` (name -> convolution or linear module) of `model`.

    A subclass says what it is in the class attributes, and `collect()` gives its tables. Over
    coupled filters, which share a gate, the pruner adds rows up before it scores them (or takes
    their mean, or the first: `Criterion.coupled`), so columns should be of a kind that adds up.

    Attributes:
        name: what a `Criterion` calls it by.
        columns: what the columns of a layer's table are, in a few words.
        reads: one of `READS`. Layers whose weight is frozen are left out of a statistic that
            reads weight gradients.
        per_example: each column is an observation of its own, as of an example; a criterion's
            score may then give one number for each.
        prunable: it says something of filters that are removed together, so a pruner can use it.
        drawn: it is one random draw; a study takes the mean over many.
        nan_means: what nan in a table means and what to do about it, if it has a meaning.
        at_gates: it stands on gates, and takes their `sites` where they are known.
        gradient_sites: the slope of the loss over a minibatch is all that it needs of a gate, which
            can be read off a weight's gradient where examples cannot be told apart.
        across_ranks: how the tables of processes that each see a part of a minibatch make that of
            the whole: "sum", where what `shared` makes of a table is linear in the loss; "mean",
            a mean over the `examples`; "examples", a column for each; "whole", where squares of
            sums are in it already, so that each table is one of a minibatch of its own.
        shared_columns: how many columns `shared` gives.
        same_draws: what it draws at an update is to be the same on all ranks.
        mask: of an update that is being collected, for each pass which examples count ([N] or
            [N, T] bool), if some do not.
        reads_bare: its layers may be parameters that no layer holds (`statistics.parts.BareLayer`).
        moments: of `tk.MOMENTS` those that the criterion reads; None for all.
        streams: it can take each gradient as it comes (`start_stream`).
        stream: what hands them over, and frees them, where it does.

    Example:
        >>> import taylor_kernels as tk
        >>> class WeightSum(tk.Statistic):
        ...     name = "weight_sum"
        ...     columns = "1: sum of the weights"
        ...     reads = "weights"
        ...
        ...     def collect(self, *, loss_scale=1.0, closure=None):
        ...         weights = [layer.weight.detach() for layer in self.layers.values()]
        ...         return [weight.flatten(1).sum(1, keepdim=True) for weight in weights]
        >>> WeightSum.prunable, WeightSum.per_example
        (True, False)
    """

    name: ClassVar[str]
    columns: ClassVar[str]
    reads: ClassVar[Reads]
    per_example: ClassVar[bool] = False
    prunable: ClassVar[bool] = True
    drawn: ClassVar[bool] = False
    nan_means: ClassVar[str] = ""
    at_gates: ClassVar[bool] = False
    gradient_sites: ClassVar[bool] = False
    across_ranks: ClassVar[AcrossRanks] = "whole"
    shared_columns: ClassVar[int] = 1
    same_draws: ClassVar[bool] = False
    mask: list[Tensor] | None = None
    reads_bare: ClassVar[bool] = False
    moments: Sequence[str] | None = None
    streams: ClassVar[bool] = False
    stream: GradientStream | None = None

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        backend: str | None = None,
        sites: GateSites | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.backend = backend
        self.sites = sites
        self.updates = 0  # how often collect() drew something at random: the seed of the next
        self.unread: frozenset[str] = frozenset()  # layers of the last collect() without a value
        self.examples = 1  # that the tables of the last collect() are means over, where they are

    @abstractmethod
    def collect(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> list[Tensor]:
        """The tables of all layers since the last call, [F, K] each, in the order of `layers`.

        A list of floating-point tensors; a graph that they carry is not kept.

        A layer that could not be read for a reason of its own (nothing before it is trained, say)
        has a table of zeros, and its name is in `unread`.

        Args:
            loss_scale: what the loss was multiplied by before backward(); divided out. A closure's
                loss is taken as it is.
            closure: computes the loss of the model as it stands; given if it `reads` "closure".
        """

    @property
    def spread(self) -> list[int] | None:
        """How many ranks hold different parts of each layer's weight, if any layer's is in parts;
        tables have then the rows, or the sums, of this rank's part, which add up to the whole."""
        return None

    @property
    def counts_here(self) -> bool:
        """Whether this rank's tables count: of ranks that see one minibatch, those of one do."""
        return True

    @classmethod
    def shared(cls, table: Tensor) -> Tensor:
        """[F, shared_columns]: what a rank gives to the others of a table that adds up."""
        return table

    @classmethod
    def unshared(cls, columns: Tensor) -> Tensor:
        """A table that has the scores of those whose `shared` columns these are the sums of."""
        return columns

    def is_finite(self, table: Tensor) -> Tensor:
        """Whether what a criterion reads of a table is, a bool on its device."""
        return table.isfinite().all()

    @property
    def noise(self) -> list[str]:
        """Layers of which it was found to be rounding noise; their tables hold nan from then on."""
        return []

    def start_stream(self, *, watch: bool) -> None:
        """From now on take each gradient in backward(), and free it there; sets `stream`.

        Args:
            watch: note whether the gradients are finite.

        Raises:
            NotImplementedError: it does not `streams`.
        """
        raise NotImplementedError(f"statistic {self.name!r} does not take gradients as they come")

    def discard(self) -> None:  # noqa: B027 - most statistics gather nothing between updates
        """Forget what was gathered since the last collect(): a minibatch is not to count."""

    def close(self) -> None:  # noqa: B027 - and put no hook on the model
        """Take every hook off the model."""


def check_streams(statistic: type[Statistic], criterion: str) -> None:
    """The gradients that a criterion's statistic reads can be streamed.

    Raises:
        ValueError: they cannot, or it reads none.
    """
    if statistic.streams:
        return
    instead = {
        "weights": "it reads the weights alone, so pass no stream",
        "forward": "it needs no backward pass, so pass no stream",
        "activations": "it reads no weight gradient: run the passes inside tk.scoring(model), "
        "where none is made, and pass no stream",
        "weight gradients": f"its statistic {statistic.name!r} reads them all at once",
        "closure": "it runs the model itself and leaves no gradient, so pass no stream",
    }
    raise ValueError(
        f"stream: {criterion!r} cannot take gradients one by one: {instead[statistic.reads]}"
    )


def check_closure(statistic: Statistic, closure: object, criterion: str, method: str) -> None:
    """A closure is there where the criterion's statistic needs one, and nowhere else.

    Raises:
        ValueError, TypeError: it is not so; `method` is what was called.
    """
    needed = statistic.reads == "closure"
    if needed and closure is None:
        raise ValueError(
            f"closure: {criterion!r} runs the model itself; call "
            f"{method}(closure=lambda: loss_fn(model(x), y))"
        )
    if closure is not None and not needed:
        raise ValueError(
            f"closure: {criterion!r} takes none, it reads what loss.backward() has left; call "
            f"{method}() without"
        )
    if closure is not None and not callable(closure):
        raise TypeError(f"closure: expected a function, got {type(closure).__name__}")


def checked_tables(statistic: Statistic, found: object) -> list[Tensor]:
    """What collect() gave, without its graph, if it is a table of each layer.

    Raises:
        ValueError: it is not; the message names the statistic and the layer.
    """
    given, layers = f"statistic {statistic.name!r}: collect() gave", statistic.layers
    if isinstance(found, PackedTables) and found.layers == [*layers] and found.rows is not None:
        return found  # made by this package, of these layers, and without a graph
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"{given} {type(found).__name__}; expected a list of tables")
    if len(found) != len(layers):
        raise ValueError(
            f"{given} {len(found)} tables for {len(layers)} layers; expected one for each of "
            f"{', '.join(layers)}, in this order"
        )
    for (name, layer), table in zip(layers.items(), found, strict=True):
        filters, fits = filter_count(layer), isinstance(table, Tensor)
        if fits and table.is_floating_point() and table.dim() == 2 and table.size(0) == filters:
            continue
        shape = f"a tensor of {table.dtype}, of shape {tuple(table.shape)}," if fits else ""
        raise ValueError(
            f"{given} {shape or type(table).__name__} for layer {name!r}; expected floating-point "
            f"numbers, [{filters} filters, columns]"
        )
    return [table.detach() for table in found]


def check_loss_scale(loss_scale: object) -> None:
    """What a loss was multiplied by is a positive number, or a ValueError."""
    if not isinstance(loss_scale, (int, float)) or not 0 < loss_scale < float("inf"):
        raise ValueError(f"loss_scale: {loss_scale!r} is not a positive number")


def check_weight(weight: object) -> None:
    """What a rank's minibatch counts for is a positive number, or a ValueError."""
    if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ValueError(
            f"weight: {weight!r} is not a positive number; a rank that has no minibatch calls "
            "absent()"
        )


def check_no_noise(noise: Sequence[str]) -> None:
    """No layer's statistic is rounding noise, or a RuntimeError that names those of which it is."""
    if noise:
        raise RuntimeError(
            f"{', '.join(noise)}: the gradients of its gates are rounding noise, since code that "
            "could not be followed normalises each channel later on, so that they say nothing of "
            "what may go; use taylor_fo, or leave it out (ignore=)"
        )


def version_of(tensor: Tensor) -> int:
    """Counts changes in place; those of tensors of torch.inference_mode() are not counted."""
    return 0 if tensor.is_inference() else tensor._version
