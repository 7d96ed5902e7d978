"""A problem of a user's own: the model and the minibatches that the command line names."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_kernels.methods.masks import ranked_weights
from taylor_kernels.studies.at_init.problem import Pair, Problem
from taylor_kernels.studies.digest import digest_tensors
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.own.course import JUDGED
from taylor_kernels.studies.own.judge import Judge
from taylor_kernels.studies.own.parts import (
    Minibatches,
    as_pair,
    seed_everything,
    sources_digest,
    users_model,
)
from taylor_kernels.studies.own.paths import find_function
from taylor_kernels.studies.own.task import as_mistakes

if TYPE_CHECKING:
    from taylor_kernels.studies.at_init.settings import AtInitSettings


def users_problem(settings: AtInitSettings, seed: int, device: torch.device) -> Problem:
    """The model that --model names, as it is made, on the minibatches of --data.

    Raises:
        Mistake: an import path leads nowhere, or to what cannot be used.
    """
    assert settings.model is not None
    assert settings.data is not None
    data = settings.data
    seed_everything(seed)
    start = copy.deepcopy(users_model(settings.model)).to(device).train()
    start.zero_grad(set_to_none=True)
    with as_mistakes():
        ranked_weights(start)
    loader = Minibatches("--data", data, seed=seed, limit=settings.steps, device=device)
    judge = Judge(settings.loss, None)

    def epoch(number: int) -> Iterator[Pair]:
        return (as_pair("--data", data, n, batch) for n, batch in loader.epoch(number))

    scored = list(itertools.islice(epoch(0), settings.batches))
    inputs, _ = scored[0]
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise Mistake(
            f"--data: inputs are {found}; scores of untrained networks are of a tensor of floats"
        )
    outcome = judge.checked(copy.deepcopy(start), scored[0])
    if not isinstance(outcome.outputs, Tensor):
        raise Mistake(
            f"--model: it returned a {type(outcome.outputs).__name__}; scores of untrained "
            "networks are of a tensor of outputs"
        )
    val = settings.val
    if val is None:
        kept = list(itertools.islice(epoch(0), JUDGED))
        judged: Callable[[], Iterable[Pair]] = lambda: kept  # noqa: E731
    else:
        other = Minibatches("--val", val, seed=seed, limit=None, device=device)
        judged = lambda: (as_pair("--val", val, n, b) for n, b in other.epoch(0))  # noqa: E731
        next(iter(judged()))
    return Problem(
        settings.model.partition(":")[2],
        seed,
        lambda: copy.deepcopy(start),
        epoch,
        loader.counted(),
        scored,
        judged,
        judge,
        F.cross_entropy if settings.loss is None else find_function("--loss", settings.loss),
        {
            "paths": [settings.model, data, val, settings.loss],
            "sources": sources_digest(settings.model, data, val, settings.loss),
            "seed": seed,
            "steps": settings.steps,
            "start": digest_tensors(start.state_dict().values()),
            "loss": f"{outcome.loss.item():.6g}",
        },
        [users_problem],
    )
