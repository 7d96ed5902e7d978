"""What of the groups that were found can be offered, by a proof that they are sound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from taylor_kernels.pruning.check import first_fault, unsound
from taylor_kernels.pruning.groups import Group
from taylor_kernels.pruning.second_choice import Offer, Proven, sound_filters, sound_in
from taylor_kernels.pruning.trial import Trial
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
        if not first_fault(self.trial, self.blocks):
            return offer, {}
        followed, other, sound = self._following(whole, offer)
        if sound:
            return followed, {}
        found = self._without_unsound(other, followed)
        if followed is offer or not found[1]:
            return found
        # Sizes that follow others may have tied what is sound to what is not.
        alone = self._without_unsound(whole, offer)
        return max(found, alone, key=sound_in)

    def _without_unsound(self, whole: Channels, offer: Offer) -> Proven:
        """`prove`, once sizes that code has from other tensors do or do not follow these."""
        trial = self.trial
        trial.channels, groups, _ = offer
        found = unsound(trial, self.blocks)
        wrong = {slot.owner for number in found for slot in groups[number].producers}
        if wrong and (other := whole.coupled(self.model, wrong)) is not None:
            more, skipped = self.choose(other)
            trial.channels = other.offering(more)
            left = unsound(trial, self.blocks)
            if sound_filters(more, left) > sound_filters(groups, found):
                return (trial.channels, more, skipped), left
        return offer, found

    def _following(self, whole: Channels, offer: Offer) -> tuple[Offer, Channels, bool]:
        """What can be offered where sizes that code has from other tensors follow these.

        The module in which the trial has failed says whose code does so: its class's. So culprits
        need not be looked for among all groups, and what else happens to be as wide stays apart.
        Sizes stay as they are where filters that could go no longer can. The trial has found a
        fault in the groups of this offer.

        Returns:
            The offer, the channels that its groups are of, and whether all of its groups are sound.
        """
        trial = self.trial
        while trial.place is not None:
            kind = type(self.model.get_submodule(trial.place))
            at = {name for name, module in self.model.named_modules() if type(module) is kind}
            other = whole.coupled(self.model, whole.layers, at=at)
            if other is None:
                break
            groups, skipped = self.choose(other)
            if sound_filters(groups, {}) < sound_filters(offer[1], {}):
                break
            whole, trial.channels = other, other.offering(groups)
            offer = trial.channels, groups, skipped
            if not first_fault(trial, self.blocks):
                return offer, whole, True
        return offer, whole, False
