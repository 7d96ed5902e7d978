"""The pruned model as files, each loaded again and compared before it is said to be there."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taylor_kernels.pruning import Pruner, load_pruned, save_pruned
from taylor_kernels.pruning.saving.state import first_line
from taylor_kernels.studies.own.exporting import exported, has_batch
from taylor_kernels.studies.own.task import first_examples
from taylor_kernels.tracing.run.running import call, tensors_in

#: Relative to the greatest output: other kernels in another order, in float32.
_CLOSE = 1e-3
#: Bytes of weights that an ONNX file, which can have 2 GiB, holds itself; more lie beside it.
_ONE_FILE = 1.5 * 2**30


@dataclass(frozen=True)
class Artifact:
    """A file, or why there is none.

    Attributes:
        difference: of its outputs from the model's, the greatest, relative to the greatest output.
        batch: "any" where it takes minibatches of every size, else "fixed".
        varies: it holds the model's tensors to the bit, and its outputs differ all the same, as
            those of a model that draws at random on its own do; `difference` then says nothing.
        missing: why it is not there, in one line.
    """

    name: str
    bytes: int = 0
    difference: float = 0.0
    batch: str = ""
    varies: bool = False
    missing: str = ""


def write_artifacts(
    folder: Path, pruner: Pruner, inputs: Any, fresh: Callable[[], nn.Module]
) -> list[Artifact]:
    """Write `pruned.safetensors`, `pruned.pt2` and `pruned.onnx`; what cannot be is said and left.

    Args:
        pruner: of a compacted model; its hooks are off.
        inputs: a minibatch that the model takes.
        fresh: makes the model as it was before it was pruned.
    """
    model = copy.deepcopy(pruner.model).cpu().eval()
    inputs = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, inputs)
    few = first_examples(inputs, 2) if has_batch(inputs) else inputs
    writer = _Writer(folder, model, inputs, few)
    found = [
        writer.tried("pruned.safetensors", lambda file: writer.weights(file, pruner, fresh)),
        writer.tried("pruned.pt2", writer.program),
        writer.tried("pruned.onnx", writer.onnx),
    ]
    return found


class _Cannot(Exception):
    """A file cannot be made; the message says why."""


class _Writer:
    """Files of one model in eval mode on the CPU."""

    def __init__(self, folder: Path, model: nn.Module, inputs: Any, few: Any) -> None:
        self._folder, self._model, self._few = folder, model, few
        self._probe = inputs  # of another size than `few`, where there are so many examples
        self._program: Any = None
        self._batch = "fixed"

    def tried(self, name: str, write: Callable[[Path], Any]) -> Artifact:
        """The file, written by `write`, which gives a function that runs what is in it."""
        file = self._folder / name
        file.unlink(missing_ok=True)
        with torch.no_grad(), _silence():
            try:
                run = write(file)
                difference = self._compared(run)
            except Exception as error:  # whatever an exporter raises is no fault of the run
                file.unlink(missing_ok=True)
                file.with_name(f"{name}.data").unlink(missing_ok=True)
                kind = "" if isinstance(error, _Cannot) else f"{type(error).__name__}: "
                return Artifact(name, missing=f"{kind}{first_line(error)}")
        size = sum(f.stat().st_size for f in self._folder.glob(f"{name}*"))
        batch = "any" if run.any_batch else self._batch
        return Artifact(name, size, difference or 0.0, batch, varies=difference is None)

    def _compared(self, run: _Run) -> float | None:
        """How far the outputs are from the model's; None where only the tensors are the same.

        Raises:
            _Cannot: it is not the model.
        """
        probe = self._probe if self._batch == "any" or run.any_batch else self._few
        try:
            with _seeded():
                got = run(probe)
            with _seeded():
                expected = call(self._model, probe)
            difference = _difference(got, expected)
            if not difference <= _CLOSE:
                raise _Cannot(f"loaded again, its outputs differ by {difference:.1g}")
        except Exception:
            # What was trained is in these tensors, and outputs say no more about them.
            if run.same_tensors:
                return None
            raise
        return difference

    def weights(self, file: Path, pruner: Pruner, fresh: Callable[[], nn.Module]) -> _Run:
        save_pruned(file, pruner)
        again = load_pruned(fresh().cpu(), file).eval()
        again.to(next(self._model.parameters()).dtype)
        same = _same_state(again, self._model)
        return _Run(partial(call, again), any_batch=True, same_tensors=same)

    def program(self, file: Path) -> _Run:
        self._program, self._batch = exported(self._model, self._few)
        torch.export.save(self._program, file)
        return _Run(partial(call, torch.export.load(file).module()))

    def onnx(self, file: Path) -> _Run:
        if missing := [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]:
            raise _Cannot(f"{', '.join(missing)} not installed; pip install 'taylor-kernels[onnx]'")
        if self._program is None:
            raise _Cannot("it is made from pruned.pt2, which is not there")
        one_file = sum(v.nbytes for v in self._model.state_dict().values()) < _ONE_FILE
        torch.onnx.export(
            self._program, (), str(file), dynamo=True, verbose=False, external_data=not one_file
        )
        import onnx
        from onnx.reference import ReferenceEvaluator

        onnx.checker.check_model(str(file))
        evaluator = ReferenceEvaluator(str(file), new_ops=[_gather_elements()])

        def run(inputs: Any) -> Any:
            names, tensors = evaluator.input_names, list(tensors_in(inputs))
            if isinstance(inputs, Mapping) and set(names) <= inputs.keys():
                tensors = [inputs[name] for name in names]
            feeds = {n: tensor.numpy() for n, tensor in zip(names, tensors, strict=True)}
            return [torch.from_numpy(value) for value in evaluator.run(None, feeds)]

        return _Run(run)


def _gather_elements() -> Any:
    """ONNX's operator for its reference evaluator, whose own takes no more than 64 elements."""
    from onnx.reference.op_run import OpRun

    class GatherElements(OpRun):
        op_domain = ""

        def _run(self, data: Any, indices: Any, axis: int | None = None) -> tuple[Any]:
            along = (axis or 0) % data.ndim
            cut = tuple(
                slice(None) if dim == along else slice(size)
                for dim, size in enumerate(indices.shape)
            )
            return (np.take_along_axis(data[cut], indices, along),)

    return GatherElements


@dataclass(frozen=True)
class _Run:
    """Runs what a file holds on inputs."""

    on: Callable[[Any], Any]
    any_batch: bool = False
    same_tensors: bool = False

    def __call__(self, inputs: Any) -> Any:
        return self.on(inputs)


def _difference(got: Any, expected: Any) -> float:
    """The greatest difference between two nests of tensors, relative to the greatest value."""
    one, other = list(tensors_in(got)), list(tensors_in(expected))
    if [tuple(t.shape) for t in one] != [tuple(t.shape) for t in other]:
        raise _Cannot("loaded again, its outputs have other shapes")
    if not one:
        raise _Cannot("the model returns no tensor, so nothing could be compared")
    most = 0.0
    for mine, theirs in zip(one, other, strict=True):
        mine, theirs = mine.double(), theirs.double()
        if mine.numel() == 0:
            continue
        # Where both are the same infinity, as in logits of what is ruled out, or both nan, their
        # difference would be nan.
        same = (mine == theirs) | (mine.isnan() & theirs.isnan())
        finite = theirs[theirs.isfinite()].abs()
        scale = max(finite.max().item(), 1e-12) if finite.numel() else 1.0
        difference = (mine - theirs).abs().masked_fill(same, 0).max().item() / scale
        if math.isnan(difference):
            return difference
        most = max(most, difference)
    return most


def _same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same tensors, to the bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        value.shape == theirs[name].shape
        and value.dtype == theirs[name].dtype
        and ((value == theirs[name]) | ((value != value) & (theirs[name] != theirs[name]))).all()
        for name, value in mine.items()
    )


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """What a model draws inside is the same every time, and the run's own draws go on after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # on the CPU, where the files are compared
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporters write pages on what they try; one line of it is kept, the reason."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
