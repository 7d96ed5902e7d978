"""Public functions given what is no argument: one error names it, and nothing has changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import taylor_kernels as tk

#: What somebody may hand over by mistake, by what it could be taken for.
THINGS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "bool": lambda: random.random() < 0.5,
    "int": lambda: random.choice((-3, 0, 7)),
    "float": lambda: random.choice((-0.5, 1.7, float("nan"))),
    "word": lambda: "".join(random.choices("xyz", k=5)),
    "bytes": lambda: b"x",
    "list": lambda: [random.random()],
    "dict": lambda: {"x": random.random()},
    "object": object,
    "class": lambda: int,
    "function": lambda: len,
    "module": lambda: nn.Linear(2, 2),
    "scalar": lambda: torch.rand(()),
    "tensor": lambda: torch.randn(2, 3),
    "integers": lambda: torch.randint(5, (2, 3)),
    "complex": lambda: torch.randn(2, 3, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(2, 3, device="meta"),
    "array": lambda: np.ones((2, 3)),
}


#: What is no int, bool or list, and as good as one.
FINE: dict[str, Callable[[nn.Module], object]] = {
    "integers of NumPy": lambda m: (
        tk.ParameterFisher(m, seed=np.int64(4)),
        tk.methods.at_init(m, "magnitude", 0.5, rounds=np.int32(1)),
        tk.filter_moments([m[0].weight], [m[0].weight], dim=(np.int64(0), np.int64(1))),
    ),
    "a bool of NumPy": lambda m: tk.Importance(m, "taylor_fo", stream=np.True_).close(),
    "names that come one by one": lambda m: tk.Importance(
        m, "taylor_fo", layers=(n for n in ["0"])
    ).close(),
    "a dataset": lambda m: tk.methods.at_init(
        m, "snip", 0.5, loss=cross_entropy,
        batches=TensorDataset(torch.randn(2, 4, 3), torch.randint(4, (2, 4))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fine", FINE)
def test_what_is_as_good_as_the_argument_is_taken(fine):
    FINE[fine](net())


def test_masks_may_come_one_by_one():
    model, x = net(), torch.randn(4, 3)
    scores = []
    for masks in (lambda m: [m], lambda m: (one for one in [m]), lambda m: {"only": m}.values()):
        importance = tk.Importance(model, "taylor_fo_gate", example_inputs=x)
        model(x).square().sum().backward()
        importance.update(mask=masks(torch.tensor([True, False, True, True])))
        scores.append(importance.compute()["0"])
        importance.close()
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def net() -> nn.Sequential:
    layers = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    return nn.Sequential(*layers).eval()


def pruner(model: nn.Module) -> tk.Pruner:
    return tk.Pruner(model, torch.randn(2, 3), "taylor_fo_gate", filters=0.5)


def entered(model: nn.Module) -> None:
    with tk.scoring(model):
        raise AssertionError("it let that pass")


def saved(its: nn.Module, folder: Path, **wrong: object) -> None:
    own = pruner(its)
    try:
        tk.save_checkpoint(**{"path": folder / "a", "model": its, "pruner": own} | wrong)
    finally:
        own.close()


def loaded(its: nn.Module, folder: Path, **wrong: object) -> None:
    own = pruner(its)
    tk.save_checkpoint(folder / "a", model=its, pruner=own)
    try:
        tk.load_checkpoint(**{"path": folder / "a", "model": its, "pruner": own} | wrong)
    finally:
        own.close()


def stepped(model: nn.Module, mask: Any) -> None:
    own = pruner(model)
    model(torch.randn(2, 3)).square().sum().backward()
    try:
        own.step(mask=mask)
    finally:
        model.zero_grad()
        own.close()


WEIGHTS = torch.randn(4, 3), torch.randn(4, 3)
PAIRS = [(torch.randn(5, 3), torch.randint(4, (5,)))]
NO_NUMBER = set(THINGS) - {"int", "float", "scalar"}
#: Argument -> what calls a function of a model and a folder with it, and what of `THINGS` is wrong.
CALLS: dict[str, tuple[Callable[[nn.Module, Path, Any], Any], Iterable[str]]] = {
    "filter_moments(dim)": (
        lambda m, f, x: tk.filter_moments(*WEIGHTS, dim=x), set(THINGS) - {"bool", "int"},
    ),
    "scoring(model)": (lambda m, f, x: entered(x), set(THINGS) - {"module"}),
    "gradient_underflow(model)": (
        lambda m, f, x: tk.gradient_underflow(x), set(THINGS) - {"module"},
    ),
    "gradient_underflow(layers)": (
        lambda m, f, x: tk.gradient_underflow(m, x), set(THINGS) - {"none"},
    ),
    "Importance(layers)": (
        lambda m, f, x: tk.Importance(m, layers=x), set(THINGS) - {"none"},
    ),
    "Importance(stream)": (
        lambda m, f, x: tk.Importance(m, stream=x), set(THINGS) - {"bool"},
    ),
    "Pruner(verify)": (
        lambda m, f, x: tk.Pruner(m, torch.randn(2, 3), filters=0.5, verify=x),
        set(THINGS) - {"bool"},
    ),
    "Pruner(ignore)": (
        lambda m, f, x: tk.Pruner(m, torch.randn(2, 3), filters=0.5, ignore=x), set(THINGS),
    ),
    "ParameterFisher(parameters)": (
        lambda m, f, x: tk.ParameterFisher(m, parameters=x), set(THINGS) - {"none"},
    ),
    "ParameterFisher(reduction)": (
        lambda m, f, x: tk.ParameterFisher(m, reduction=x), set(THINGS),
    ),
    "ParameterFisher(seed)": (
        lambda m, f, x: tk.ParameterFisher(m, seed=x), set(THINGS) - {"bool", "int"},
    ),
    "trace(seconds)": (
        lambda m, f, x: tk.trace(m, torch.randn(2, 3), seconds=x), NO_NUMBER | {"scalar"},
    ),
    "step(mask)": (lambda m, f, x: stepped(m, x), set(THINGS) - {"none", "integers"}),
    "save_checkpoint(path)": (
        lambda m, f, x: saved(m, f, path=x), set(THINGS) - {"word", "bytes"},
    ),
    "save_checkpoint(model)": (lambda m, f, x: saved(m, f, model=x), set(THINGS) - {"module"}),
    "save_checkpoint(pruner)": (lambda m, f, x: saved(m, f, pruner=x), set(THINGS) - {"none"}),
    "load_checkpoint(path)": (
        lambda m, f, x: loaded(m, f, path=x), set(THINGS) - {"word", "bytes"},
    ),
    "load_checkpoint(pruner)": (lambda m, f, x: loaded(m, f, pruner=x), set(THINGS)),
    "save_sharded_checkpoint(folder)": (
        lambda m, f, x: tk.save_sharded_checkpoint(x, model=m), set(THINGS) - {"word", "bytes"},
    ),
    "save_sharded_checkpoint(pruner)": (
        lambda m, f, x: tk.save_sharded_checkpoint(f, model=m, pruner=x), set(THINGS) - {"none"},
    ),
    "read_sharded_checkpoint(folder)": (
        lambda m, f, x: tk.read_sharded_checkpoint(x), set(THINGS) - {"word", "bytes"},
    ),
    "carry_state(old)": (
        lambda m, f, x: tk.distributed.carry_state(x, torch.optim.SGD(m.parameters())),
        set(THINGS),
    ),
    "Joining(meter)": (lambda m, f, x: tk.distributed.Joining(x), set(THINGS)),
    "Ranks(loss)": (lambda m, f, x: tk.distributed.Ranks(loss=x), set(THINGS)),
    "Ranks(timeout)": (
        lambda m, f, x: tk.distributed.Ranks(timeout=x), NO_NUMBER - {"none"} | {"scalar"},
    ),
    "GSM(momentum)": (lambda m, f, x: tk.methods.GSM(m.parameters(), momentum=x), NO_NUMBER),
    "GSM(backend)": (
        lambda m, f, x: tk.methods.GSM(m.parameters(), backend=x), set(THINGS) - {"none"},
    ),
    "MirrorDescent(lr)": (lambda m, f, x: tk.methods.MirrorDescent(m.parameters(), x), NO_NUMBER),
    "MirrorDescent(betas)": (
        lambda m, f, x: tk.methods.MirrorDescent(m.parameters(), betas=x), set(THINGS),
    ),
    "MirrorDescent(method)": (
        lambda m, f, x: tk.methods.MirrorDescent(m.parameters(), method=x), set(THINGS),
    ),
    "SPP(model)": (lambda m, f, x: tk.methods.SPP(x), set(THINGS) - {"module"}),
    "SPP(layers)": (lambda m, f, x: tk.methods.SPP(m, layers=x), set(THINGS) - {"none"}),
    "SPP(seed)": (
        lambda m, f, x: tk.methods.SPP(m, layers=["0"], seed=x), set(THINGS) - {"bool", "int"},
    ),
    "lower_columns(model)": (
        lambda m, f, x: tk.methods.lower_columns(x), set(THINGS) - {"module"},
    ),
    "parameter_groups(first)": (
        lambda m, f, x: tk.methods.parameter_groups(m, first=x), set(THINGS) - {"bool"},
    ),
    "at_init(criterion)": (lambda m, f, x: tk.methods.at_init(m, x, 0.5), set(THINGS)),
    "at_init(keep)": (lambda m, f, x: tk.methods.at_init(m, "random", x), NO_NUMBER),
    "at_init(batches)": (
        lambda m, f, x: tk.methods.at_init(m, "snip", 0.5, x, cross_entropy),
        {"none", "int", "float", "object", "function", "module", "tensor", "scalar"},
    ),
    "at_init(loss)": (
        lambda m, f, x: tk.methods.at_init(m, "snip", 0.5, PAIRS, x),
        set(THINGS) - {"class", "function", "module"},
    ),
    "remove_unread(optimizer)": (
        lambda m, f, x: tk.methods.remove_unread(m, torch.randn(2, 3), x), set(THINGS) - {"none"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_argument_is_named(call, tmp_path):
    run, wrong = CALLS[call]
    argument = call.partition("(")[2].rstrip(")")
    model = net()
    before = copy.deepcopy(model.state_dict())
    for thing in sorted(wrong):
        with pytest.raises((TypeError, ValueError)) as error:
            run(model, tmp_path, THINGS[thing]())
        assert str(error.value).startswith(f"{argument}: "), (thing, str(error.value))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_checkpoint_of_another_model_is_not_written(tmp_path):
    """Nothing could load it."""
    model, own = net(), pruner(net())
    for wrong in (model, copy.deepcopy(own.model)):
        for save in (tk.save_checkpoint, tk.save_sharded_checkpoint):
            with pytest.raises(ValueError, match=r"pruner: it prunes another model.*_orig_mod"):
                save(tmp_path / "run", model=wrong, pruner=own)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_place_of_a_file_is_named_and_left_alone(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"path: '.*' is a folder; give the file a name"):
        tk.save_checkpoint(tmp_path, model=net())
    assert not list(tmp_path.iterdir())
    assert not [p for p in tmp_path.parent.iterdir() if p.suffix == ".tmp"]
