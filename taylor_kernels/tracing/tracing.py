"""`trace`: run a model once with labels riding along."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.tracing import rules  # noqa: F401 - importing registers them
from taylor_kernels.tracing.caches import keeping, renew
from taylor_kernels.tracing.channels import Channels
from taylor_kernels.tracing.experts import find_mixtures, is_router, one_expert_at_a_time
from taylor_kernels.tracing.leaks import leaks_seen
from taylor_kernels.tracing.multihead import (
    CHECKED,
    PrunedMultiheadAttention,
    prunable_attention,
)
from taylor_kernels.tracing.record import Reason
from taylor_kernels.tracing.recorder import Execute, Recorder
from taylor_kernels.tracing.returned import Read, UnknownOutput, checked_outputs, returned_tensors
from taylor_kernels.tracing.running import (
    Untouched,
    call,
    copied,
    is_lazy,
    new_garbage_only,
    one_at_a_time,
    quiet,
    tensors_in,
    tensors_of_modules,
)
from taylor_kernels.tracing.training import learn_from_training, some_unread


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
    has not read some parameter, another one in train mode says which channels it lies on.

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
    execute: Execute | None = None,
    *,
    blocks: bool = False,
    outputs: Read = None,
) -> Channels:
    """`trace` for callers that run the operations themselves. One runs at a time in a process:
    a trace exchanges methods of tensors and classes of modules, and puts back what it found.

    Args:
        execute: called with an operation, its arguments and its keyword arguments; runs it.
    """
    with one_at_a_time():
        return _traced(model, example_inputs, seconds, execute, blocks, outputs)


def _traced(
    model: nn.Module,
    example_inputs: Any,
    seconds: float,
    execute: Execute | None,
    blocks: bool,
    read: Read,
) -> Channels:
    modules = _modules(model)
    tensors = _checked(modules)
    if read is not None:
        checked_outputs(read)
    given = list(tensors_in(example_inputs))
    if given and not any(tensor.numel() for tensor in given):
        raise ValueError(
            f"example_inputs: nothing is in them (shape {tuple(given[0].shape)}), so "
            "sizes cannot be told apart; pass at least one example"
        )
    names = {module: name for name, module in modules.items()}
    untouched = Untouched(list(names), [tensor for _, tensor in tensors])
    until = time.monotonic() + seconds
    recorders: list[Recorder] = []

    def new_recorder(execute: Execute | None = None, blocks: bool = False) -> Recorder:
        left = max(until - time.monotonic(), 0.0)
        recorders.append(Recorder(names, untouched.touch, left, execute, blocks))
        return recorders[-1]

    def run(recorder: Recorder) -> Iterator[Tensor]:
        outputs = _run(recorder, model, names, example_inputs)
        return returned_tensors(model, example_inputs, outputs, read)

    recorder = new_recorder(execute, blocks)
    try:
        with (
            new_garbage_only(),
            quiet(model),
            prunable_attention(names),
            one_expert_at_a_time(names),
        ):
            for name, tensor in tensors:
                recorder.add(name, tensor)
            kept = keeping(names)
            with torch._C._AutoDispatchBelowAutograd() if kept else nullcontext(), recorder:
                if any(module.training for module in names):
                    model.eval()  # which takes its time, as every module sets an attribute
                renew(kept)
            _keep_whole(recorder, names)
            try:
                outputs = run(recorder)
            except (TimeoutError, MemoryError, UnknownOutput):
                raise
            except Exception as error:
                raise ValueError(_refusal(recorder, error)) from error
            reason = Reason("reaches the output of the model")
            for tensor in outputs:
                labels = recorder.labels(tensor)
                recorder.flow.reaches_output(tensor, labels)
                if recorder.record.values is not None:
                    recorder.record.values.returns(tensor)
                for vector in labels.vectors():
                    recorder.record.fix(vector, reason)
            parameters = [name for name, tensor in tensors if isinstance(tensor, nn.Parameter)]
            # What a router mixes is taken back once, for one run.
            if some_unread(recorder.record, parameters) and not any(map(is_router, names)):
                learn_from_training(recorder, model, tensors, run, new_recorder)
    finally:
        for each in recorders:
            each.memories.release()
        untouched.restore()
    recorder.record.mixtures += find_mixtures(recorder.record, modules, recorder.returned)
    with prunable_attention(names):
        return Channels(recorder.record, modules)


def _run(
    recorder: Recorder, model: nn.Module, names: Mapping[nn.Module, str], example_inputs: Any
) -> Any:
    """Run the model on the example inputs; the recorder hears of operations and modules."""
    mine = threading.get_ident()  # PyTorch calls these hooks for modules of all threads

    def entered(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == mine:
            with torch._C.DisableTorchFunction():
                recorder.enter(module, args)

    def left(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if threading.get_ident() != mine:
            return
        kwargs, output = ({}, *rest)[-2:]  # after an error PyTorch passes no keyword arguments
        if output is not None and _checks_widths(module):
            _keep_what_it_read(recorder, module, names.get(module, ""), args, kwargs)
        with torch._C.DisableTorchFunction():
            recorder.leave(module, kwargs, output)

    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(entered),
        torch.nn.modules.module.register_module_forward_hook(
            left,
            with_kwargs=True,
            always_call=True,
        ),
    ]
    try:
        with torch._C._AutoDispatchBelowAutograd(), recorder, leaks_seen(recorder):
            return call(model, copied(example_inputs))
    finally:
        for handle in handles:
            handle.remove()
            # PyTorch leaves this mark behind, and torch.compile warns of global hooks for it.
            torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return dict(model.named_modules())


def _checked(modules: Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a model that can be traced."""
    parameters, buffers = tensors_of_modules(modules)
    tensors = [*parameters.items(), *buffers.items()]
    if not tensors:
        raise ValueError("model: it has no parameters, so there are no channels to follow")
    for name, tensor in tensors:
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


def _keep_whole(recorder: Recorder, names: Mapping[nn.Module, str]) -> None:
    """Attention of classes that inherit PyTorch's, and with it the checks of its widths."""
    for module, name in names.items():
        if not _checks_widths(module):
            continue
        reason = _checked_width(name)
        for path, dim in CHECKED:
            tensor = dict(module.named_parameters()).get(path)
            if tensor is not None:
                recorder.record.fix(recorder.labels(tensor).dims[dim], reason)


def _keep_what_it_read(
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


def _checks_widths(module: nn.Module) -> bool:
    inherits = isinstance(module, nn.MultiheadAttention)
    return inherits and type(module) is not PrunedMultiheadAttention


def _checked_width(name: str) -> Reason:
    text = "belongs to a class of nn.MultiheadAttention, which checks its width"
    return Reason(f"{text} against embed_dim ({name!r})", name)


def _refusal(recorder: Recorder, error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    where = f" in {recorder.module!r}" if recorder.module else ""
    return (
        f"example_inputs: the model does not run on them ({text[:300]}{where}); pass a tensor, a "
        "tuple of arguments or a dict of keyword arguments on the model's device"
    )
