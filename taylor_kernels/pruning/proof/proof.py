"""What of the groups that were found can be offered, by a proof that they are sound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.pruning.proof.check import Fault, first_fault, unsound
from taylor_kernels.pruning.proof.second_choice import Offer, Proven, sound_filters, sound_in
from taylor_kernels.pruning.proof.trial import Trial
from taylor_kernels.tracing import Block, Channels


@dataclass(frozen=True)
class Proof:
    """Tries groups on a copy of a model, and what goes with them by the code's own words.

    Attributes:
        trial: runs the copy with groups masked, and without them.
        model: the traced model or a copy of it.
        blocks: residual blocks that go too, and are sound.
        choose: the groups of channels that can be pruned, and why other layers cannot.
    """

    trial: Trial
    model: nn.Module
    blocks: Sequence[Block]
    choose: Callable[[Channels], tuple[list[Group], dict[str, str]]]

    def prove(self, whole: Channels, offer: Offer) -> Proven:
        """What can be offered, and the groups of it that are not sound, with the reason.

        What could not go alone may go with what has the same width by the code's own words.

        Args:
            whole: the channels that the groups of the offer are of.
        """
        self.trial.channels = offer[0]
        fault = first_fault(self.trial, self.blocks)
        if not fault.reason:
            return offer, {}
        followed, other, left = self._following(whole, offer, fault)
        if not left.reason:
            return followed, {}
        found = self._without_unsound(other, followed, left)
        if followed is offer or not found[1]:
            return found
        # Sizes that follow others may have tied what is sound to what is not.
        alone = self._without_unsound(whole, offer, fault)
        return max(found, alone, key=sound_in)

    def holds(self, channels: Channels) -> bool:
        """Whether all groups of these channels are sound together."""
        self.trial.channels = channels
        return not first_fault(self.trial, self.blocks).reason

    def _without_unsound(self, whole: Channels, offer: Offer, fault: Fault) -> Proven:
        """`prove`, once sizes that code has from other tensors do or do not follow these.

        Args:
            fault: of all groups of this offer together.
        """
        trial = self.trial
        trial.channels = offer[0]
        best = offer, unsound(trial, self.blocks, fault)
        for guessed in (False, True):
            (_, groups, _), found = best
            wrong = {slot.owner for number in found for slot in groups[number].producers}
            other = whole.coupled(self.model, wrong, guessed=guessed) if wrong else None
            if other is not None:
                more, skipped = self.choose(other)
                trial.channels = other.offering(more)
                tried = (trial.channels, more, skipped), unsound(trial, self.blocks)
                if sound_in(tried) > sound_in(best):
                    whole, best = other, tried
        return best

    def _following(
        self, whole: Channels, offer: Offer, fault: Fault
    ) -> tuple[Offer, Channels, Fault]:
        """What can be offered where sizes that code has from other tensors follow these.

        The module in which the trial has failed says whose code does so: its class's. So culprits
        need not be looked for among all groups, and what else happens to be as wide stays apart.
        Sizes stay as they are where filters that could go no longer can.

        Args:
            fault: of all groups of this offer together.

        Returns:
            The offer, the channels that its groups are of, and what is wrong with all of these
            together.
        """
        trial = self.trial
        while fault.reason and fault.place is not None:
            for loosely in (False, True):
                other = self._written_at(fault.place, whole, loosely)
                if other is None:
                    continue
                groups, skipped = self.choose(other)
                if sound_filters(groups, {}) >= sound_filters(offer[1], {}):
                    whole, trial.channels = other, other.offering(groups)
                    offer = trial.channels, groups, skipped
                    fault = first_fault(trial, self.blocks)
                    break
            else:
                break
        return offer, whole, fault

    def _written_at(self, place: str, whole: Channels, loosely: bool) -> Channels | None:
        """The channels where sizes follow that the code of this module's class wrote down; else
        that of a module around it, which has chosen what this one is given.

        Args:
            loosely: as of `Channels.coupled`.
        """
        while True:
            kind = type(self.model.get_submodule(place))
            at = {name for name, module in self.model.named_modules() if type(module) is kind}
            other = whole.coupled(self.model, whole.layers, at=at, loosely=loosely)
            if other is not None or not place:
                return other
            place = place.rpartition(".")[0]
