"""Importance: a meter on a model that scores its filters, minibatch by minibatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from taylor_kernels.backends import select
from taylor_kernels.checks import check_flag, check_module
from taylor_kernels.criteria import Criterion, get_criterion
from taylor_kernels.distributed.ranks import Ranks, check_ranks
from taylor_kernels.distributed.tables import check_parts, check_ranks_stream
from taylor_kernels.importance.readout import Readout
from taylor_kernels.importance.scored import placed, scored_layers
from taylor_kernels.importance.together import Alone, Together
from taylor_kernels.mixed_precision import Scaling
from taylor_kernels.statistics import (
    check_closure,
    check_loss_scale,
    check_streams,
    check_weight,
    checked_tables,
    filter_count,
    get_statistic,
    held_weight,
)
from taylor_kernels.statistics.counting import Mask, counted


class Importance(Readout):
    """Scores every filter of a model's convolution and linear layers under one criterion.

    Call update() after every backward() of a training loop, and compute() for the scores.

    The meter reads gradients and activations, and changes neither: a training step gives the same
    bits with it and without it. Forward passes under torch.no_grad() are not seen.

    Criteria of second order that need more than one backward pass run the model themselves
    (`needs_closure`), in place of backward():

        imp = tk.Importance(model, "taylor_so_diag")
        for x, y in batches:
            imp.update(closure=lambda: loss_fn(model(x), y))

    They leave what a forward pass leaves: `.grad`, `requires_grad` and the mode stay as they were;
    other meters on the model do not count these passes.

    Defined behaviour, by example:
        layer used twice: its weights' gradients, and its gate's, add up over the uses.
        gradient accumulation: backward() several times, then update() once; weight criteria and
            `taylor_fo_bn` see the summed gradient, `taylor_fo_gate` and `obd_fisher` every example.
        weights whose gradient is None (not reached): a gradient of zero; but if no layer has a
            gradient, update() raises.
        frozen weights: left out with a warning under criteria that read weight gradients, an error
            if named in `layers`. Gate criteria do not need them.
        layers before the first trained one: no gradient reaches their outputs, so gate criteria and
            `obd_fisher` have no score for them, which is nan, and warn; inside scoring() they do.
        layers that are never called, since other code multiplies by their weight (as
            nn.MultiheadAttention does by that of its `out_proj`): without `example_inputs` criteria
            that look at outputs have no score for them, which is nan, and warn.
        frozen BatchNorm, or one without affine parameters: its gate is read off its output.
        BatchNorm in train mode normalises by the batch, in eval mode by its running statistics:
            the scores are those of the network in that mode. In train mode it mixes examples; what
            is squared example by example (`taylor_fo_gate`, `obd_*`, `taylor_so_diag`) is then the
            gradient of the minibatch's loss in the example's own share of a gate or a weight, the
            way through the batch's statistics included.
        in-place operations after a layer: detected; a copy is kept where it is needed.
        two layers with one weight: weight criteria give both the score of the one parameter,
            `obd_fisher` each that of its own use.
        several calls of the model before one backward(): the examples of each are examples of
            their own. Gradients taken by torch.autograd.grad() in between are counted too.
        activation checkpointing: as without, but inside scoring() only with use_reentrant=False.
        torch.compile: make the meter (or the pruner) first, then compile, and close() it for speed:
            the graph is broken at every layer that is watched. In a closure, call the model as it
            was before it was compiled.
        nn.DataParallel: not supported, its replicas are no part of the model.
        DistributedDataParallel: hand over the module inside it, and call that in a closure; with
            `ranks` the scores are those of all processes.

    close() takes the hooks off the model; so does the end of the meter's life.

    Args:
        model: any nn.Module.
        criterion: a name from `criterion_names()`, or a `Criterion`.
        layers: names of what to score (* and ? match); None means all convolution and linear
            layers. A name that matches none of these is looked for among norms (a channel's score
            is of its scale and shift), embeddings (a score for each column, a channel of what they
            return) and other parameters by their own names (along the next-to-last dimension, where
            functional.linear has outputs, or as a trace of the `example_inputs` finds them used):
            `layers=["*", "*norm*", "embed"]`. Of these alone criteria can tell that read weights.
        backend: one of `tk.available_backends()`; None picks by device.
        example_inputs: what to trace the model on (`tk.trace`), so that the gates of filters stand
            behind all norms of their channels: a tensor, a tuple of arguments or a dict of keyword
            arguments. Only gate criteria, `bn_scale` and `oracle` read it, and
            those of weights that `layers` names beside layers. A filter has then the
            score of its gate, which filters that go together share. Give it wherever a norm comes
            later than directly behind a layer: behind an activation, a pooling, a sum or a
            concatenation, as in pre-activation networks and DenseNets.
        ranks: the processes that share the minibatches (`tk.distributed.Ranks`), each of which
            makes the same meter. compute() is collective then and gives the same bits on all.
        scaler: the GradScaler of the training loop. Its scale is divided out, whether or not
            unscale_() has been called, and minibatches whose steps it skips do not count.
        stream: score each weight as its gradient comes in backward(), and free the gradient of
            every parameter of the model there, for models whose gradients do not fit beside their
            weights. The scores are the same bits. No optimizer can step on such a pass, and a
            second backward() before update() is an error, since what it would be added to is gone.
            Of criteria that read weight gradients; others need none inside scoring().

    Attributes:
        dropped: minibatches that did not count on any rank, since one of them had gradients that
            were not finite, or called skip().

    Raises:
        ValueError: an unknown criterion (the message names the nearest), a layer name that
            matches nothing, a model without a layer to score, or one that does not run on the
            example inputs.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> imp = tk.Importance(model, "taylor_fo")
        >>> for _ in range(5):
        ...     model.zero_grad()
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     imp.update()
        >>> {name: tuple(scores.shape) for name, scores in imp.compute().items()}
        {'0': (3,), '2': (2,)}
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: str | Criterion = "taylor_fo_bn",
        *,
        layers: Sequence[str] | None = None,
        backend: str | None = None,
        example_inputs: Any = None,
        ranks: Ranks | None = None,
        scaler: GradScaler | None = None,
        stream: bool = False,
    ) -> None:
        check_module(model)
        check_ranks(ranks)
        self.criterion = get_criterion(criterion)
        statistic = get_statistic(self.criterion.statistic)
        check_flag("stream", stream)
        if stream:
            check_streams(statistic, self.criterion.name)
        self._layers = scored_layers(model, statistic, layers, example_inputs)
        for layer in self._layers.values():
            held = held_weight(layer)
            select(held.device, held.dtype, backend)  # says now what cannot run
        self._sizes = {name: filter_count(layer) for name, layer in self._layers.items()}
        self._statistic = placed(model, statistic, self._layers, backend, example_inputs)
        self._statistic.moments = self.criterion.moments
        self._closed = False
        self._scaling = None if scaler is None else Scaling(scaler, model)
        self.ranks = ranks
        check_parts(self._statistic, ranks)
        if stream:
            check_ranks_stream(self._statistic, ranks)
            self._statistic.start_stream(watch=scaler is not None)
        self._minibatches = (
            Alone(self._statistic)
            if ranks is None
            else Together(ranks, self.criterion, self._statistic, self._sizes)
        )
        self._zero()

    def update(
        self,
        *,
        loss_scale: float = 1.0,
        closure: Callable[[], Tensor] | None = None,
        weight: float = 1.0,
        mask: Mask | None = None,
    ) -> None:
        """Score what backward() left: once, before unscaling, clipping, step() and zero_grad().

        Args:
            loss_scale: what the loss was multiplied by before backward(), as by a GradScaler
                (`scaler.get_scale()`), divided out again. Gate criteria take gradients in
                backward() itself, so it always holds for them. Weight criteria read `.grad`: call
                update() before `scaler.unscale_(optimizer)` and before clipping.
            closure: for criteria that run the model themselves (`needs_closure`), in place of
                backward(): returns the loss of the model as it stands, a scalar. The model stays
                in its mode, `.grad` stays as it is. The loss is taken as it is, whatever
                `loss_scale`: return it unscaled.
            weight: of this rank's minibatch in that of all ranks, if they are not of one size:
                the number of its examples, say.
            mask: [N] or [N, T], bool or integers, 0 where an example, or one of its T tokens, is
                padding, as an `attention_mask`; a list of them for several forward passes. What
                counts examples (`taylor_fo_gate`, `obd_fisher`) leaves these out: an example
                without a token; and tokens, where a layer is given all of them in dim 0. The loss
                is to leave them out too.

        For a minibatch whose gradients overflowed, call skip() in place of it.

        Raises:
            RuntimeError: there is nothing to read (the message says why and what to do); the meter
                is closed.
            ValueError: `loss_scale` or `weight` is not a positive number; a closure is missing, or
                given to a criterion that takes none, or returned no scalar that depends on the
                model; a mask does not fit what a layer was given, or leaves nothing over.
        """
        check_loss_scale(loss_scale)
        check_weight(weight)
        self._require_open("update")
        check_closure(self._statistic, closure, self.criterion.name, "update")
        if self._scaling is not None:
            loss_scale = self._scaling.of(self._statistic, loss_scale)
            if self._scaling.skips(self._statistic.stream):
                self.skip()
                return
        loss_scale *= self._minibatches.prepare()
        with counted(self._statistic, mask):
            found = self._statistic.collect(loss_scale=loss_scale, closure=closure)
        tables = checked_tables(self._statistic, found)
        streamed = self._statistic.stream is not None  # then its gradients have told
        if (
            self._scaling is not None
            and not streamed
            and not self._scaling.check_finite(self._statistic, tables)
        ):
            self.skip()
            return
        self._device = tables[0].device
        if self._minibatches.add(tables, weight, self._totals):
            self.sync()

    def absent(self) -> None:
        """In place of update() on a rank that has no part of the minibatch: it counts for nothing.

        Ranks whose loaders end early call it until the others are done.

        Raises:
            RuntimeError: the meter is closed, or has no `ranks`.
        """
        self._require_open("absent")
        if self.ranks is None:
            raise RuntimeError("absent: the meter has no ranks=, so there is no one to wait for it")
        self._statistic.discard()
        if self._minibatches.absent():
            self.sync()

    def skip(self) -> None:
        """Forget what backward() left since the last update(): in place of update(), for a
        minibatch that is not to count, as one whose gradients overflowed.

        Without it the next update() would add that minibatch's gates to its own. Weight criteria
        read `.grad`, which zero_grad() clears.

        Raises:
            RuntimeError: the meter is closed.
        """
        self._require_open("skip")
        self._statistic.discard()
        if self._minibatches.drop():
            self.sync()

    def close(self) -> None:
        """Take every hook off the model; the scores stay, and none is added."""
        self._closed = True
        self._statistic.close()

    def _require_open(self, method: str) -> None:
        if self._closed:
            raise RuntimeError(
                f"{method}: the meter is closed; make a new one, whose load_state_dict() goes on "
                "from this one's state_dict()"
            )
