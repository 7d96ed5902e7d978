"""Modules whose parameters keep their widths.

Attention of classes that inherit PyTorch's checks them; TorchScript's modules take no parameters of
other shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.tracing.multihead import CHECKED, PrunedMultiheadAttention
from taylor_kernels.tracing.notes.atoms import Reason
from taylor_kernels.tracing.run.recorder import Recorder


def keep_whole(recorder: Recorder, names: Mapping[nn.Module, str]) -> None:
    """Parameters keep the widths that their modules check, or cannot do without."""
    for module, name in names.items():
        if isinstance(module, torch.jit.ScriptModule):
            reason = Reason(f"belongs to a module that TorchScript has compiled ({name!r})", name)
            for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                for vector in recorder.labels(own).dims:
                    recorder.record.fix(vector, reason)
        if not checks_widths(module):
            continue
        reason = _checked_width(name)
        for path, dim in CHECKED:
            tensor = dict(module.named_parameters()).get(path)
            if tensor is not None:
                recorder.record.fix(recorder.labels(tensor).dims[dim], reason)


def keep_what_it_read(
    recorder: Recorder,
    module: nn.Module,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Such an attention has run: its query keeps its width, and computed weights keep theirs.

    A parametrization (`weight_norm`) leaves no parameter of the name that is checked, and may make
    the weight of any shapes. Computed once more, it has the labels of what it is made of.
    """
    reason = _checked_width(name)
    query = args[0] if args else kwargs.get("query")
    if isinstance(query, Tensor) and query.dim():
        recorder.record.fix(recorder.labels(query).dims[-1], reason)
    for path, dim in CHECKED:
        owner, _, leaf = path.rpartition(".")
        with recorder.uncounted():
            weight = getattr(module.get_submodule(owner), leaf, None)
        if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
            recorder.record.fix(recorder.labels(weight).dims[dim], reason)


def checks_widths(module: nn.Module) -> bool:
    """Whether a module is an nn.MultiheadAttention whose own code runs, which checks its widths."""
    inherits = isinstance(module, nn.MultiheadAttention)
    return inherits and type(module) is not PrunedMultiheadAttention


def _checked_width(name: str) -> Reason:
    text = "belongs to a class of nn.MultiheadAttention, which checks its width"
    return Reason(f"{text} against embed_dim ({name!r})", name)
