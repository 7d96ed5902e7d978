"""Steps: which norms and products a channel goes through, one after the other.

A norm gives channels a new scale, a product takes them up and makes others. Between two steps
values are only moved, combined place by place or pooled. What a tensor was made of since the last
step is kept for its memory, so views and writes in place need no rule of their own; which of its
channels came from which step is read off the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.notes.operations import RECURRENT, memory_of
from taylor_kernels.tracing.notes.steps import END, NORM, PRODUCT, Norm, Product, Step
from taylor_kernels.tracing.run.frames import Frame

if TYPE_CHECKING:
    from taylor_kernels.tracing.run.calls import Call
    from taylor_kernels.tracing.run.recorder import Recorder

#: Products of two activations, or with a weight that cannot be followed.
CONTRACTIONS = {
    "mm", "bmm", "matmul", "mv", "dot", "vdot", "inner", "addmm", "baddbmm", "addmv", "linear",
    "convolution", "scaled_dot_product_attention",
}  # fmt: skip


_NONE: frozenset[int] = frozenset()


class Flow:
    """Follows a run and writes its steps into the record."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._steps = recorder.record.steps
        self._marks: dict[int, frozenset[int]] = {}

    def leave(self, frame: Frame, output: Any) -> None:
        """A module has run."""
        if not isinstance(output, Tensor):
            return
        for step, made, dim in frame.made:
            if not _same_values(output, made):
                continue
            vector = self._recorder.labels(output).dims[dim] if output.dim() >= -dim else None
            if vector is not None:
                step.outputs, step.output_dim = vector, dim

    def follow(
        self, call: Call, outs: Sequence[Tensor], products: list[Product], norms: list[Norm]
    ) -> None:
        """An operation has run, in which these products and norms were found."""
        marks = self._marks
        sources = _NONE
        for key in call.memories:
            mark = marks.get(key, _NONE)
            sources = sources | mark if sources and mark else sources or mark
        first = len(self._steps)
        for norm in norms:
            step = Step(NORM, self._recorder.module, norm.atoms, norm.atoms, sources)
            self._add(step, outs, 1 - outs[0].dim())
        recurrent = call.name in RECURRENT
        if recurrent:
            self._recurrent(call, outs, products, sources)
        for product in () if recurrent else products:
            self._product(call, outs, product, sources)
        if call.name in CONTRACTIONS and not products:
            vectors = [vector for tensor in call.tensors for vector in call.of(tensor).vectors()]
            passing = [v for out in outs for v in self._recorder.labels(out).vectors()]
            self._end(vectors, sources, passing)
        fresh = _NONE
        if len(self._steps) > first:
            made = range(first, len(self._steps))
            fresh = frozenset([number for number in made if self._steps[number].kind != END])
        for key in call.lies or map(self._recorder.memories.hold, outs):
            mark = fresh or sources
            if key in marks and key in call.memories:
                mark |= marks[key]
            marks[key] = mark

    def forget(self, call: Call) -> None:
        """An operation on what no step has made: its memory may have been another tensor's."""
        for key in call.lies:
            if key not in call.memories:
                self._marks.pop(key, None)

    def reaches_output(self, tensor: Tensor, labels: Labels) -> None:
        """The model has returned a tensor."""
        self._end(labels.vectors(), self._marks.get(memory_of(tensor), _NONE))

    def _add(self, step: Step, outs: Sequence[Tensor], dim: int) -> None:
        self._steps.append(step)
        frame = self._recorder.frame
        if frame.module is not None and outs:
            frame.made.append((step, outs[0], dim))

    def _end(
        self,
        vectors: Sequence[Vector],
        sources: frozenset[int],
        passing: Sequence[Vector] = (),
    ) -> None:
        if vectors and sources:
            none = np.zeros(0, np.int64)
            passed = np.concatenate(passing) if passing else none
            self._steps.append(
                Step(END, self._recorder.module, np.concatenate(vectors), passed, sources)
            )

    def _product(
        self, call: Call, outs: Sequence[Tensor], product: Product, sources: frozenset[int]
    ) -> None:
        weight = call.arg("weight")
        space = weight.dim() - 2 if "conv" in call.name and isinstance(weight, Tensor) else 0
        groups = product.groups
        depthwise = groups is not None and groups.size == product.inputs.size
        step = Step(
            PRODUCT,
            self._recorder.module,
            product.inputs,
            product.outputs,
            sources,
            product.module,
            product.weight,
            # What PyTorch makes of a cell's one operation is out of sight in a run without a trace.
            linear=call.name == "linear"
            and isinstance(weight, nn.Parameter)
            and not self._recorder.composite,
            depthwise=depthwise,
        )
        if step.layer == step.module:
            step.input_dim = self._given(call, product.inputs, -1 - space)
        self._add(step, outs, -1 - space)

    def _recurrent(
        self, call: Call, outs: Sequence[Tensor], products: list[Product], sources: frozenset[int]
    ) -> None:
        """What it takes and gives is one step; inside, each weight gives what all of them read."""
        inputs = call.of(call.arg("input", "data")).dims[-1]
        outputs = self._recorder.labels(outs[0]).dims[-1]
        none = np.zeros(0, np.int64)
        inside = frozenset(range(len(self._steps), len(self._steps) + 1 + len(products)))
        step = Step(
            PRODUCT,
            self._recorder.module,
            none if inputs is None else inputs,
            none if outputs is None else outputs,
            sources,
        )
        step.input_dim = self._given(call, step.inputs, -1)
        self._add(step, (), -1)
        below = products[0].weight if products else ""
        for each in products:
            reads = none if each.weight == below else each.inputs
            self._steps.append(
                Step(
                    PRODUCT, self._recorder.module, reads, each.outputs, inside | sources,
                    each.module, each.weight,
                )
            )  # fmt: skip

    def _given(self, call: Call, inputs: Vector, dim: int) -> int | None:
        """`dim`, if the module's only argument is what the operation is given."""
        given = self._recorder.frame.given
        if len(given) != 1 or given[0].dim() < -dim or given[0].size(dim) != inputs.size:
            return None
        return dim if any(_same_values(given[0], tensor) for tensor in call.tensors) else None


def _same_values(one: Tensor, other: Tensor) -> bool:
    return memory_of(one) == memory_of(other) and one.numel() == other.numel()
