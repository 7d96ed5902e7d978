"""A user's own model and data as a problem that criteria are compared on."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.oracle.problem import Batch, Problem, inner_layers
from taylor_kernels.studies.oracle.settings import OracleSettings
from taylor_kernels.studies.own.judge import Judge, is_classifier
from taylor_kernels.studies.own.parts import (
    Minibatches,
    as_pair,
    seed_everything,
    sources_digest,
    users_model,
)
from taylor_kernels.studies.own.paths import find, find_function


def user_problem(settings: OracleSettings, device: torch.device) -> tuple[Problem, dict[str, str]]:
    """The model that --model names, in eval mode, on minibatches of --data; and the layers that are
    left out -> why.

    All parameters are made to require a gradient, so that frozen layers are compared too. The
    oracle and the pruning curves see the same minibatches as the criteria.

    Raises:
        Mistake: an import path leads nowhere, or to what cannot be used.
    """
    assert settings.model is not None
    assert settings.data is not None
    seed_everything(settings.seed)
    model = users_model(settings.model).to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    batches = _pairs(settings, device)
    outcome = Judge(settings.loss, None).checked(model, batches[0])
    loss = F.cross_entropy if settings.loss is None else find_function("--loss", settings.loss)
    try:
        layers, left_out = inner_layers(model, batches[0][0])
    except ValueError as error:
        raise Mistake(f"--{error}") from None
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise Mistake(f"--model: it has no layer whose filters can be compared ({why})")
    sources = sources_digest(settings.model, settings.loss)
    problem = Problem(
        settings.model,
        model,
        layers,
        batches,
        oracle_batches=batches,
        test_batches=batches,
        loss=loss,
        classifies=is_classifier(outcome.outputs, outcome.targets),
        origin=f"{settings.model} {settings.loss} {sources} {outcome.loss.item():.4g}",
    )
    return problem, left_out


def import_users_modules(settings: OracleSettings) -> None:
    """Import what --model, --data and --loss name: it may register criteria.

    Raises:
        Mistake: there is no such thing, or importing it fails.
    """
    if settings.model is None or settings.data is None:
        return
    for option in ("model", "data", "loss"):
        if path := getattr(settings, option):
            find(f"--{option}", path)


def _pairs(settings: OracleSettings, device: torch.device) -> list[Batch]:
    assert settings.data is not None
    loader = Minibatches(
        "--data", settings.data, seed=settings.seed, limit=settings.batches, device=device
    )
    data = settings.data
    return [as_pair("--data", data, number, batch) for number, batch in loader.epoch(0)]
