"""SPP: groups of weights are switched off at random, ever more often, until they are gone.

Wang, Zhang, Wang, Yu, Hu: "Structured Probabilistic Pruning for Convolutional Neural Network
Acceleration", BMVC 2018. In every iteration each group is masked with its own probability p; the
weights come back afterwards, so that a group which turns out to matter can recover. p moves by the
group's rank in its layer (`probabilities.increments`), and at 1 the group is gone for good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.checks import check_choice, check_module, check_names, check_number, integer
from taylor_kernels.hooks import OnModel
from taylor_kernels.methods.probabilities import advanced, drawn
from taylor_kernels.methods.spp_groups import Switched, Units, column_layers, unit_groups
from taylor_kernels.methods.spp_switches import Switches
from taylor_kernels.methods.unread import remove_unread
from taylor_kernels.pruning.removing.removal import remove
from taylor_kernels.tracing import trace

_VERSION = 1


class SPP(OnModel):
    """Prune columns or filters by probabilities that grow with training.

    One iteration is `with spp.masked():` around forward and backward passes, then the optimizer's
    step. A layer stops when the share `ratio` of its groups is gone; when all have, `done` is True,
    training goes on without `masked()`, and `taylor_kernels.methods.lowered` or `compact` makes the
    model smaller.

    Args:
        model: in any mode; its parameters may be of any floating dtype.
        ratio: the share of each layer's groups to remove, above 0 and below 1; or layer (the name
            that `probabilities()` has) -> share.
        groups: "columns", as published: an input channel at one kernel position, across the filters
            of a layer. "filters": filters that go together, which needs `example_inputs`.
        layers: names of layers; by default all convolutions that are neither depthwise nor
            transposed, or for "filters" all that a trace finds.
        example_inputs: what the model is called with, for "filters": a tensor, or a tuple of
            arguments, as `tk.trace` takes it.
        every: iterations between updates of the probabilities; the paper has 180.
        step: A, what the least important group's probability grows by at an update.
        decay: u of the formula, which sets how steeply the increments fall with the rank.
        seed: of the masks, which depend on it and on the number of the iteration alone.

    Attributes:
        done: every layer has reached its ratio.
        iteration: how many iterations were finished.
        recoveries: how often a probability that had risen fell back to 0 while its layer was not
            finished yet.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, or layers that have no
            such groups. The model is as it was.

    Weights of groups that are gone are zero after every step of any optimizer. Enter `masked()`
    around autocast, not inside it: autocast keeps the casts it has made of the weights.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> spp = tk.methods.SPP(model, ratio=0.5, every=1, step=0.5)
        >>> while not spp.done:
        ...     optimizer.zero_grad()
        ...     with spp.masked():
        ...         model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> {name: int((p == 1).sum()) for name, p in spp.probabilities().items()}
        {'0': 14, '1': 36}
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float | Mapping[str, float] = 0.5,
        *,
        groups: str = "columns",
        layers: Iterable[str] | None = None,
        example_inputs: Any = None,
        every: int = 180,
        step: float = 0.05,
        decay: float = 0.25,
        seed: int = 0,
    ) -> None:
        check_number("every", every, lambda n: n >= 1, "iterations, 1 or more")
        check_number("step", step, lambda a: 0 < a <= 1, "A, above 0 and at most 1")
        check_number("decay", decay, lambda u: 0 < u < 1, "u, above 0 and below 1")
        check_module(model)
        check_choice("groups", groups, ("columns", "filters"))
        if layers is not None:
            layers = check_names("layers", layers)
        seed = integer("seed", seed)
        self._model, self._kind = model, groups
        self._channels = None
        self._groups: Sequence[Switched]
        if groups == "columns":
            self._groups = column_layers(model, layers)
        else:
            if example_inputs is None:
                raise ValueError(
                    "example_inputs: filters go with all that reads them, which a run of the model "
                    "shows; pass what it is called with"
                )
            self._channels = trace(model, example_inputs).gone_at_zero()
            self._groups = unit_groups(model, self._channels, layers)
        self._targets = self._counts(ratio)
        self._every, self._step, self._decay, self._seed = every, step, decay, seed
        self.iteration = self.recoveries = 0
        self._p = [
            torch.zeros(each.count, device=each.parameters[0].device) for each in self._groups
        ]
        self._switches = Switches(self._groups)
        self._note_gone()

    def _counts(self, ratio: float | Mapping[str, float]) -> list[int]:
        names = [each.name for each in self._groups]
        if isinstance(ratio, Mapping):
            if unknown := sorted(set(ratio) - set(names)):
                raise ValueError(f"ratio: no group of layers {unknown[0]!r}; there are {names}")
            if missing := [name for name in names if name not in ratio]:
                raise ValueError(f"ratio: none for {missing[0]!r}; leave it out by layers=")
            shares = [ratio[name] for name in names]
        else:
            shares = [ratio] * len(names)
        counts = []
        for each, share in zip(self._groups, shares, strict=True):
            check_number("ratio", share, lambda r: 0 < r < 1, "a share above 0 and below 1")
            wanted = math.ceil(share * each.count * (1 - 1e-12))  # 0.55 · 100 is above 55
            counts.append(min(wanted, each.count - 1))
        return counts

    def probabilities(self) -> dict[str, Tensor]:
        """Layer -> [n] float32, the probability of each group to be masked; copies.

        Columns are numbered as the weight [O, I/g, *k] has them, the groups of a grouped
        convolution one after the other.
        """
        return {each.name: p.clone() for each, p in zip(self._groups, self._p, strict=True)}

    @contextmanager
    def masked(self) -> Iterator[None]:
        """One iteration: masks are drawn, and undone behind the backward passes inside.

        On leaving, the weights are what they were, bit for bit, and the gradients of masked groups
        are zero. At every `every`-th iteration the probabilities move, and groups that reach 1 are
        zeroed. An error inside leaves the weights and the probabilities as they were.

        Raises:
            RuntimeError: it is inside already.
            ValueError: weights that are not finite, named, when probabilities are to move.
        """
        masks = drawn(self._p, self._seed, self.iteration)
        with self._switches.scaled([~mask for mask in masks]):
            yield
        for each, mask in zip(self._groups, masks, strict=True):
            each.erase(mask, gradients=True)
        if (self.iteration + 1) % self._every == 0:
            self._advance()
        self.iteration += 1

    @contextmanager
    def evaluated(self, mask: str = "expected") -> Iterator[None]:
        """The model as an accuracy in mid-run should see it; afterwards as it was.

        Args:
            mask: "expected" multiplies every group by 1 − p; "thresholded" masks those of p ≥ ½;
                "drawn" masks at random, as the next iteration will.

        Raises:
            ValueError: `mask` is none of these.
        """
        if mask == "expected":
            factors = [1 - p for p in self._p]
        elif mask == "thresholded":
            factors = [p < 0.5 for p in self._p]
        elif mask == "drawn":
            factors = [~each for each in drawn(self._p, self._seed, self.iteration)]
        else:
            raise ValueError(f"mask: expected 'expected', 'thresholded' or 'drawn', got {mask!r}")
        with self._switches.scaled(factors):
            yield

    def _advance(self) -> None:
        scores = [each.scores() for each in self._groups]
        for each, score in zip(self._groups, scores, strict=True):
            if not score.isfinite().all():
                raise ValueError(f"model: weights of {each.name!r} are not finite; p stays")
        for i, (score, target) in enumerate(zip(scores, self._targets, strict=True)):
            before = self._p[i]
            after = advanced(before, score, target, self._step, self._decay)
            if int((after == 1).sum()) < target:
                self.recoveries += int(((before > 0) & (after == 0)).sum())
            self._p[i] = after
        self._note_gone()
        self._switches.zero()

    def _note_gone(self) -> None:
        counts = self._switches.hold([p == 1 for p in self._p])
        self.done = all(n >= target for n, target in zip(counts, self._targets, strict=True))

    def gone(self) -> dict[str, Tensor]:
        """Layer -> [n] bool, the groups that are gone for good."""
        return {each.name: p == 1 for each, p in zip(self._groups, self._p, strict=True)}

    def compact(self, example_inputs: Any = None, optimizer: object = None) -> nn.Module:
        """Remove what no weight reads any more, in place, and let go of the model.

        Filters that are gone go physically, with their norms and the columns that read them. Of
        columns, the input channels go all of whose columns are gone in every layer that reads them;
        `lower_columns` makes use of the others.

        Args:
            example_inputs: what the model is called with; needed for columns.
            optimizer: one, or several, whose state is cut to match.

        Returns:
            The model.

        Raises:
            ValueError: no example inputs; an optimizer that cannot be cut. Nothing is changed then.
        """
        if self._channels is not None:
            dead = [torch.zeros(group.size, dtype=torch.bool) for group in self._channels.groups]
            for each, p in zip(self._groups, self._p, strict=True):
                assert isinstance(each, Units)
                dead[each.number] = (p == 1).cpu()
            remove(self._model, self._channels, dead, optimizer)
        elif example_inputs is None:
            raise ValueError("example_inputs: pass what the model is called with, to trace it")
        else:
            remove_unread(self._model, example_inputs, optimizer)
        self.close()
        return self._model

    def close(self) -> None:
        """Let go of the model; its weights stay as they are."""
        self._switches.close()

    def state_dict(self) -> dict[str, Any]:
        """Probabilities and counters: plain tensors and numbers. The weights are the model's."""
        return {
            "version": _VERSION,
            "groups": self._kind,
            "probabilities": self.probabilities(),
            "targets": list(self._targets),
            "iteration": self.iteration,
            "recoveries": self.recoveries,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: the same masks are drawn.

        Raises:
            ValueError: the state of other groups, layers or targets. Nothing is changed then.
        """
        mine = self.state_dict()
        if missing := sorted(mine.keys() - state.keys()):
            raise ValueError(f"state: it lacks {missing}; pass what SPP.state_dict() gave")
        for key in ("version", "groups", "targets"):
            if state.get(key) != mine[key]:
                raise ValueError(
                    f"state: {key} is {state.get(key)!r}, here it is {mine[key]!r}; make the "
                    "SPP as the one was made that was saved"
                )
        theirs = state["probabilities"]
        shapes = {name: p.shape for name, p in mine["probabilities"].items()}
        if {name: p.shape for name, p in theirs.items()} != shapes:
            raise ValueError("state: its probabilities are those of other layers")
        for name, p in theirs.items():
            if not ((p >= 0) & (p <= 1)).all():
                raise ValueError(f"state: probabilities of {name!r} are not all in [0, 1]")
        counts = tuple(int(state[key]) for key in ("iteration", "recoveries", "seed"))
        self._p = [
            theirs[each.name].detach().to(p, copy=True)
            for each, p in zip(self._groups, self._p, strict=True)
        ]
        self.iteration, self.recoveries, self._seed = counts
        self._note_gone()
