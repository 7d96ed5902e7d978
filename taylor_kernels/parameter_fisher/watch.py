"""The hooks on a model that note its calls, and which parameters they follow in which way."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taylor_kernels.hooks import Hook, remove_all
from taylor_kernels.parameter_fisher.calls import Call, RerunUse, Use
from taylor_kernels.parameter_fisher.ends import Ends
from taylor_kernels.parameter_fisher.rerun import Rerun, first_size
from taylor_kernels.parameter_fisher.ways import find_ways, parents, uses_in_graph
from taylor_kernels.statistics.hooks.passes import WatchesPasses, graph_is_kept, inside_backward


class Watch:
    """Hooks on a model; Σ_n g_n² of its parameters are handed to `receive`.

    Args:
        parameters: those that are followed, by name.
        receive: called with (call, name, Σ_n g_n²) when a call's part of a parameter is there.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        backend: str | None,
        receive: Callable[[Call, str, Tensor], None],
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.calls: list[Call] = []
        self.separate = False
        self.own_closure = False
        self._reducing = False
        self.ends = Ends()  # of backward passes of the meter's own
        self._backend = backend
        self._receive = receive
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._here: Call | None = None  # the call that is running
        self._root_inputs: Any = None
        self._by_root: set[str] = set()  # found to need a run of the whole model
        #: Parameters whose module was given something else than examples, by the module that is to
        #: be run again for them if it was given examples; and all that ever were.
        self._left: dict[str, set[str]] = {}
        self._by_parent: set[str] = set()
        self._looked = False  # at the graph of a whole call, for uses by other code
        self._told: set[str] = set()
        self._kinds, self._units = find_ways(model, self._names)
        self._handles: list[RemovableHandle] = []
        self.close = weakref.finalize(self, remove_all, self._handles)
        self._hook()

    def discard(self) -> None:
        """Forget calls, and gradients that have come."""
        self.calls, self._here = [], None
        self.ends.clear()

    def reduce(self) -> None:
        """Reduce whatever gradient has come and was not reduced yet."""
        # A module that is run again calls hooks, these and those of other meters.
        thread, self._reducing = threading.get_ident(), True
        WatchesPasses.in_closure.append(thread)
        try:
            for call in self.calls:
                call.reduce_all(self._backend, partial(self._receive, call))
        finally:
            WatchesPasses.in_closure.remove(thread)
            self._reducing = False

    def _hook(self) -> None:
        modules = dict(self.model.named_modules())
        self._handles.append(
            self.model.register_forward_pre_hook(
                Hook(self._on_model), with_kwargs=True, prepend=True
            )
        )
        for path in self._kinds:
            self._on_output(modules[path], self._on_module, path)
        for path in self._units:
            if path:
                self._on_output(modules[path], self._on_unit, path)
        for path in {above for own in self._kinds for above in parents(own)} - {*self._units}:
            self._on_output(modules[path], self._on_parent, path)
        handle = self.model.register_forward_hook(
            Hook(self._on_model_output), with_kwargs=True, always_call=True
        )
        self._handles.append(handle)

    def _on_output(self, module: nn.Module, function: Callable[..., Any], path: str) -> None:
        hook = Hook(function, path)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))

    def _watches(self) -> bool:
        """Whether a pass that is running is one to be counted."""
        threads = WatchesPasses.in_closure
        elsewhere = threading.get_ident() not in threads and not (threads and inside_backward())
        here = not self._reducing and (self.own_closure or elsewhere)
        return torch.is_grad_enabled() and here

    def _on_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._here = self._root_inputs = None
        self._left = {}
        if not self._watches() or inside_backward():
            return
        frozen = [name for name, p in self.parameters.items() if not p.requires_grad]
        if frozen:
            raise RuntimeError(
                f"{', '.join(frozen)}: were trained when this meter was made and are frozen now "
                "(inside tk.scoring?); make a new meter, or use update(closure=...), which "
                "computes no weight gradients either"
            )
        batch_dim = 1 if getattr(module, "batch_first", True) is False else 0
        examples = first_size((args, kwargs), batch_dim)
        if examples is None:
            raise RuntimeError(
                "model: was called without a tensor whose dim 0 counts examples, so that there is "
                "nothing to tell them apart by"
            )
        self._root_inputs = (args, kwargs)
        self._here = Call(examples, separate=self.separate, own=self.own_closure)
        self.calls.append(self._here)

    def _on_module(
        self, path: str, _: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
    ) -> None:
        call = self._here
        if inside_backward():
            self._check_checkpoint(path, output)
            return
        if call is None or not self._watches() or not output.requires_grad:
            return
        x = args[0] if args else kwargs["input"]
        if x.size(0) != call.examples or x.dim() == 0:
            for name in self._kinds[path]:
                call.uses_elsewhere[name] = call.uses_elsewhere.get(name, 0) + 1
            self._leave(call, path, self._kinds[path])
            return
        use = Use(path, self._kinds[path], x)
        call.add(use)

        def on_gradient(dy: Tensor) -> None:
            if call.own and not self.ends.flowing:
                return
            use.add(dy, kept=graph_is_kept())
            call.arrived(use, self._backend, partial(self._receive, call))

        self._await(output, on_gradient, use.add_passes, x)

    def _on_unit(
        self, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        call = self._here
        if call is None or not self._watches():
            return
        dim = 1 if getattr(module, "batch_first", True) is False else 0
        if first_size((args, kwargs), dim) != call.examples:
            self._needs_root(self._units[path])
            return
        self._tell(self._units[path], path)
        self._add_rerun(call, path, module, (args, kwargs), output, self._units[path])

    def _on_parent(
        self, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        call, names = self._here, self._left.pop(path, None)
        if call is None or not names or not self._watches():
            return
        dim = 1 if getattr(module, "batch_first", True) is False else 0
        if first_size((args, kwargs), dim) != call.examples:
            self._leave(call, path, names)
            return
        self._by_parent.update(names)
        self._tell(names, path)
        inside = {id(p): local for local, p in module.named_parameters()}
        parameters = {name: inside[id(self.parameters[name])] for name in names}
        self._add_rerun(call, path, module, (args, kwargs), output, parameters)

    def _leave(self, call: Call, path: str, names: Iterable[str]) -> None:
        """To the module that holds this one, which tells examples apart if it was given them."""
        above = path.rpartition(".")[0]
        for name in names:
            if above and name not in call.uses:  # a run of that would count these uses once more
                self._left.setdefault(above, set()).add(name)
            else:
                self._needs_root([name])

    def _on_model_output(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        call, inputs = self._here, self._root_inputs
        self._here = self._root_inputs = None
        if call is None or not self._watches() or inside_backward():
            return
        for names in self._left.values():
            self._needs_root(names)  # of modules whose parents are not called
        if not self._looked:
            self._looked = True
            self._needs_root(self._used_elsewhere(call, uses_in_graph(output, self._names)))
        parameters = self._units.get("", {}) | {name: name for name in self._by_root}
        if parameters:
            self._tell(parameters, "")
            self._add_rerun(call, "", module, inputs, output, parameters)

    def _add_rerun(
        self,
        call: Call,
        path: str,
        module: nn.Module,
        inputs: Any,
        output: Any,
        parameters: dict[str, str],
    ) -> None:
        rerun = Rerun(path or type(module).__name__, module, inputs, output, call.examples)
        here = {name: (local, self.parameters[name]) for name, local in parameters.items()}
        use = RerunUse(rerun, here)
        call.add_rerun(use) if path else call.leave_to(use)
        for place, tensor in enumerate(rerun.outputs):
            if tensor.requires_grad:

                def on_gradient(dy: Tensor, place: int = place) -> None:
                    if self.ends.flowing or not call.own:
                        rerun.add(place, dy)

                self._await(tensor, on_gradient, partial(rerun.add_passes, place))
        rerun.arm()

    def _await(
        self,
        output: Tensor,
        on_gradient: Callable[[Tensor], None],
        on_passes: Callable[[Tensor], None],
        *inputs: Tensor,
    ) -> None:
        output.register_hook(on_gradient)
        if self.own_closure:
            self.ends.add(output, on_passes, *inputs)

    def _check_checkpoint(self, path: str, output: Tensor) -> None:
        """A module that runs inside backward() was seen before, in the pass itself."""
        names = self._kinds[path]
        seen = any(call.uses.keys() & names.keys() for call in self.calls)
        seen = seen or bool((self._by_root | self._by_parent) & names.keys())
        if output.requires_grad and self._watches() and not seen:
            raise RuntimeError(
                f"{path}: runs inside of a checkpoint with use_reentrant=True, where its pass "
                "cannot be seen; use checkpoint(..., use_reentrant=False)"
            )

    def _needs_root(self, names: Iterable[str]) -> None:
        self._by_root.update(names)

    def _tell(self, names: Iterable[str], path: str) -> None:
        """Say once that some parameters cost a run of a module for each example."""
        if new := [name for name in names if name not in self._told]:
            self._told.update(new)
            what = f"of {path}" if path else "of the whole model"
            warnings.warn(
                f"{', '.join(new)}: not of a kind whose per-example gradients are known from its "
                f"module's input and output, so they take a run {what} for each example; leave "
                "them out with parameters= if that is too slow",
                stacklevel=2,
            )

    def _used_elsewhere(self, call: Call, uses: Mapping[str, int]) -> list[str]:
        """Parameters that are used by more than the modules that own them."""
        in_units = {name for unit in self._units.values() for name in unit}
        return [
            name
            for name, count in uses.items()
            if name not in in_units
            and count > len(call.uses.get(name, [])) + call.uses_elsewhere.get(name, 0)
        ]
