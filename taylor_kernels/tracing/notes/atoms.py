"""Atoms, by which a run says what has to go for what, and why some of them stay.

An atom is an int64 number: one index of one dimension of a parameter or buffer, or a place that a
reshape made. Atom 0 stands for what is no parameter's and can never go (a batch entry, a pixel, a
channel of the input). Vectors of atoms are numpy arrays: they are short, and there are many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.int64]
#: Why an atom that met no other stays.
MEETS_FIXED = "meets a tensor of fixed width, which follows no parameter or buffer"


@dataclass(frozen=True)
class Reason:
    """Why atoms cannot go.

    Attributes:
        text: one clause that completes "this channel ...".
        module: the module that ran, "" for the model itself.
        operation: the operation's name, "" where no operation is to blame.
        mixer: the kind of normalisation or reduction that mixes these atoms ("native_layer_norm",
            "softmax", ...), "" where nothing is mixed.
    """

    text: str
    module: str = ""
    operation: str = ""
    mixer: str = ""

    def __str__(self) -> str:
        return self.text


def address(vector: Vector) -> int:
    """Where in memory the atoms of a vector begin."""
    found: int = vector.__array_interface__["data"][0]
    return found
