"""A user's own model, loader and loss, by import path; every mistake is one clear line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.studies.digest import digest_files
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.oracle.problem import (
    Batch,
    Problem,
    inner_layers,
    is_classifier,
    to_device,
)
from taylor_kernels.studies.oracle.settings import OracleSettings
from taylor_kernels.studies.source_code import module_files
from taylor_kernels.tracing.running import call

_PACKAGE = Path(__file__).parents[2]


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
    _seed(settings.seed)
    model = _model(settings.model).to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    batches = [to_device(pair, device) for pair in _batches(settings.data, settings.batches)]
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    if settings.loss is not None:
        loss = find("--loss", settings.loss)
        if not callable(loss):
            raise Mistake(f"--loss: {settings.loss} is a {type(loss).__name__}, not a function")
    classifies, first = _check_loss(model, batches[0], loss, settings.loss)
    try:
        layers, left_out = inner_layers(model, batches[0][0])
    except ValueError as error:
        raise Mistake(f"--{error}") from None
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise Mistake(f"--model: it has no layer whose filters can be compared ({why})")
    problem = Problem(
        settings.model,
        model,
        layers,
        batches,
        oracle_batches=batches,
        test_batches=batches,
        loss=loss,
        classifies=classifies,
        origin=f"{settings.model} {settings.loss} {_sources(settings)} {first:.4g}",
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


def find(option: str, path: str) -> Any:
    """What "package.module:name" names; modules of the working directory are found too.

    Raises:
        Mistake: there is no such thing, or importing it fails.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise Mistake(
            f"{option}: {path!r} is not an import path; write package.module:name, such as "
            "mymodels.resnet:make_model"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise Mistake(
                f"{option}: there is no module {error.name!r}, neither installed nor in "
                f"{os.getcwd()}"
            ) from None
        raise Mistake(f"{option}: importing {module_name} failed: {_describe(error)}") from None
    except (Exception, SystemExit) as error:
        raise Mistake(f"{option}: importing {module_name} failed: {_describe(error)}") from None
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise Mistake(f"{option}: {module_name} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def _model(path: str) -> nn.Module:
    model = find("--model", path)
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise Mistake(
                f"--model: {path} is a {type(model).__name__}, neither a torch.nn.Module nor a "
                "function that makes one"
            )
        with _naming(f"--model: {path}()"):
            model = model()
    if not isinstance(model, nn.Module):
        raise Mistake(f"--model: {path}() gave a {type(model).__name__}, not a torch.nn.Module")
    if not any(True for _ in model.parameters()):
        raise Mistake(f"--model: {path} has no parameters, so there is nothing to score")
    return model


def _batches(path: str, count: int) -> list[Batch]:
    loader = find("--data", path)
    if not isinstance(loader, Iterable) and callable(loader):
        with _naming(f"--data: {path}()"):
            loader = loader()
    if not isinstance(loader, Iterable):
        raise Mistake(
            f"--data: {path} gave a {type(loader).__name__}, which cannot be iterated over"
        )
    batches: list[Batch] = []
    with _naming(f"--data: iterating over {path}"):
        for batch in loader:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                many = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
                raise Mistake(
                    f"--data: minibatch {len(batches)} of {path} is a "
                    f"{type(batch).__name__}{many}, not a pair (inputs, targets)"
                )
            batches.append((batch[0], batch[1]))
            if len(batches) == count:
                break
    if not batches:
        raise Mistake(f"--data: {path} yields no minibatch")
    return batches


def _check_loss(
    model: nn.Module, batch: Batch, loss_function: Callable[[Any, Any], Any], path: str | None
) -> tuple[bool, float]:
    """See that a minibatch has a loss; whether it is a classifier's, and what it is."""
    with _naming("--model: the model, on the first minibatch,"):
        outputs = call(model, batch[0])
    hint = "" if path else " (cross_entropy; give another one with --loss package.module:name)"
    with _naming(f"--loss: the loss{hint}, on the first minibatch,"):
        loss = loss_function(outputs, batch[1])
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        gave = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise Mistake(f"--loss: it gave {gave}; return a scalar tensor, a mean over the examples")
    if not loss.isfinite():
        raise Mistake(f"--loss: it is {loss.item()} on the first minibatch")
    if not loss.requires_grad:
        raise Mistake("--loss: it does not depend on the model's parameters; do not detach it")
    return is_classifier(outputs, batch[1]), loss.item()


def _sources(settings: OracleSettings) -> str:
    """Stands for the user's modules and what they import: a loss made by functools.partial, or a
    setting of the model that is no weight, is seen nowhere else."""
    names = {path.partition(":")[0] for path in (settings.model, settings.loss) if path}
    return digest_files(module_files(names))


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """An error of the user's code becomes one line that says where."""
    try:
        yield
    except Mistake:
        raise
    except (Exception, SystemExit) as error:
        raise Mistake(f"{what} raised {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    """The error, and the line of the user's where it came from."""
    beside = (str(_PACKAGE), "site-packages", "<frozen")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(part in frame.filename for part in beside):
            return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
    return f"{type(error).__name__}: {error}"


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
