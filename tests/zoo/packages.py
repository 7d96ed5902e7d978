"""The packages whose networks stand in the zoo, and what is done where one is missing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import nn

INSTALL = "pip install 'taylor-kernels[zoo]', then pip install --no-deps pytorchcv"


def missing(package: str) -> str:
    """How to get a package that is not there; "" for one that is."""
    if not package or importlib.util.find_spec(package) is not None:
        return ""
    return f"no {package} here: make test installs it, or {INSTALL}"


@contextmanager
def torchvision_stub() -> Iterator[None]:
    """pytorchcv imports torchvision's deformable convolution, for a model that is not here."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    vision, ops = ModuleType("torchvision"), ModuleType("torchvision.ops")
    for module in (vision, ops):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    ops.DeformConv2d = type("DeformConv2d", (nn.Module,), {})  # type: ignore[attr-defined]
    vision.ops = ops  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": vision, "torchvision.ops": ops}
    try:
        yield
    finally:
        # Others ask whether torchvision is there, and must not be told that it is.
        del sys.modules["torchvision"], sys.modules["torchvision.ops"]
