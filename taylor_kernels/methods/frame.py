"""One frame for pruning before, during and after training: which weights, from when, by what mask.

    W = f2( f1(W_kM; D) ⊙ W_kW; D )

f1 makes a mask of the weights of iteration kM, it falls on the weights of iteration kW, and f2
trains what is left (Wang, Qin, Zhang and Fu, "Emerging Paradigms of Neural Network Pruning", 2021).
Each published method is a named setting of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.methods.masks import Held, shuffled
from taylor_kernels.methods.pruning_at_init import CRITERIA, Batches, Loss, at_init

#: Trains a model in place, from one iteration to another, of so many as the user counts.
Train = Callable[[nn.Module, int, int], object]
WHEN = ("start", "early", "end")
CONTROLS = (None, "shuffle", "reinit")


@dataclass(frozen=True)
class Frame:
    """A way to prune, as a setting of the survey's frame.

    Attributes:
        mask_from: kM, "start" or "end" of training: whose weights the mask is made of.
        weights_from: kW, "start", "early" or "end": whose weights are kept.
        criterion: a name of `at_init`'s criteria.
        granularity: "weight" or "filter".
        scope: "global" ranks all layers together, "local" each by itself.
        rounds: of scoring for one mask, each on the network as the last one masked it.
        times: how often a network is trained to its end and masked further, where kM is its end.
    """

    name: str
    mask_from: str
    weights_from: str
    criterion: str
    source: str
    granularity: str = "weight"
    scope: str = "global"
    rounds: int = 1
    times: int = 1

    def __post_init__(self) -> None:
        if self.mask_from not in ("start", "end"):
            raise ValueError(f"mask_from: {self.mask_from!r} is not one of 'start' and 'end'")
        if self.weights_from not in WHEN:
            raise ValueError(f"weights_from: {self.weights_from!r} is not one of {WHEN}")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion: {self.criterion!r} is not one of {', '.join(CRITERIA)}")
        if self.rounds < 1 or self.times < 1:
            raise ValueError(f"rounds, times: {self.rounds} and {self.times} must be at least 1")
        if self.mask_from == "start" and self.times > 1:
            raise ValueError("times: a mask of untrained weights is made once; use rounds")

    def run(
        self,
        model: nn.Module,
        keep: float,
        train: Train,
        steps: int,
        *,
        batches: Batches = (),
        loss: Loss | None = None,
        early: int = 0,
        control: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Held:
        """Prune the model in place and train what is left.

        Args:
            keep: the fraction of the weights, or filters, in (0, 1].
            train: train(model, first, last) runs the iterations from `first` to `last` − 1; a new
                optimizer each time, or the masked momentum of an old one moves masked weights.
            steps: K, the iterations of a whole training. Weights of the end are fine-tuned as long.
            batches, loss: what the criterion reads, as `at_init` takes them.
            early: the iteration that "early" means.
            control: "shuffle" permutes the mask in each layer; "reinit" draws the weights anew, by
                every module's reset_parameters() and PyTorch's own generator.
            generator: a CPU one, which shuffles.

        Returns:
            The masks, which hold until their `close`.

        Raises:
            ValueError: a control or number that is not known or out of its range.
        """
        self._check(steps, early, control, generator)
        masks = self.find(model, keep, train, steps, batches=batches, loss=loss, early=early)
        return self.finish(
            model, masks, train, steps, early=early, control=control, generator=generator
        )

    def find(
        self,
        model: nn.Module,
        keep: float,
        train: Train,
        steps: int,
        *,
        batches: Batches = (),
        loss: Loss | None = None,
        early: int = 0,
    ) -> dict[str, Tensor]:
        """The first half of `run`: the masks, f1; the model has the weights of kW then, unmasked.

        Arguments are those of `run`. Masks may be kept, and put on such a model later by `finish`.
        """
        self._check(steps, early)
        rewind = self._rewind(steps, early)
        first = rewind if rewind < steps else 0
        if first:
            train(model, 0, first)
        kept_state = _copied(model)
        masks: dict[str, Tensor] = {}
        for time in range(1, self.times + 1):
            if self.mask_from == "end":
                with Held(model, masks):
                    train(model, first, steps)
            if rewind == steps:
                kept_state = _copied(model)
            masks = at_init(
                model,
                self.criterion,
                keep ** (time / self.times),
                batches,
                loss,
                rounds=self.rounds,
                scope=self.scope,
                granularity=self.granularity,
                masks=masks,
            )
            model.load_state_dict(kept_state)
        return masks

    def finish(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        train: Train,
        steps: int,
        *,
        early: int = 0,
        control: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Held:
        """The second half of `run`: put masks on a model with the weights of kW and train it, f2.

        Arguments and what is returned are those of `run`.
        """
        self._check(steps, early, control, generator)
        if control == "shuffle":
            assert generator is not None
            masks = shuffled(masks, generator)
        elif control == "reinit":
            _draw_anew(model)
        rewind = self._rewind(steps, early)
        held = Held(model, masks)
        try:
            train(model, rewind if rewind < steps else 0, steps)
        except BaseException:
            held.close()
            raise
        return held

    def _rewind(self, steps: int, early: int) -> int:
        """kW as an iteration."""
        return {"start": 0, "early": early, "end": steps}[self.weights_from]

    def _check(
        self,
        steps: int,
        early: int,
        control: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if control not in CONTROLS:
            raise ValueError(f"control: {control!r} is not one of {CONTROLS}")
        if control == "shuffle" and generator is None:
            raise ValueError("generator: shuffling draws from one; pass a torch.Generator")
        if not 0 <= self._rewind(steps, early) <= steps:
            raise ValueError(f"early: {early} is not between 0 and the {steps} steps")


#: The published methods.
FRAMES = {
    frame.name: frame
    for frame in (
        Frame("SNIP", "start", "start", "snip", "Lee et al., ICLR 2019"),
        Frame("GraSP", "start", "start", "grasp", "Wang et al., ICLR 2020"),
        Frame("SynFlow", "start", "start", "synflow", "Tanaka et al., NeurIPS 2020", rounds=100),
        Frame("random", "start", "start", "random", "control"),
        Frame("magnitude at initialization", "start", "start", "magnitude", "control"),
        Frame(
            "lottery ticket", "end", "start", "magnitude", "Frankle and Carbin, ICLR 2019", times=5
        ),
        Frame(
            "lottery ticket, rewound", "end", "early", "magnitude", "Frankle et al., ICML 2020",
            times=5,
        ),
        Frame(
            "magnitude", "end", "end", "magnitude", "Han et al., NeurIPS 2015", scope="local",
            times=5,
        ),
        Frame(
            "filters by L1", "end", "end", "magnitude", "Li et al., ICLR 2017",
            granularity="filter", scope="local",
        ),
    )
}  # fmt: skip


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _draw_anew(model: nn.Module) -> None:
    ways = [getattr(module, "reset_parameters", None) for module in model.modules()]
    resets: list[Any] = [way for way in ways if callable(way)]
    if not resets:
        raise ValueError("control: no module of the model has reset_parameters() to draw anew by")
    for reset in resets:
        reset()
