"""What Torch-Pruning's graph prunes rightly, the pruner prunes too.

Rightly is: in float64 the network without a filter, as Torch-Pruning cuts it, returns what the
network with all that it cuts off set to zero does.
"""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

import taylor_kernels as tk
from tests.zoo.packages import missing
from tests.zoo.structures import STRUCTURES, Structure
from tests.zoo.structures_of_images import IMAGES
from tests.zoo.structures_of_tokens import TOKENS
from tests.zoo.vision import pytorchcv

#: Processor seconds that Torch-Pruning has for a network; what it has not cut by then is not asked.
LIMIT = 3.0


class Late(BaseException):
    """Time is up; no handler of a library takes it for an error of its own."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def zero(group: Any) -> None:
    """Set what makes the channels of a group to zero: filters, and what norms do to them."""
    for item in group:
        target, made = item.dep.target.module, "out_" in item.dep.handler.__name__
        if isinstance(target, nn.Parameter):
            target.data.index_fill_(item.dep.target.pruning_dim, torch.tensor(item.idxs), 0)
        elif made and getattr(target, "weight", None) is not None:
            dim = 1 if isinstance(target, _ConvTransposeNd) else 0
            places = torch.tensor(item.idxs)
            target.weight.data.index_fill_(dim, places, 0)
            if target.bias is not None:
                target.bias.data.index_fill_(0, places, 0)


def is_right(model: nn.Module, inputs: Any, name: str) -> bool:
    """Whether Torch-Pruning's removal of a layer's first filter does what zeros in its place do."""
    model = copy.deepcopy(model)
    layer = model.get_submodule(name)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        group = graph.get_pruning_group(layer, prune, idxs=[0])
        if not graph.check_pruning_group(group):
            return False
        zero(group)
        masked = model(*given)
        group.prune()
        removed = model(*given)
    except Exception:
        return False
    return [t.shape for t in tensors(masked)] == [t.shape for t in tensors(removed)] and all(
        torch.allclose(one, two, rtol=1e-9, atol=1e-12)
        for one, two in zip(tensors(masked), tensors(removed), strict=True)
    )


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _structure(structure: Structure) -> tuple[nn.Module, Any]:
    inputs = structure.inputs()
    return structure.build().double(), (
        tuple(x.double() for x in inputs) if isinstance(inputs, tuple) else inputs.double()
    )


def _image_network(name: str) -> tuple[nn.Module, Any]:
    model, x = pytorchcv(name, 32)
    return model.double(), x.double()


#: Of these Torch-Pruning prunes nothing rightly: it finds no groups, or wrong ones.
NOTHING = (
    "split", "channel_shuffle", "dual_path", "functional_weight", "torchvision_swin",
    "x_transformers",
)  # fmt: skip
EVERY = {k: v for k, v in {**STRUCTURES, **IMAGES, **TOKENS}.items() if k not in NOTHING}
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{name: partial(_structure, structure) for name, structure in EVERY.items()},
    **{
        name: partial(_image_network, name)
        for name in ("resnet20_cifar10", "mobilenetv2_wd4", "resnext20_16x4d_cifar10")
    },
}


@pytest.mark.sample(6, covering=False)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no clock that interrupts here")
def test_what_torch_pruning_prunes_rightly_can_be_pruned(name):
    if name not in EVERY and (why := missing("pytorchcv")):
        pytest.skip(why)
    model, inputs = NETWORKS[name]()
    model.eval()
    layers = [n for n, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))]
    right: list[str] = []
    try:
        with limited(LIMIT):
            for layer in random.sample(layers, len(layers)):
                right += [layer] * is_right(model, inputs, layer)
    except Late:
        pass
    assert right
    pruner = tk.Pruner(model, inputs, "magnitude_l2", filters=0.9)
    assert set(right) <= set(pruner.widths), pruner.skipped
