"""What channels go through in a run: norms, products with weights, and where they end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taylor_kernels.tracing.notes.atoms import Vector

#: Kinds of steps.
NORM, PRODUCT, END = "norm", "product", "end"


@dataclass(frozen=True)
class Norm:
    """A normalisation over batch and space, channel by channel (BatchNorm, InstanceNorm).

    Attributes:
        module: the module that ran; its class need not be a BatchNorm's.
        atoms: the channels that it normalises, in their order.
        weight: the name of its scale, "" where it has none.
        step: when it ran.
    """

    module: str
    atoms: Vector
    weight: str
    step: int


@dataclass(frozen=True)
class Product:
    """A weight that was multiplied with an activation: one use of a layer.

    Attributes:
        weight: the parameter's name.
        module: the module that owns it.
        inputs, outputs: atoms of the channels as the layer counts them.
        groups: atoms of the groups of a grouped convolution, else None.
        macs: how many multiply-adds it took.
        caller: the module that ran: another than `module` where code uses the weight of a layer
            that it does not call.
        step: when it ran.
        direct: by the parameter's own values, or a slice of them, and not by what is computed of
            them.
    """

    weight: str
    module: str
    inputs: Vector
    outputs: Vector
    groups: Vector | None
    macs: int
    caller: str
    step: int
    direct: bool


@dataclass
class Step:
    """A norm, a product, or an end of channels: another contraction, or the model's output.

    Attributes:
        kind: NORM, PRODUCT or END.
        module: the module that ran.
        layer: the layer whose weight was multiplied with, "" for other steps.
        inputs: atoms of the channels that it takes.
        outputs: atoms of the channels that it gives; of an end those that its result has too, as an
            attention over positions has the heads of its values.
        sources: numbers of the steps that its input was made by, with no other step between.
        weight: the parameter that was multiplied with, "" for other steps.
        linear: it was the whole parameter, in functional.linear.
        depthwise: each output channel is made of one input channel.
        input_dim: the channels' dimension, from the end, in the only tensor that the module was
            given; None where the step's input is not that tensor.
        output_dim: the same in the tensor that the module returned.
    """

    kind: str
    module: str
    inputs: Vector
    outputs: Vector
    sources: frozenset[int]
    layer: str = ""
    weight: str = ""
    linear: bool = False
    depthwise: bool = False
    input_dim: int | None = None
    output_dim: int | None = None

    def of(self, inputs: Vector, outputs: Vector) -> Step:
        """The same step of other channels."""
        other = Step.__new__(Step)  # `dataclasses.replace` takes ten times as long
        other.__dict__.update(self.__dict__, inputs=inputs, outputs=outputs)
        return other
