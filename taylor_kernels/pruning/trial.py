"""A trial of a model: some units and blocks are masked, then removed, and the outputs compared."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taylor_kernels.hooks import remove_all
from taylor_kernels.pruning.blocks import mask_block
from taylor_kernels.pruning.defaults import widened
from taylor_kernels.pruning.exact_run import (
    InDouble,
    Noise,
    SmallPools,
    SteadyNoise,
    cut_down,
    widen,
)
from taylor_kernels.pruning.groups import Group
from taylor_kernels.pruning.kept_norms import keep_only
from taylor_kernels.pruning.masking import fill, fills
from taylor_kernels.pruning.optimizer_state import Kept
from taylor_kernels.pruning.removal import Tensors, set_attributes, smaller
from taylor_kernels.pruning.removal_steps import STEPS, units_by_step
from taylor_kernels.pruning.same_outputs import difference
from taylor_kernels.tracing import Block, Channels
from taylor_kernels.tracing.blocks import replace_modules
from taylor_kernels.tracing.experts import one_expert_at_a_time
from taylor_kernels.tracing.returned import returned_tensors
from taylor_kernels.tracing.running import Untouched, call, copied, quiet


class Trial:
    """A model whose tensors are exchanged for each run and put back after it.

    Args:
        model: a copy in eval mode; its values are changed.
        train_too: it has layers or parameters that eval mode does not reach (heads for training
            alone), so it must also run in train mode without the units.

    Attributes:
        channels: whose groups are tried; a caller may put others of the model in their place.
        place: the module in which the last trial failed; None if it ran to its end.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, channels: Channels, train_too: bool
    ) -> None:
        self._model, self.channels = model, channels
        self.place: str | None = None
        self._modules = dict(model.named_modules())
        self._noise = Noise()
        self._steady = False
        back = widen(model)
        # Zeros and ones (a fresh norm, a last layer that starts at zero, an empty example) would
        # hide what a channel does.
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            self._noise.add_to(parameter.data, max(fan_in, 1) ** -0.5)
        self._held = Tensors(model)
        self._originals = {name: self._held[name] for name in self._held}
        self._changed: set[str] = set()
        self._run_wrote: list[str] = []
        buffers = [n for n, t in self._originals.items() if not isinstance(t, nn.Parameter)]
        self._written = buffers
        self._begun: tuple[dict[str, Tensor], list[Tensor]] | None = None
        self._exact, self._below = True, False
        self._untouched = self._snapshot()
        if not self._runs_in_double(example_inputs):
            back()
            self._exact = False
            self._untouched = self._snapshot()
            self._runs(example_inputs)
        self._train_too = False
        if train_too:
            self._written = buffers
            # One example is too few for BatchNorm to train on: then there is nothing to compare.
            with suppress(Exception), self._restored():
                self._outputs(train=True)
                self._train_too = True

    def _runs_in_double(self, example_inputs: Any) -> bool:
        """Whether the model runs in double precision, on inputs that are kept if it does.

        Code may need all of the example, may make lower precision out of sight of a mode for
        functions, and may neither know float64 nor let itself be told.
        """
        for self._below in (False, True):
            if self._runs(tree_map(widened, cut_down(example_inputs)), all_layers=True):
                return True
            with suppress(Exception):
                self._runs(tree_map(widened, example_inputs))
                return True
        return False

    def _noisy(self, value: Any) -> Any:
        return self._noise.add_to(value.detach().clone()) if isinstance(value, Tensor) else value

    def _runs(self, example_inputs: Any, *, all_layers: bool = False) -> bool:
        """Run the model on inputs, which are those of all runs from now on.

        Args:
            all_layers: only say whether it runs, and calls the layers that the trace has seen. It
                is run as the first trial begins, with units of all groups masked, and as it is
                where that does not say so.
        """
        self._inputs, self._begun = tree_map(self._noisy, example_inputs), None
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
                    dead = [units.any(0) for units in self._steps()]
                    self._begun = self._run_masked(self.channels, dead)
            if self._begun is None or not called >= known:
                self._begun = None
                called.clear()
                with self._restored():
                    self._outputs()
            self._written = self._run_wrote
        except Exception:
            if not all_layers:
                raise
            return False
        finally:
            for handle in handles:
                handle.remove()
        return called >= known

    def fault(self, numbers: Collection[int], until: float, blocks: Sequence[Block] = ()) -> str:
        """What is wrong with removing units of these groups; "" if nothing.

        Args:
            until: no step is taken after this time, of `time.monotonic`.
            blocks: residual blocks that go with them, all in one step.
        """
        steps = self._steps(numbers)
        if blocks:
            steps = [units.any(0, keepdim=True) for units in steps]
        elif len(numbers) == len(steps):
            begun, self._begun = self._begun, None
            return self._fault(steps, (), "its channels", until, begun)
        return self._fault(steps, blocks, "its channels", until)

    def _steps(self, numbers: Collection[int] | None = None) -> list[Tensor]:
        """For each group [steps, U] bool: the units of it that are removed in each step.

        Args:
            numbers: of the groups that lose any; None for all.
        """
        return [
            units_by_step(cast(Group, group), number)
            if numbers is None or number in numbers
            else torch.zeros(STEPS, group.size, dtype=torch.bool)
            for number, group in enumerate(self.channels.groups)
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
        begun: tuple[dict[str, Tensor], list[Tensor]] | None = None,
    ) -> str:
        """What is wrong with removing what is masked.

        Args:
            steps: for each group [steps, U] bool, the units that are removed in each.
            blocks: residual blocks, removed in the first step.
            begun: what `_run_masked` returns, where it has run.
        """
        self.place = None
        some = f"some of {what}" if what == "its channels" else what
        channels = self.channels.leaving(blocks) if blocks else self.channels
        masked = [units.any(0) for units in steps]
        gone = [torch.zeros_like(units) for units in masked]
        attributes = channels.attributes(masked)
        try:
            tensors, expected = begun or self._run_masked(channels, masked, blocks)
        except Exception as error:
            return f"the model does not run with {some} at zero ({_short(error)})"
        for step in range(len(steps[0]) if steps else 1):
            try:
                kept: Kept = {}
                cuts = channels.entries([units[step] for units in steps], gone)
                tensors |= {n: smaller(tensors[n], own, kept) for n, own in cuts.items()}
                if not cuts and not blocks:
                    continue
                gone = [units[: step + 1].any(0) for units in steps]
                left = [units[step + 1 :].any(0) for units in steps]
                with self._restored():
                    self._put(self._for_a_run(tensors))
                    set_attributes(self._modules, channels.attributes(gone))
                    for block in blocks:
                        replace_modules(self._model, block.places)
                    found = self._outputs_kept(channels, left, attributes, gone)
                    if self._train_too:
                        self._outputs(train=True)
            except Exception as error:
                self.place = self._where(error)
                return f"the model does not run without {some} ({_short(error)})"
            if reason := difference(expected, found, what, exact=self._exact):
                return reason
            if time.monotonic() > until and _all_have_lost(gone, masked):
                break
        return ""

    def _run_masked(
        self, channels: Channels, dead: Sequence[Tensor], blocks: Sequence[Block] = ()
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The tensors that masking these units and blocks changes, and what the model returns."""
        tensors = self._masked(channels, dead)
        with self._restored():
            self._put(self._for_a_run(tensors))
            for block in blocks:
                mask_block(self._model, block)
            return tensors, self._outputs_kept(channels, dead, channels.attributes(dead))

    def _masked(self, channels: Channels, dead: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors that hold something of these units, with what masks it."""
        entries = channels.entries(dead)
        tensors = {name: _clone(self._originals[name]) for name in entries}
        for name, parts in fills(self._held, channels, entries).items():
            fill(tensors[name].data, parts)
        return tensors

    def _for_a_run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that the model may write into."""
        return {n: _clone(t) if n in self._written else t for n, t in tensors.items()}

    def _outputs_kept(
        self,
        channels: Channels,
        masked: Sequence[Tensor],
        attributes: Mapping[str, Mapping[str, Any]],
        gone: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """What the model returns where norms and routers know of the masked units."""
        hooks = keep_only(self._modules, channels, masked, attributes, gone)
        try:
            return self._outputs()
        finally:
            remove_all(hooks)

    def _where(self, error: Exception) -> str:
        """The innermost module whose method raised an error, or passed it on."""
        found, step = "", error.__traceback__
        names = {id(module): name for name, module in self._modules.items()}
        while step is not None:
            found = names.get(id(step.tb_frame.f_locals.get("self")), found)
            step = step.tb_next
        return found

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        self._changed.update(tensors)
        self._held.put(tensors)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Afterwards the model has the tensors and attributes that it had before."""
        self._changed.clear()
        self._put({name: _clone(self._originals[name]) for name in self._written})
        try:
            yield
        finally:
            # Copies that were made here begin at version 0.
            self._run_wrote = [name for name in self._written if self._held[name]._version]
            self._held.put({name: self._originals[name] for name in self._changed})
            self._untouched.restore()

    def _snapshot(self) -> Untouched:
        return Untouched(list(self._modules.values()), [])

    def _outputs(self, *, train: bool = False) -> list[Tensor]:
        if any(module.training is not train for module in self._modules.values()):
            self._model.train(train)
        with ExitStack() as stack:
            stack.enter_context(one_expert_at_a_time(self._modules.values()))
            mode = InDouble(below=self._below) if self._exact else SmallPools()
            # Every run starts from the caller's random state.
            stack.enter_context(quiet(self._model, mode))
            before = _random_state()
            if self._steady:
                stack.enter_context(SteadyNoise())
            found = call(self._model, copied(self._inputs))
            outputs = list(returned_tensors(self._model, self._inputs, found))
            if self._steady or _same(before, _random_state()):
                return outputs
        self._steady = True
        return self._outputs(train=train)


def _all_have_lost(gone: Sequence[Tensor], masked: Sequence[Tensor]) -> bool:
    """Whether every group that has units masked has had some removed."""
    pairs = zip(gone, masked, strict=True)
    return all(bool(lost.any()) for lost, units in pairs if units.any())


def _clone(tensor: Tensor) -> Tensor:
    new = tensor.detach().clone()
    return nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new


def _random_state() -> list[Tensor]:
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else [])]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
