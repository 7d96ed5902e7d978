"""What channels that can go stand among: others in a norm or a cut, dimensions that are dropped."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from taylor_kernels.tracing.answer.vectors import Vectors
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.resolving.grids import FREE


class Surroundings:
    """What the code of a model does to channels beside others, so that not any number may go."""

    _record: Record
    _label: Vector
    _why: Vector
    _vectors: Vectors
    _least_normed: Vector | None  # of each class, as `least_normalised` says

    @property
    def normalised_together(self) -> Tensor:
        """[classes] bool: those that a norm across channels reads."""
        read = np.zeros(self._why.size, bool)
        for vector in self._vectors.normed_together:
            read[vector] = True
        return torch.from_numpy(read)

    def least_normalised(self, classes: Tensor) -> int:
        """How many channels of one norm across channels each of these classes has at least; 0 if
        no such norm reads any of them."""
        if self._least_normed is None:
            self._least_normed = np.zeros(self._why.size, np.int64)
            for vector in self._vectors.normed_together:
                own, counts = np.unique(vector, return_counts=True)
                before = self._least_normed[own]
                self._least_normed[own] = np.where(before, np.minimum(before, counts), counts)
        least = self._least_normed[classes.numpy()]
        least = least[least > 0]
        return int(least.min()) if least.size else 0

    @property
    def cut_beside_kept(self) -> Tensor:
        """[classes] bool: those that can go, of dimensions that code cuts and others cannot leave.

        A part that stays has a constant number of channels, or one that is worked out of the whole
        width and has not changed yet.
        """
        found = np.zeros(self._why.size, bool)
        for cut in self._record.cuts:
            classes = self._label[cut.vector]
            free = self._why[classes] == FREE
            if not free.all():
                found[classes[free]] = True
        return torch.from_numpy(found)

    def is_squeezed(self, classes: Tensor) -> bool:
        """Whether code drops a dimension that is of these classes alone, once each, as soon as one
        of them is left: it would go on with tensors of fewer dimensions."""
        vectors = (self._label[vector] for vector in self._record.squeezed)
        return any(
            np.isin(vector, classes.numpy()).all() and np.unique(vector).size == vector.size
            for vector in vectors
        )
