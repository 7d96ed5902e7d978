"""Backward passes of a meter's own: from a closure's loss to the outputs of modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


class Ends:
    """The outputs of modules that gradients are to flow to, and what takes them there.

    Attributes:
        flowing: a pass of the meter's own runs, whose gradients hooks on the outputs take.
    """

    def __init__(self) -> None:
        self.flowing = False
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self._edges: list[GradientEdge] = []
        self._arrivals: list[Callable[[Tensor], None]] = []
        self._held = 0  # bytes of what comes and goes there

    def add(self, output: Tensor, arrive: Callable[[Tensor], None], *inputs: Tensor) -> None:
        """The output of a module that was given these inputs.

        Args:
            arrive: takes the gradients of several passes at once, [passes, *output.shape].
        """
        self._arrivals.append(arrive)
        self._held += sum(x.numel() * x.element_size() for x in (output, *inputs))
        # Not the tensor: an operation in place would move it to another place in the graph.
        self._edges.append(torch.autograd.graph.get_gradient_edge(output))

    def passes_at_once(self, room: int) -> int:
        """How many passes take no more room together than so many bytes; at least one."""
        return max(1, room // max(1, self._held))

    def flow(self, roots: Sequence[Any], vectors: Sequence[Tensor] | None, *, keep: bool) -> None:
        """One pass; hooks on the outputs take what comes.

        Args:
            vectors: what flows back from each root; None from a scalar.
            keep: there will be another pass over the graph.
        """
        if not self._edges:
            raise RuntimeError("closure: it did not call the model that was handed over")
        to = self._last()
        self.flowing = True
        try:
            torch.autograd.grad(roots, to, vectors, retain_graph=keep, allow_unused=True)
        finally:
            self.flowing = False

    def flow_together(self, roots: Sequence[Any], vectors: Sequence[Tensor]) -> bool:
        """Several passes as one; False where that cannot be.

        Args:
            vectors: what flows back from each root, [passes, *root.shape].
        """
        try:
            found = torch.autograd.grad(
                roots,
                self._edges,
                vectors,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        except RuntimeError:  # an operation that vmap does not know, or no memory
            return False
        for arrive, dy in zip(self._arrivals, found, strict=True):
            if dy is not None:
                arrive(dy)
        return True

    def _last(self) -> list[GradientEdge]:
        """The edges behind which there is none: what flows there passes all the others.

        Gradients at edges that a pass is asked for are held until its end; hooks see the others.
        """
        nodes = {edge.node for edge in self._edges}
        leads: dict[Any, bool] = {}  # whether one of them is behind a node
        stack = [edge.node for edge in self._edges]
        while stack:
            node = stack[-1]
            behind = [following for following, _ in node.next_functions if following is not None]
            new = [following for following in behind if following not in leads]
            if new and node not in leads:
                stack += new
                continue
            leads[node] = any(following in nodes or leads[following] for following in behind)
            stack.pop()
        return [edge for edge in self._edges if not leads[edge.node]]
