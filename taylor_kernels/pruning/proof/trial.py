"""A trial of a model: some units and blocks are masked, then removed, and the outputs compared."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.pruning.proof.errors import innermost_module, short
from taylor_kernels.pruning.proof.masked_runs import Masked
from taylor_kernels.pruning.proof.other_ways import OtherWays
from taylor_kernels.pruning.proof.removal_steps import all_have_lost
from taylor_kernels.pruning.proof.same_outputs import Ran, difference
from taylor_kernels.pruning.removing.optimizer_state import Kept
from taylor_kernels.pruning.removing.removal import set_attributes, smaller
from taylor_kernels.pruning.removing.reordering import reorder
from taylor_kernels.tracing import Block, Channels
from taylor_kernels.tracing.blocks import replace_modules

#: How often filters are given other signs where layers are given nothing but zeros.
_TURNS = 4


class Trial(OtherWays):
    """Tries on a model whether masking is removing.

    Attributes:
        channels: whose groups are tried; a caller may put others of the model in their place.
        place: the module in which the last trial failed; None if it ran to its end.
        layer: the first one that showed a difference in the last trial, if one did.
    """

    place: str | None = None
    layer: str | None = None
    _deaf: frozenset[str] = frozenset()

    def fault(self, numbers: Collection[int], until: float, blocks: Sequence[Block] = ()) -> str:
        """What is wrong with removing units of these groups; "" if nothing.

        Args:
            until: no step is taken after this time, of `time.monotonic`.
            blocks: residual blocks that go with them, all in one step.
        """
        begun, self._begun = self._begun, None
        if blocks:
            at_once = [units.any(0, keepdim=True) for units in self._steps(numbers)]
            reason = self._fault(at_once, blocks, "its channels", until)
            return reason or self._fault_on_another_way(at_once, blocks, "its channels", until)
        if begun is not None and len(numbers) != len(begun.steps):
            begun = None
        steps = self._steps(numbers) if begun is None else begun.steps
        reason = self._fault(steps, (), "its channels", until, begun)
        if reason or (reason := self._fault_with_other_signs(steps, until)):
            return reason
        least = self._steps_to_the_least(numbers)
        if any(units.any() for units in least):
            reason = self._fault(least, (), "its channels", until)
        return reason or self._fault_on_another_way(steps, (), "its channels", until)

    def _fault_on_another_way(
        self, steps: Sequence[Tensor], blocks: Sequence[Block], what: str, until: float
    ) -> str:
        """`_fault` on the user's own example, if code goes another way on it."""
        if self._other is None:
            return ""
        with self._on(self._other):
            return self._fault(steps, blocks, what, until)

    def _fault_with_other_signs(self, steps: Sequence[Tensor], until: float) -> str:
        """What is wrong in front of layers that were given nothing but zeros in the last trial,
        because all units of a narrow layer that were left put out less than a ReLU lets through:
        the trial is made again with filters of other signs."""
        deaf, number = self._deaf, 0
        try:
            while deaf and number < _TURNS and time.monotonic() < until:
                number += 1
                self._turn(number)
                begun = self._run_masked(self.channels, steps)
                if any(norms.broken for norms in begun.outputs.norms):
                    break
                heard = deaf - begun.outputs.norms[0].deaf
                if heard and (reason := self._fault(steps, (), "its channels", until, begun)):
                    return reason
                deaf -= heard
        except Exception:
            return ""  # such signs do not suit the code
        finally:
            if number:
                self._turn(0)
        return ""

    def fault_of_blocks(self, blocks: Sequence[Block], numbers: Sequence[int]) -> str:
        """What is wrong with removing those of these blocks that have such numbers; "" if
        nothing."""
        none = [torch.zeros(1, group.size, dtype=torch.bool) for group in self.channels.groups]
        chosen, what = [blocks[number] for number in numbers], "the block"
        until = float("inf")
        reason = self._fault(none, chosen, what)
        return reason or self._fault_on_another_way(none, chosen, what, until)

    def _fault(
        self,
        steps: Sequence[Tensor],
        blocks: Sequence[Block],
        what: str,
        until: float = float("inf"),
        begun: Masked | None = None,
    ) -> str:
        """What is wrong with removing what is masked.

        Args:
            steps: for each group [steps, U] bool, the units that are removed in each.
            blocks: residual blocks, removed in the first step.
            begun: these steps' run with masks, where it has been.
        """
        self.place = self.layer = None
        some = f"some of {what}" if what == "its channels" else what
        channels = self.channels.leaving(blocks) if blocks else self.channels
        masked = [units.any(0) for units in steps]
        gone = [torch.zeros_like(units) for units in masked]
        attributes = channels.attributes(masked)
        try:
            _, tensors, expected = begun or self._run_masked(channels, steps, blocks)
        except Exception as error:
            self.place = innermost_module(error, self._modules)
            return f"the model does not run with {some} at zero ({short(error)})"
        self._deaf = expected.norms[0].deaf
        for step in range(len(steps[0]) if steps else 1):
            try:
                kept: Kept = {}
                cuts = channels.entries([units[step] for units in steps], gone)
                for name, own in cuts.items():
                    tensors[name] = smaller(tensors[name], own, kept, may_share=True)
                    self._values.give_up(name)
                reorder(tensors, channels.orders([units[step] for units in steps], gone))
                if not cuts and not blocks:
                    continue
                gone = [units[: step + 1].any(0) for units in steps]
                left = [units[step + 1 :].any(0) for units in steps]
                found = self._removed(channels, tensors, left, attributes, gone, blocks)
            except Exception as error:
                self.place = innermost_module(error, self._modules)
                return f"the model does not run without {some} ({short(error)})"
            reason, self.layer = difference(expected, found, what, exact=self._run.exact)
            if reason:
                return reason
            if time.monotonic() > until and all_have_lost(gone, masked):
                break
        return ""

    def _removed(
        self,
        channels: Channels,
        tensors: Mapping[str, Tensor],
        left: Sequence[Tensor],
        attributes: Mapping[str, Mapping[str, Any]],
        gone: Sequence[Tensor],
        blocks: Sequence[Block],
    ) -> Ran:
        """What the model returns without the units that have gone."""
        idle = self._run.idle
        try:
            with self._run.restored():
                self._run.put(tensors)
                set_attributes(self._modules, channels.attributes(gone))
                for block in blocks:
                    replace_modules(self._model, block.places)
                return self._outputs_kept(channels, left, attributes, gone)
        except Exception:
            if not idle or self._run.idle:
                raise
        # It was run without the mode that has had nothing to do so far, and it may have now.
        return self._removed(channels, tensors, left, attributes, gone, blocks)
