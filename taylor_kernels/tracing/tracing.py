"""`trace`: run a model once with labels riding along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from taylor_kernels.checks import check_number
from taylor_kernels.tracing import rules  # noqa: F401 - importing registers them
from taylor_kernels.tracing.answer.channels import Channels
from taylor_kernels.tracing.model.caches import modules_by_name
from taylor_kernels.tracing.multihead import prunable_attention
from taylor_kernels.tracing.notes.experts import find_mixtures
from taylor_kernels.tracing.rules.norms import running_variances
from taylor_kernels.tracing.run.returned import Read, checked_outputs
from taylor_kernels.tracing.run.running import (
    is_lazy,
    one_at_a_time,
    tensors_in,
    tensors_of_modules,
)
from taylor_kernels.tracing.run.runs import Count, Runs
from taylor_kernels.tracing.run.shared_memory import Shared


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    seconds: float = 300.0,
    blocks: bool = False,
    outputs: Read = None,
) -> Channels:
    """Which index of which dimension of which parameter goes with which.

    The model is run once in eval mode on the example inputs, below autograd and module code, so
    functions, methods, custom modules and any container of outputs are read alike. It is afterwards
    as it was: modes, buffers, attributes, hooks, random state, also after an error. Where that run
    has not read some parameter or buffer, or train mode does more, further runs in train mode say
    which channels go together there; what these do not read either, though chance might lead a
    run to it or the model does not train on the inputs, keeps the channels of its width.

    Of a large model without hooks on its modules, convolutions, linear layers and norms are not
    computed, nor most of what is done to what they return: what a trace says follows from shapes.
    As soon as code reads values (in a condition, as an index, in numpy), that run ends, and the
    model is run as it is.

    Args:
        model: any module; parameters may be on any device, in any floating-point type.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments. They
            are run as they are, since only the caller knows what may be cut: one item is enough.
        seconds: tracing stops with an error after this time.
        blocks: also follow where tensors come from, so that `Channels.find_blocks` can be asked.
        outputs: names of fields, or places, of what the model returns that others read, and that
            keeps its width therefore. None for all, but for state that the model itself takes back.

    Returns:
        The groups of channels that go together, and for all others why they cannot go.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model has no parameters, has lazy or meta ones, or does not run on the
            example inputs, or nothing is in these, or it returns none of such `outputs`.
        TimeoutError: it takes longer than `seconds`; or other threads have traced, one after
            another, for ten minutes.
        MemoryError: labels need more than 2 GiB.

    Example:
        >>> import torch
        >>> from taylor_kernels.tracing import trace
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> channels = trace(model, torch.randn(1, 4))
        >>> channels.groups[0].size, channels.skipped
        (8, {'2': 'reaches the output of the model'})
    """
    return traced(model, example_inputs, seconds, blocks=blocks, outputs=outputs)


def traced(
    model: nn.Module,
    example_inputs: Any,
    seconds: float = 300.0,
    count: Count | None = None,
    *,
    blocks: bool = False,
    outputs: Read = None,
    shared: Shared | None = None,
) -> Channels:
    """`trace` for callers that run the operations themselves. One runs at a time in a process:
    a trace exchanges methods of tensors and classes of modules, and puts back what it found.

    Args:
        count: runs the operations.
        shared: what shares memory in the model that this one is a copy of.
    """
    with one_at_a_time():
        check_number("seconds", seconds, lambda most: most > 0, "a number above 0")
        modules = _modules(model)
        tensors = _checked(modules)
        if outputs is not None:
            checked_outputs(outputs)
        given = list(tensors_in(example_inputs))
        if given and not any(tensor.numel() for tensor in given):
            raise ValueError(
                f"example_inputs: nothing is in them (shape {tuple(given[0].shape)}), so "
                "sizes cannot be told apart; pass at least one example"
            )
        runs = Runs(
            model,
            example_inputs,
            modules,
            tensors,
            seconds=seconds,
            count=count,
            blocks=blocks,
            read=outputs,
            shared=shared,
        )
        recorder = runs.recorded(running_variances(modules))
        recorder.record.mixtures += find_mixtures(recorder.record, modules, recorder.returned)
        written = (n for n, tensor in tensors.items() if runs.untouched.was_written(tensor))
        recorder.record.written = list(written)
        with prunable_attention(runs.names):
            return Channels(recorder.record, modules)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return modules_by_name(model)


def _checked(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters and buffers of a model that can be traced."""
    parameters, buffers = tensors_of_modules(modules)
    tensors = {**parameters, **buffers}
    if not tensors:
        raise ValueError("model: it has no parameters, so there are no channels to follow")
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ValueError(
                f"model: its parameter {name!r} is lazy; run the model once on the example inputs"
            )
        if tensor.is_meta:
            raise ValueError(
                f"model: its parameter {name!r} is on the meta device; load the model's values "
                "first (model.to_empty(device=...), then load_state_dict)"
            )
    return tensors
