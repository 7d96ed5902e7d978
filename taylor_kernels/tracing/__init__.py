"""Which channels of a model go together: labels ride along one run.

The model of it. An *atom* is one index of one dimension of a parameter or buffer. Every tensor of
the run has, for each of its dimensions, a vector of atoms: what has to go for this place to go
(0: it never goes). Since a tensor stays a rectangle when channels are removed, a vector for each
dimension says all there is to say, and costs the sum of the sizes instead of their product.

Operations run as they are, below autograd and module code. Views are run on the label vectors
themselves; elementwise operations and contractions make the atoms that meet one (union-find);
what mixes the places of a dimension, or is not known, keeps its atoms, with the reason. A reshape
that cuts a dimension into a grid gives each axis atoms of its own and writes down a table: a cell
goes where one of its axes goes. At the end one axis of each table is chosen to shrink (whole heads,
or the k-th channel of every group): its atoms become one with their cells, the other axes stay.
Parts that are sliced off a dimension shrink in proportion, or with the attribute that counts them.

The rooms, none of which imports a later one: `model/` (what is read of a model that does not run),
`notes/` (what a run writes down), `run/`, `rules/` (what operations do with labels), `resolving/`
(from notes to classes of atoms), `answer/` (groups and units, what their removal asks, table and
picture); `tracing.py` takes a model through all of them.
"""

from taylor_kernels.tracing.answer.channels import Channels
from taylor_kernels.tracing.answer.units import IN, OUT, Entry, Group, Slot
from taylor_kernels.tracing.blocks import Block
from taylor_kernels.tracing.multihead import PrunedMultiheadAttention, follow_attention
from taylor_kernels.tracing.notes.atoms import Reason
from taylor_kernels.tracing.notes.attributes import register_attributes
from taylor_kernels.tracing.resolving.choosing import Choice
from taylor_kernels.tracing.tracing import trace

__all__ = [
    "IN",
    "OUT",
    "Block",
    "Channels",
    "Choice",
    "Entry",
    "Group",
    "PrunedMultiheadAttention",
    "Reason",
    "Slot",
    "follow_attention",
    "register_attributes",
    "trace",
]
