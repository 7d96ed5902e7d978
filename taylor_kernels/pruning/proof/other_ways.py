"""Runs of a copy of a model, and others on the user's own example where that leads code elsewhere.

A proof runs examples that are smaller, repeated or in double precision, and most models in eval
mode alone. Which way code takes on them is compared with the way that it takes on the example as it
is, in the model's own precision. That costs a run, and is asked for only where some branch of code
that has run may depend on an example.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch import nn
from torch.utils._pytree import tree_map

from taylor_kernels.pruning.proof.defaults import widened
from taylor_kernels.pruning.proof.masked_runs import MaskedRuns
from taylor_kernels.pruning.proof.ways import Ways
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.run.returned import Read


class Given(NamedTuple):
    """What a model is run on.

    Attributes:
        inputs: for the model.
        exact: in double precision, the model too.
        train_runs: what `lowest` is in each run in train mode.
        written: names of the tensors that runs may write into; None for all buffers.
    """

    inputs: Any
    exact: bool
    train_runs: list[bool]
    written: list[str] | None = None


class OtherWays(MaskedRuns):
    """Knows whether code goes another way on the user's example, or in train mode.

    Args: as of `MaskedRuns`.
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
        super().__init__(model, original, example_inputs, channels, train_too, outputs)
        ways = self._run.ways or {}
        if not train_too and (False, False) in ways and ways[False, False].may_train_otherwise:
            self._learn_whether_training_is_another_way(ways)
        self._other = self._another_way(example_inputs, ways)
        self._run.ways = None

    def _learn_whether_training_is_another_way(self, ways: dict[tuple[bool, bool], Ways]) -> None:
        """Numbers that code computes by itself show in no operation that a trace compares."""
        run = self._run
        idle, written = run.idle, run.written
        run.expect_all_written()
        with suppress(Exception), run.restored():
            run.outputs(train=True)
        run.idle, run.written = idle, written
        trained = ways.get((True, False))
        if trained is not None and ways[False, False].trains_otherwise(trained):
            self._learn_train_runs()

    def _another_way(
        self, example_inputs: Any, ways: dict[tuple[bool, bool], Ways]
    ) -> Given | None:
        """What leads code the way that it goes on the user's own example, if the inputs of all runs
        lead it another way, since they are fewer, smaller, more or in double precision."""
        mine = {k: way for k, way in ways.items() if not k[0] or k[1] in self._train_runs}
        if not self._run.exact or not any(way.may_differ for way in mine.values()):
            return None
        plain = self._ways(Given(example_inputs, False, self._train_runs), as_it_is=True)
        if plain == mine:
            return None
        same = self._noise.on_inputs(example_inputs)
        exact = Given(tree_map(widened, same), True, self._train_runs)
        if plain is not None and self._ways(exact) == plain:
            return exact
        given = exact._replace(inputs=same, exact=False)
        found = self._ways(given)
        # Where noise alone leads it elsewhere, the numbers of the example do.
        return None if found in (mine, None) else given

    def _ways(
        self, given: Given, *, as_it_is: bool = False
    ) -> dict[tuple[bool, bool], Ways] | None:
        """The ways that code takes on inputs, where it runs.

        Args:
            as_it_is: the model has its own values, without noise.
        """
        with self._on(given, as_it_is=as_it_is), suppress(Exception):
            found: dict[tuple[bool, bool], Ways] = {}
            self._run.ways = found
            with self._run.restored():
                if as_it_is:
                    self._run.put(self._values.models_own())
                self._run.all_outputs(given.train_runs)
            return found
        return None

    @contextmanager
    def _on(self, given: Given, *, as_it_is: bool = False) -> Iterator[None]:
        """Runs inside are on these inputs."""
        run = self._run
        mine = Given(run.inputs, run.exact, self._train_runs, run.written)
        idle, alone = run.idle, run.alone
        self._take(given, as_it_is)
        try:
            yield
        finally:
            self._take(mine, as_it_is)
            run.idle, run.alone = idle, alone

    def _take(self, given: Given, as_it_is: bool) -> None:
        run = self._run
        if given.exact != run.exact and not as_it_is:
            self._values.set_exact(given.exact)
            run.remember()
        run.inputs, run.exact, self._train_runs = given.inputs, given.exact, given.train_runs
        if given.written is None:
            run.expect_all_written()
        else:
            run.written = given.written
        run.forget()
