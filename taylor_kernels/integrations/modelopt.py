"""NVIDIA Model-Optimizer: its search ranks channels by Taylor scores in place of weight norms.

    import modelopt.torch.nas as mtn
    from taylor_kernels.integrations.modelopt import use_importance

    model = mtn.convert(model, "fastnas")
    use_importance(model, scores)
    model, state = mtn.search(model, constraints, dummy_input, config)

Model-Optimizer sorts the channels of every searchable width once and keeps the first ones. Its
`register_importance` adds an estimator to those that are there, and their sum, each over its
maximum, decides; so a gradient's score registered there is mixed with the norm of the weights that
read the channel. Here scores take the place of what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.importance import Importance
from taylor_kernels.integrations import absent

try:
    from modelopt.torch.opt.dynamic import DynamicModule
except ModuleNotFoundError as error:
    raise absent(error, "modelopt", "nvidia-modelopt", "0.47.0") from error

#: What Model-Optimizer calls the width of a layer's output.
_WIDTHS = ("out_channels", "out_features")


def use_importance(model: nn.Module, scores: Importance | Mapping[str, Tensor]) -> list[str]:
    """Let scores of filters, and nothing else, rank the channels of a converted model.

    Layers whose outputs are added share one width; the scores of a channel's filters add up. The
    norms that Model-Optimizer takes by itself stay where no layer of a width is scored. It sorts no
    width that torch.cat joins to others, so that scores of these have no effect.

    Args:
        model: converted by `mtn.convert(model, "fastnas")` or "autonas", in place.
        scores: {layer's name: [filters]}, or a `tk.Importance` on the model as it was before, which
            is read now. Layers that are left out, or are none of these, score nothing.

    Returns:
        The layers whose scores rank a width that can be searched.

    Raises:
        ValueError: the model is not converted; a score is of another size than its layer, or is
            not finite; no score belongs to a searchable width. Nothing is changed.

    Example:
        >>> import contextlib, io, torch
        >>> from torch import nn
        >>> import modelopt.torch.nas as mtn
        >>> from taylor_kernels.integrations.modelopt import use_importance
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
        >>> scores = {"0": torch.arange(64.0)}
        >>> with contextlib.redirect_stdout(io.StringIO()):
        ...     model = mtn.convert(model, "fastnas")
        >>> use_importance(model, scores)
        ['0']
        >>> model[0].get_hparam("out_channels").importance.argmax()
        tensor(63)
    """
    found = scores.compute() if isinstance(scores, Importance) else scores
    widths = {
        name: module.get_hparam(local)
        for name, module in model.named_modules()
        if isinstance(module, DynamicModule)
        for local in _WIDTHS
        if local in dict(module.named_hparams())
    }
    if not widths:
        raise ValueError(
            'model: has no searchable width; convert it first, by mtn.convert(model, "fastnas")'
        )
    parts: dict[Any, list[Tensor]] = {}
    used = []
    for name, score in found.items():
        width = widths.get(name)
        if width is None or not (width.is_configurable and width.is_sortable):
            continue
        if score.shape != (width.max,):
            raise ValueError(
                f"scores: {name} has {tuple(score.shape)}, and {width.max} filters; give one "
                "score for each filter of the layer as it is"
            )
        if not score.isfinite().all():
            raise ValueError(f"scores: those of {name} are not all finite, and rank nothing")
        parts.setdefault(width, []).append(score.detach().clone())
        used.append(name)
    totals = {
        width: torch.stack([s.to(of[0].device) for s in of]).sum(0) for width, of in parts.items()
    }
    if not totals:
        raise ValueError(
            f"scores: {', '.join(found) or 'none'} belong to no width that can be searched; there "
            f"are {', '.join(widths)}"
        )
    for width, total in totals.items():
        width._importance_estimators = [_constant(total)]
    return used


def _constant(total: Tensor) -> Callable[[], Tensor]:
    return lambda: total
