"""Proof on a copy that masking a group equals removing it.

What a trace says holds for what ran; code may depend on widths in ways that no run shows (a width
written into a forward method, an attribute that counts channels under a name of its own). So every
group is tried: some of its units are masked, the outputs kept, the same units removed, and the
outputs compared in float64. A group that differs, or breaks the model, is not pruned.

The units that are masked in one run are removed in steps: the first ones of a group, the last ones,
any; after each step the others are still masked, and the outputs the same. So a run with masks
serves several removals, and what is left is masked and pruned as in a network that has been
compacted. (Code that splits channels at half of their number would pass with a balanced choice.)
All groups are tried at once; only where that fails are they halved, until the ones to blame are
left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
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
from taylor_kernels.tracing import Block, Channels
from taylor_kernels.tracing.blocks import replace_modules
from taylor_kernels.tracing.experts import one_expert_at_a_time
from taylor_kernels.tracing.running import Untouched, call, copied, quiet, tensors_in

#: Relative to the greatest output, in float64 and in lower precision. Rounding stays far below;
#: half of a group's channels missing from a norm or a softmax is far above.
_EXACT, _LOOSE = 1e-7, 2e-2
#: One for each way to choose units.
_STEPS = 3
#: After so much time no further step is tried, and groups that have passed none are left out.
SECONDS = 120.0


def sound_blocks(trial: Trial, blocks: Sequence[Block]) -> tuple[list[Block], dict[str, str]]:
    """The residual blocks whose removal is what masking them is, and block -> reason for others.

    A module that is nothing but the block becomes the identity; where the model asks more of it,
    the modules inside are tried.
    """
    chosen, found = list(blocks), _unsound_blocks(trial, blocks)
    if any(chosen[n].places != chosen[n].open_places for n in found):
        chosen = [block.opened() if n in found else block for n, block in enumerate(chosen)]
        found = _unsound_blocks(trial, chosen)
    reasons = {chosen[number].name: reason for number, reason in found.items()}
    return [block for number, block in enumerate(chosen) if number not in found], reasons


def _unsound_blocks(trial: Trial, blocks: Sequence[Block]) -> dict[int, str]:
    found: dict[int, str] = {}
    while tried := [number for number in range(len(blocks)) if number not in found]:
        culprits = _halved(partial(trial.fault_of_blocks, blocks), tried)
        if not culprits:
            break
        found |= culprits
    return found


def _halved(fault: Callable[[Sequence[int]], str], numbers: Sequence[int]) -> dict[int, str]:
    reason = fault(numbers)
    if not reason or len(numbers) == 1:
        return dict.fromkeys(numbers, reason) if reason else {}
    half = len(numbers) // 2
    found = _halved(fault, numbers[:half]) | _halved(fault, numbers[half:])
    return found or dict.fromkeys(numbers, reason)


def first_fault(trial: Trial, blocks: Sequence[Block] = ()) -> str:
    """What is wrong with removing units of all groups at once; "" if nothing.

    Args:
        blocks: as of `unsound`.
    """
    numbers, until = range(len(trial.channels.groups)), time.monotonic() + SECONDS
    faults = (trial.fault(numbers, until, gone) for gone in _without(blocks))
    return next(filter(None, faults), "")


def unsound(trial: Trial, blocks: Sequence[Block] = ()) -> dict[int, str]:
    """The numbers of the groups whose removal is not what masking them is, with the reason.

    Args:
        blocks: residual blocks; units are also removed where all, or every second, of them is gone.
    """
    until = time.monotonic() + SECONDS
    found: dict[int, str] = {}
    for gone in _without(blocks):
        while numbers := [n for n in range(len(trial.channels.groups)) if n not in found]:
            if time.monotonic() > until and gone:
                return found
            # Each half may be sound, and both together not.
            culprits = _halved(partial(trial.fault, until=until, blocks=gone), numbers)
            found |= culprits
            if not culprits:
                break
    return found


def _without(blocks: Sequence[Block]) -> list[tuple[Block, ...]]:
    """The residual blocks that are gone while groups are tried."""
    return list(dict.fromkeys(((), tuple(blocks), tuple(blocks[::2]))))


def _late() -> str:
    return (
        f"was not proven within {SECONDS:g} seconds; pass smaller example inputs, or verify=False "
        "to go without the proof"
    )


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
        self.place = None
        if time.monotonic() > until:
            return _late()
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
            _units(cast(Group, group), number)
            if numbers is None or number in numbers
            else torch.zeros(_STEPS, group.size, dtype=torch.bool)
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
            if reason := _difference(expected, found, what):
                return reason
            if time.monotonic() > until:
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
            outputs = list(tensors_in(call(self._model, copied(self._inputs))))
            if self._steady or _same(before, _random_state()):
                return outputs
        self._steady = True
        return self._outputs(train=train)


def _units(group: Group, number: int) -> Tensor:
    """The units of a group that are removed in each step: [steps, U] bool.

    Half of them in all, or an odd number where it may be. How many go in a step differs between
    groups of one size, since code may take the width of one for another's.
    """
    drawn = random.Random(number)
    gone = torch.zeros(_STEPS, group.size, dtype=torch.bool)
    if not (first := group.next_to_go(group.size)):
        return gone
    last = min(max(group.size // 2, first), group.most_removable(group.size))
    allowed = range(first, last + 1, group.multiple)
    most = max((count for count in allowed if count % 2), default=allowed[-1])
    counts = [0, *range(first, most + 1, group.multiple)]
    begin = (number + 1) % len(counts)
    middle = drawn.randrange(begin, len(counts))
    left, before = list(range(group.size)), 0
    for step, count in enumerate((counts[begin], counts[middle], most)):
        going, before = count - before, count
        way = (number + step) % _STEPS
        if way == 0:
            chosen, left = left[:going], left[going:]
        elif way == 1:
            chosen, left = left[len(left) - going :], left[: len(left) - going]
        else:
            chosen = drawn.sample(left, going)
            left = sorted(set(left).difference(chosen))
        gone[step, chosen] = True
    return gone


def _difference(masked: Sequence[Tensor], removed: Sequence[Tensor], what: str) -> str:
    if [one.shape for one in masked] != [other.shape for other in removed]:
        return f"removing {what} changes the shape of the output"
    for one, other in zip(masked, removed, strict=True):
        if not _close(*(part.to_dense() if part.is_sparse else part for part in (one, other))):
            if what == "the block":
                return "without its modules the outputs are not what they are with zeros for it"
            return "an operation mixes its channels: a masked one is not a removed one"
    return ""


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(one, other)
    exact = one.dtype in (torch.float64, torch.complex128)
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    scale = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
    atol = scale * (_EXACT if exact else _LOOSE)
    return torch.allclose(one, other, rtol=0.0, atol=atol, equal_nan=True)


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
