"""A trial of a model: some units and blocks are masked, then removed, and the outputs compared."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taylor_kernels.hooks import remove_all
from taylor_kernels.pruning.blocks import mask_block
from taylor_kernels.pruning.defaults import widened
from taylor_kernels.pruning.errors import innermost_module, short
from taylor_kernels.pruning.exact_run import cut_down, repeated
from taylor_kernels.pruning.exchanged import Exchanged
from taylor_kernels.pruning.groups import Group
from taylor_kernels.pruning.held_entries import fill_once, fills
from taylor_kernels.pruning.kept_norms import keep_only
from taylor_kernels.pruning.noise import Noise, choose_noise
from taylor_kernels.pruning.optimizer_state import Kept
from taylor_kernels.pruning.removal import set_attributes, smaller
from taylor_kernels.pruning.removal_steps import all_have_lost, steps_of_groups
from taylor_kernels.pruning.same_outputs import Ran, difference
from taylor_kernels.pruning.values import Values
from taylor_kernels.tracing import Block, Channels
from taylor_kernels.tracing.blocks import replace_modules
from taylor_kernels.tracing.returned import Read
from taylor_kernels.tracing.running import tensors_in


class _Masked(NamedTuple):
    """A run with units and blocks masked.

    Attributes:
        steps: for each group [steps, U] bool, the units that are to be removed in each.
        tensors: those that masking changes.
        outputs: what the model returned.
    """

    steps: Sequence[Tensor]
    tensors: dict[str, Tensor]
    outputs: Ran


class Trial:
    """Tries on a model whether masking is removing.

    Args:
        model: a copy in eval mode; its values are changed.
        original: what it is a copy of, whose values are read.
        train_too: it does more in train mode than in eval mode, or has layers or parameters that
            eval mode does not reach (heads for training alone), so that outputs are also compared
            in train mode, if it runs there: where chance leads it one way, and another.
        outputs: names or places of those that are compared, None for all that others read.

    Attributes:
        channels: whose groups are tried; a caller may put others of the model in their place.
        place: the module in which the last trial failed; None if it ran to its end.
        layer: the first one that showed a difference in the last trial, if one did.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        example_inputs: Any,
        channels: Channels,
        train_too: bool,
        outputs: Read = None,
    ) -> None:
        self._model, self.channels = model, channels
        self.place: str | None = None
        self.layer: str | None = None
        self._modules = dict(model.named_modules())
        self._noise = Noise()
        self._values = Values(self._modules, original, self._noise)
        self._run = Exchanged(model, self._modules, channels, outputs)
        self._begun: _Masked | None = None
        self._train_runs: list[bool] = []  # what `lowest` is in each
        if not self._runs_in_double(example_inputs):
            self._values.narrow()
            self._run.exact = False
            self._run.remember()
            self._runs(example_inputs)
        if self._first.norms[0].broken:
            choose_noise(self._noise, self._broken)
        if train_too:
            self._run.expect_all_written()
            self._values.make_anew()
            for lowest in (False, True):
                with suppress(Exception), self._run.restored():  # it may need targets
                    if self._run.steady or not lowest:
                        self._run.outputs(train=True, lowest=lowest)
                        self._train_runs.append(lowest)
                        self._begun = None

    def _runs_in_double(self, example_inputs: Any) -> bool:
        """Whether the model runs in double precision, on inputs that are kept if it does.

        Code may need all of the example, may make lower precision out of sight of a mode for
        functions, and may neither know float64 nor let itself be told.
        """
        small = cut_down(example_inputs)
        more = repeated(small)
        for self._run.below in (False, True):
            for given in (small,) if more is small else (more, small):
                runs = self._runs(tree_map(widened, given), all_layers=True)
                if runs and (given is small or not self._first.norms[0].broken):
                    return True
                # What is repeated may be less than nothing, and no logarithm of it be a number.
                if runs and not all(tensor.isfinite().all() for tensor in tensors_in(small)):
                    return True
            with suppress(Exception):
                self._runs(tree_map(widened, example_inputs))
                return True
        return False

    def _broken(self) -> dict[str, bool]:
        """As `choose_noise` asks for."""
        self._values.make_all_anew()
        self._run.inputs, self._begun = self._noise.on_inputs(self._example), None
        with self._run.restored():
            return self._run.outputs().norms[0].broken

    def _runs(self, example_inputs: Any, *, all_layers: bool = False) -> bool:
        """Run the model on inputs, which are those of all runs from now on.

        Args:
            all_layers: only say whether it runs, calls the layers that the trace has seen, and
                hides nothing from a softmax. It is run as the first trial begins, with units of
                all groups masked, and as it is where that does not say so.
        """
        self._example, self._begun = example_inputs, None
        self._run.inputs = self._noise.on_inputs(example_inputs)
        self._run.idle = self._run.alone = False
        called: set[str] = set()
        known = (
            self.channels.layers.keys() - self.channels.outside.keys() - self.channels.bare.keys()
        )
        handles = [
            self._modules[name].register_forward_pre_hook(lambda *_, name=name: called.add(name))
            for name in known
        ]
        try:
            if all_layers:
                with suppress(Exception):
                    self._begun = self._run_masked(self.channels, self._steps())
                    self._first = self._begun.outputs
            if self._begun is None or not called >= known:
                self._begun = None
                called.clear()
                self._values.make_anew()
                with self._run.restored():
                    self._first = self._run.outputs()
            self._run.learn_written()
        except Exception:
            if not all_layers:
                raise
            return False
        finally:
            for handle in handles:
                handle.remove()
        return called >= known and not self._run.alone

    def fault(self, numbers: Collection[int], until: float, blocks: Sequence[Block] = ()) -> str:
        """What is wrong with removing units of these groups; "" if nothing.

        Args:
            until: no step is taken after this time, of `time.monotonic`.
            blocks: residual blocks that go with them, all in one step.
        """
        begun, self._begun = self._begun, None
        if begun is not None and not blocks and len(numbers) == len(begun.steps):
            return self._fault(begun.steps, (), "its channels", until, begun)
        steps = self._steps(numbers)
        if blocks:
            steps = [units.any(0, keepdim=True) for units in steps]
        return self._fault(steps, blocks, "its channels", until)

    def _steps(self, numbers: Collection[int] | None = None) -> list[Tensor]:
        """For each group [steps, U] bool: the units of it that are removed in each step.

        Args:
            numbers: of the groups that lose any; None for all.
        """
        every = steps_of_groups(cast("Sequence[Group]", self.channels.groups))
        return [
            units if numbers is None or number in numbers else torch.zeros_like(units)
            for number, units in enumerate(every)
        ]

    def fault_of_blocks(self, blocks: Sequence[Block], numbers: Sequence[int]) -> str:
        """What is wrong with removing those of these blocks that have such numbers; "" if
        nothing."""
        none = [torch.zeros(1, group.size, dtype=torch.bool) for group in self.channels.groups]
        return self._fault(none, [blocks[number] for number in numbers], "the block")

    def _fault(
        self,
        steps: Sequence[Tensor],
        blocks: Sequence[Block],
        what: str,
        until: float = float("inf"),
        begun: _Masked | None = None,
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
        for step in range(len(steps[0]) if steps else 1):
            try:
                kept: Kept = {}
                cuts = channels.entries([units[step] for units in steps], gone)
                for name, own in cuts.items():
                    tensors[name] = smaller(tensors[name], own, kept)
                    self._values.give_up(name)
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

    def _run_masked(
        self, channels: Channels, steps: Sequence[Tensor], blocks: Sequence[Block] = ()
    ) -> _Masked:
        dead = [units.any(0) for units in steps]
        tensors = self._masked(channels, dead)
        with self._run.restored():
            self._run.put(tensors)
            for block in blocks:
                mask_block(self._model, block)
            found = self._outputs_kept(channels, dead, channels.attributes(dead))
        return _Masked(steps, tensors, found)

    def _masked(self, channels: Channels, dead: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors that hold something of these units, with what masks it."""
        entries = channels.entries(dead)
        self._values.make_anew()
        tensors = {name: self._values.to_mask(name) for name in entries}
        parts = fills(self._run.held, channels, entries)
        fill_once([tensors[name].data for name in parts], list(parts.values()))
        return tensors

    def _outputs_kept(
        self,
        channels: Channels,
        masked: Sequence[Tensor],
        attributes: Mapping[str, Mapping[str, Any]],
        gone: Sequence[Tensor] | None = None,
    ) -> Ran:
        """What the model returns where norms and routers know of the masked units: in eval mode,
        and behind that in train mode if it runs there."""
        hooks = keep_only(self._modules, channels, masked, attributes, gone)
        try:
            return self._run.all_outputs(self._train_runs)
        finally:
            remove_all(hooks)
