"""A model whose tensors are exchanged for each run, and put back after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.pruning.proof.defaults import WIDER
from taylor_kernels.pruning.proof.exact_run import InDouble, SmallPools
from taylor_kernels.pruning.proof.layer_outputs import LayerOutputs
from taylor_kernels.pruning.proof.same_outputs import Ran
from taylor_kernels.pruning.proof.steady_noise import SteadyNoise
from taylor_kernels.pruning.proof.ways import Ways
from taylor_kernels.pruning.removing.removal import Tensors
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.model.caches import held_tensors, keeping, renew
from taylor_kernels.tracing.notes.experts import one_expert_at_a_time
from taylor_kernels.tracing.notes.operations import address_of
from taylor_kernels.tracing.run.returned import Read, returned_tensors
from taylor_kernels.tracing.run.running import call, copied, quiet
from taylor_kernels.tracing.run.training import set_training
from taylor_kernels.tracing.run.untouched import Untouched

#: Of tensors with more numbers so many tell whether they have changed: one from each of as many
#: equal parts, at random places, since equal steps may stay in one column.
_MANY = 2**14
_RANDOM = torch.Generator().manual_seed(0)
_PLACES = (torch.arange(_MANY) + torch.rand(_MANY, generator=_RANDOM, dtype=torch.float64)) / _MANY
#: What their bits are multiplied by: odd, so that a change of one number alone is never lost.
_FACTORS = torch.randint(-(2**62), 2**62, (_MANY,), generator=_RANDOM) * 2 + 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Exchanged:
    """Runs a model with some of its tensors exchanged, each time from the same state.

    Args:
        model: a copy in eval mode.
        modules: dict(model.named_modules()).
        channels: of the model, with any groups.
        read: names or places of the outputs that are wanted, None for all that others read.

    Attributes:
        modules: as given.
        held: the tensors that are in place now.
        tensors: the model's own, by name; what is put in their place is not among them.
        inputs: what it is run on.
        exact: it runs in double precision.
        below: also where only a mode for operations sees what code makes.
        alone: in some run so far a softmax or the like was given single numbers, which it hides.
        idle: the last run in a mode was what it is without; so are those after it, which go the
            same way with fewer channels, and which a mode for functions makes twice as long where
            the model is small. Where one of them fails, the mode is in use from then on.
        kept: modules that make anew what they keep of their parameters as their mode changes.
        written: names of the tensors that runs write into, which get a copy for each.
        ways: the way that code took in the last run of each kind, by whether it trains and what
            `lowest` was; None where nobody asks any more.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        channels: Channels,
        read: Read = None,
    ) -> None:
        self._model, self.modules, self._read = model, modules, read
        self.held = Tensors(modules)
        self.tensors = {name: self.held[name] for name in self.held}
        self.inputs: Any = None
        self.ways: dict[tuple[bool, bool], Ways] | None = {}
        self.exact, self.below, self.alone = True, False, False
        self.idle, self._never_idle = False, False
        #: Whether it trains in the runs that draw random numbers, in place of which these have the
        #: same number everywhere.
        self._steady: set[bool] = set()
        self._layers = LayerOutputs(modules, channels)
        self._by_itself = [name for name in self._layers.by_itself if name in self.tensors]
        # A write through `.data`, as into a codebook or an average of weights, leaves no version.
        self._always = [name for name in self.tensors if name in channels.written]
        self._changed: set[str] = set()
        self._run_wrote: list[str] = []
        self.expect_all_written()
        self.remember()

    def forget(self) -> None:
        """What was seen of runs says nothing of those on other inputs."""
        self.idle = self.alone = False

    @property
    def draws_in_training(self) -> bool:
        """Some run in train mode has drawn random numbers."""
        return True in self._steady

    def remember(self) -> None:
        """What modules hold now is what they hold again after each run."""
        self._untouched = Untouched(list(self.modules.values()), [])
        self.kept = keeping(self.modules.values())
        with suppress(Exception):  # quantised tensors have no view, and runs say what else fails
            if self.kept and not self._renewing_changes():
                self.kept = []

    def _renewing_changes(self) -> bool:
        """Whether modules make anything anew of what they hold, as most that say so do not."""
        try:
            before = self._marks()
            renew(self.kept)
            same = before == self._marks()
        finally:
            changed = self._untouched.restore()
        return changed or not same

    def _marks(self) -> list[tuple[int, int, int]]:
        """What tells whether code has written into a tensor of the model, also by its `data`."""
        tensors = chain(self.tensors.values(), held_tensors(self.modules.values()))
        return [(t._version, address_of(t), _checksum(t.detach())) for t in tensors]

    def expect_all_written(self) -> None:
        """Any buffer may be written into, as in the first run of its kind; and of parameters those
        that the trace has seen code write into."""
        buffers = [n for n, t in self.tensors.items() if not isinstance(t, nn.Parameter)]
        self.written = list(dict.fromkeys((*buffers, *self._always)))

    def learn_written(self) -> None:
        """Later runs write into what the last one has written into, and nothing else."""
        self.written = self._run_wrote

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put these in place for a run; those that runs write into are copied."""
        self._put({n: clone(t) if n in self.written else t for n, t in tensors.items()})

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        self._changed.update(tensors)
        self.held.put(tensors)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Afterwards the model has the tensors and attributes that it had before."""
        self._changed.clear()
        self._put({name: clone(self.tensors[name]) for name in self.written})
        try:
            yield
        finally:
            # Copies that were made here begin at version 0.
            self._run_wrote = [n for n in self.written if n in self._always or self._was_written(n)]
            self.held.put({name: self.tensors[name] for name in self._changed})
            self._untouched.restore()

    def _was_written(self, name: str) -> bool:
        try:
            return self.held[name]._version > 0
        except AttributeError:  # a plain attribute that is another object by now, or gone
            return False

    def outputs(self, *, train: bool = False, lowest: bool = False) -> Ran:
        """What the model returns as it is now.

        Args:
            lowest: of `SteadyNoise`.
        """
        if train:
            set_training(self._model)
        elif any(module.training for module in self.modules.values()):
            self._model.eval()
        if train or not self.idle:
            mode = InDouble(below=self.below) if self.exact else SmallPools()
            found = self._outputs(mode, lowest)
            self.idle = not train and mode.idle and not self.below and not self._never_idle
            return found
        try:
            found = self._outputs(None)
            if self.exact and any(tensor.dtype in WIDER for tensor in found.outputs):
                raise RuntimeError("its outputs are of another precision without some channels")
        except Exception:
            self.idle, self._never_idle = False, True
            raise
        return found

    def _watched(self, training: bool, lowest: bool) -> AbstractContextManager[object]:
        if self.ways is None:
            return nullcontext()
        self.ways[training, lowest] = way = Ways()
        return way

    def all_outputs(self, train_runs: Sequence[bool], known: Ran | None = None) -> Ran:
        """What it returns in eval mode, and behind that in these runs in train mode.

        Args:
            train_runs: what `lowest` is in each; nothing is lowest where nothing is drawn.
            known: what it returns in eval mode.
        """
        found = self.outputs() if known is None else Ran([*known.outputs], [*known.norms])
        for lowest in train_runs:
            if lowest and not self.draws_in_training:
                continue
            more = self.outputs(train=True, lowest=lowest)
            found.outputs += more.outputs
            found.norms += more.norms
        return found

    def _outputs(self, mode: SmallPools | None, lowest: bool = False) -> Ran:
        with ExitStack() as stack:
            stack.enter_context(one_expert_at_a_time(self.modules.values()))
            # Every run starts from the caller's random state.
            stack.enter_context(quiet(self.modules.values(), mode))
            before, training = _random_state(), self._model.training
            if training in self._steady:
                stack.enter_context(SteadyNoise(lowest=lowest))
            renew(self.kept)
            weights = {name: self.held[name] for name in self._by_itself}
            with self._layers.heard(weights) as norms, self._watched(training, lowest):
                found = call(self._model, copied(self.inputs))
            if mode is not None:
                self.alone |= mode.alone
            outputs = list(returned_tensors(self._model, self.inputs, found, self._read))
            if training in self._steady or _same(before, _random_state()):
                if self._read is not None:  # other layers make what nobody reads
                    norms.calls.clear()
                return Ran(outputs, [norms])
        self._steady.add(training)
        return self._outputs(mode, lowest)


def clone(tensor: Tensor) -> Tensor:
    """A copy that needs no gradient; of a parameter, a parameter."""
    new = tensor.detach().clone()
    return nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new


def _checksum(tensor: Tensor) -> int:
    """Of numbers from all over a tensor, no more than are added up in next to no time.

    sum over i of factor_i * bits_i (mod 2^64): it changes also as numbers change places, and where
    a sum of the numbers would be inf or nan, or lose the small ones.
    """
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = parts.view(_BITS[parts.element_size()])
    if (numel := bits.numel()) > _MANY:
        bits = bits.take((_PLACES * numel).long().to(bits.device))  # no copy, whatever its strides
    factors = _FACTORS[: bits.numel()].to(bits.device)
    return int((bits.flatten().long() * factors).sum())


def _random_state() -> list[Tensor]:
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else [])]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, one, other))
