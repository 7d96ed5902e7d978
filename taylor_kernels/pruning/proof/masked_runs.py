"""Runs of a copy of a model with some of its units masked, on inputs that it bears."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from taylor_kernels.hooks import remove_all
from taylor_kernels.pruning.blocks import mask_block
from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.pruning.masks.held_entries import fill_once, fills
from taylor_kernels.pruning.masks.kept_norms import keep_only
from taylor_kernels.pruning.proof.defaults import widened
from taylor_kernels.pruning.proof.errors import short
from taylor_kernels.pruning.proof.examples import cut_down, repeated
from taylor_kernels.pruning.proof.exchanged import Exchanged
from taylor_kernels.pruning.proof.noise import Noise, choose_noise
from taylor_kernels.pruning.proof.removal_steps import steps_of_groups, steps_to_the_least
from taylor_kernels.pruning.proof.same_outputs import Ran
from taylor_kernels.pruning.proof.values import Values
from taylor_kernels.tracing import Block, Channels
from taylor_kernels.tracing.model.caches import modules_by_name
from taylor_kernels.tracing.run.returned import Read
from taylor_kernels.tracing.run.running import tensors_in


class Masked(NamedTuple):
    """A run with units and blocks masked.

    Attributes:
        steps: for each group [steps, U] bool, the units that are to be removed in each.
        tensors: those that masking changes.
        outputs: what the model returned.
    """

    steps: Sequence[Tensor]
    tensors: dict[str, Tensor]
    outputs: Ran


class MaskedRuns:
    """Finds out how a model runs, with units of all groups masked, and runs it so.

    Args:
        model: a copy in eval mode; its values are changed.
        original: what it is a copy of, whose values are read.
        train_too: it does more in train mode than in eval mode, or has layers or parameters that
            eval mode does not reach (heads for training alone), so that outputs are also compared
            in train mode, if it runs there: where chance leads it one way, and another.
        outputs: names or places of those that are compared, None for all that others read.

    Attributes:
        channels: whose units are masked.
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
        self._modules = modules_by_name(model)
        self._layers = [
            name for name, one in self._modules.items() if isinstance(one, (nn.Linear, _ConvNd))
        ]
        self._noise = Noise()
        self._values = Values(self._modules, original, self._noise)
        self._run = Exchanged(model, self._modules, channels, outputs)
        self._begun: Masked | None = None
        self._planned: tuple[Channels, list[Tensor]] | None = None  # the steps of all their groups
        self._train_runs: list[bool] = []  # what `lowest` is in each
        self._refusal = ""  # what was wrong with the last inputs that the model did not run on
        if not self._runs_in_double(example_inputs):
            self._values.set_exact(False)
            self._run.exact, self._refusal = False, ""
            self._run.remember()
            self._runs(example_inputs)
        if self._first.norms[0].broken:
            choose_noise(self._noise, self._broken)
        if train_too:
            self._learn_train_runs()

    def _runs_in_double(self, example_inputs: Any) -> bool:
        """Whether the model runs in double precision, on inputs that are kept if it does.

        Code may need all of the example, may make lower precision out of sight of a mode for
        functions, and may neither know float64 nor let itself be told.
        """
        small = cut_down(example_inputs)
        more = repeated(small)
        for self._run.below in (False, True):
            self._refusal = ""
            for given in (small,) if more is small else (more, small):
                runs = self._runs(tree_map(widened, given), all_layers=True)
                if runs and not self._first.norms[0].broken:
                    return True
                if runs and given is small:
                    return self._runs_on_more(example_inputs, small)
                # What is repeated may be less than nothing, and no logarithm of it be a number.
                if runs and not all(tensor.isfinite().all() for tensor in tensors_in(small)):
                    return True
            with suppress(Exception):
                self._runs(tree_map(widened, example_inputs))
                return True
        return False

    def _runs_on_more(self, example_inputs: Any, small: Any) -> bool:
        """Run it on the whole example in double precision, of which there is more than nan or
        infinity where there is nothing else of an image that was cut down; else on that again."""
        if [t.shape for t in tensors_in(small)] == [t.shape for t in tensors_in(example_inputs)]:
            return True
        whole = self._runs(tree_map(widened, example_inputs), all_layers=True)
        if whole and not self._first.norms[0].broken:
            return True
        return self._runs(tree_map(widened, small), all_layers=True)

    def _broken(self) -> dict[str, bool]:
        """As `choose_noise` asks for."""
        self._values.make_all_anew()
        self._run.inputs, self._begun = self._noise.on_inputs(self._example), None
        with self._run.restored():
            return self._run.outputs().norms[0].broken

    def _runs(self, example_inputs: Any, *, all_layers: bool = False) -> bool:
        """Run the model on inputs, which are those of all runs from now on: as the first trial
        begins, with units of all groups masked, and as it is where that does not do.

        Args:
            all_layers: only say whether it runs, calls the layers that the trace has seen, and
                hides nothing from a softmax.
        """
        self._example, self._begun = example_inputs, None
        self._run.inputs = self._noise.on_inputs(example_inputs)
        self._run.forget()
        called: set[str] = set()
        known = (
            self.channels.layers.keys() - self.channels.outside.keys() - self.channels.bare.keys()
        )
        handles = [
            self._modules[name].register_forward_pre_hook(lambda *_, name=name: called.add(name))
            for name in known
        ]
        try:
            try:
                self._begun = self._run_masked(self.channels, self._steps())
                self._first = self._begun.outputs
            except Exception as error:
                if short(error) == self._refusal:
                    raise  # masks are not what is wrong
            if self._begun is None or (all_layers and not called >= known):
                self._begun = None
                called.clear()
                self._values.make_anew()
                with self._run.restored():
                    self._first = self._run.outputs()
            self._run.learn_written()
        except Exception as error:
            self._refusal = short(error)
            if not all_layers:
                raise
            return False
        finally:
            for handle in handles:
                handle.remove()
        return called >= known and not self._run.alone

    def _turn(self, number: int) -> None:
        """See `Values.turn`: what let nothing of a layer through lets other numbers through."""
        self._values.turn(self._layers, number)
        self._begun = None

    def _learn_train_runs(self) -> None:
        """Find out how the model runs in train mode, with units of all groups masked as in the
        first trial, and as it is where that does not do: it may need targets."""
        self._run.expect_all_written()
        eval_only, self._train_runs = self._begun, [False, True]
        with suppress(Exception):
            known = None if eval_only is None else eval_only.outputs
            self._begun = self._run_masked(self.channels, self._steps(), known=known)
            self._train_runs = [False, True] if self._run.draws_in_training else [False]
            return
        self._begun, self._train_runs = eval_only, []
        self._values.make_anew()
        for lowest in (False, True):
            with suppress(Exception), self._run.restored():
                if self._run.draws_in_training or not lowest:
                    self._run.outputs(train=True, lowest=lowest)
                    self._train_runs.append(lowest)
                    self._begun = None

    def _steps(self, numbers: Collection[int] | None = None) -> list[Tensor]:
        """For each group [steps, U] bool: the units of it that are removed in each step.

        Args:
            numbers: of the groups that lose any; None for all.
        """
        if self._planned is None or self._planned[0] is not self.channels:
            groups = cast(list[Group], self.channels.groups)
            self._planned = self.channels, steps_of_groups(groups)
        return _of_groups(self._planned[1], numbers)

    def _steps_to_the_least(self, numbers: Collection[int]) -> list[Tensor]:
        """The same of a second trial; without units where the first one says all."""
        groups = cast(list[Group], self.channels.groups)
        return _of_groups(steps_to_the_least(groups, self.channels.cut_beside_kept), numbers)

    def _run_masked(
        self,
        channels: Channels,
        steps: Sequence[Tensor],
        blocks: Sequence[Block] = (),
        known: Ran | None = None,
    ) -> Masked:
        """Run it with units and blocks masked.

        Args:
            known: of these units, what came of it in eval mode.
        """
        dead = [units.any(0) for units in steps]
        tensors = self._masked(channels, dead)
        with self._run.restored():
            self._run.put(tensors)
            for block in blocks:
                mask_block(self._model, block)
            found = self._outputs_kept(channels, dead, channels.attributes(dead), known=known)
        return Masked(steps, tensors, found)

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
        known: Ran | None = None,
    ) -> Ran:
        """What the model returns where norms and routers know of the masked units: in eval mode,
        where that is not known, and behind that in train mode if it runs there."""
        hooks = keep_only(self._modules, channels, masked, attributes, gone)
        try:
            return self._run.all_outputs(self._train_runs, known)
        finally:
            remove_all(hooks)


def _of_groups(steps: Sequence[Tensor], numbers: Collection[int] | None) -> list[Tensor]:
    """These steps of some groups, in which the others lose nothing; None for all groups."""
    return [
        units if numbers is None or number in numbers else torch.zeros_like(units)
        for number, units in enumerate(steps)
    ]
