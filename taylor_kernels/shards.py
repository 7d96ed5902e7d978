"""Parameters of which a rank holds a part: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; torch.distributed.tensor is imported by those who make one."""
    plain = type(tensor) in _PLAIN  # told sooner than that an attribute is missing
    return not plain and isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def _among_ranks() -> bool:
    """Whether there can be DTensors, told in no time: their code is loaded, and there is a group of
    processes, which their mesh is made of."""
    # Newer and older PyTorch.
    loaded = "torch.distributed.tensor" in sys.modules or "torch.distributed._tensor" in sys.modules
    return loaded and torch.distributed.is_available() and torch.distributed.is_initialized()


def has_shards(module: nn.Module) -> bool:
    """Whether a module has a DTensor among its parameters."""
    if not _among_ranks():
        return False
    return any(is_sharded(p) for one in walk(module) for p in one._parameters.values())


def in_parts(module: nn.Module) -> bool:
    """Whether ranks hold parts of a module's parameters between its passes.

    FSDP2 leaves whole ones in the root after a forward pass, until the backward pass or
    `reshard()`: at that time no parameter is a DTensor, and what is done to them is undone.
    """
    return has_shards(module) or is_fsdp(module)


def walk(module: nn.Module) -> set[nn.Module]:
    """Those that `module.modules()` gives, in a third of the time: it is asked at every step."""
    found, left = {module}, [module]
    while left:
        for child in left.pop()._modules.values():
            if child is not None and child not in found:
                found.add(child)
                left.append(child)
    return found


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, if it is no DTensor."""
    return _dtensor(tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a DTensor a collective of the ranks of its mesh."""
    return _dtensor(tensor).full_tensor() if is_sharded(tensor) else tensor


def offsets(tensor: Tensor) -> tuple[int, ...]:
    """Where in each dimension of the whole the part of this rank begins."""
    if not is_sharded(tensor):
        return (0,) * tensor.dim()
    # What torch.distributed.checkpoint asks for; strided shards are rows in a row here too.
    (chunk,) = _dtensor(tensor).__create_chunk_list__()
    return tuple(chunk.offsets)


def part_count(tensor: Tensor) -> int:
    """How many ranks hold different parts of a tensor.

    Raises:
        ValueError: a DTensor holds sums that are not added up yet.
    """
    if not is_sharded(tensor):
        return 1
    count = 1
    given = _dtensor(tensor)
    for size, placement in zip(given.device_mesh.shape, given.placements, strict=True):
        if placement.is_partial():
            raise ValueError(f"a DTensor is placed as {placement}; redistribute it first")
        count *= 1 if placement.is_replicate() else size
    return count


def plan_mesh(model: nn.Module) -> DeviceMesh | None:
    """The ranks over which a tensor parallel plan has spread a model: they see the same minibatch.

    None where there is no such plan; FSDP2 gives each rank a minibatch of its own.

    Raises:
        ValueError: FSDP2 lies over the plan, or modules are spread over different ranks.
    """
    if not has_shards(model):
        return None
    sharded = [_dtensor(p) for p in model.parameters() if is_sharded(p)]
    if is_fsdp(model):
        if any(sum(not one.is_replicate() for one in p.placements) > 1 for p in sharded):
            raise ValueError(
                "model: FSDP2 lies over a tensor parallel plan, where a criterion that reads "
                "activations cannot tell which ranks see the same minibatch; use taylor_fo"
            )
        return None
    meshes = {p.device_mesh for p in sharded}
    if len(meshes) > 1 or any(mesh.ndim > 1 for mesh in meshes):
        raise ValueError(
            "model: its modules are spread over several meshes of ranks, where a criterion that "
            "reads activations cannot tell which see the same minibatch; use taylor_fo"
        )
    return meshes.pop()


def along_mesh(tensor: Tensor, mesh: DeviceMesh, shape: tuple[int, ...]) -> Tensor:
    """The rows of all ranks of a mesh of one dimension, one after the other; a collective.

    Args:
        tensor: the rows of this rank, as many as torch.chunk gives it of the first of `shape`.
    """
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(shape, device="meta").stride()
    held = DTensor.from_local(
        tensor.contiguous(), mesh, [Shard(0)], run_check=False, shape=torch.Size(shape),
        stride=stride,
    )  # fmt: skip
    return held.full_tensor()


def rows_in_whole(table: Tensor, begin: int, count: int) -> Tensor:
    """[count, K]: the rows of a part from `begin` on, zeros elsewhere."""
    if begin == 0 and len(table) == count:
        return table
    found = table.new_zeros(count, table.size(1))
    found[begin : begin + len(table)] = table
    return found


def fill_part(tensor: Tensor, dim: int, index: Tensor, value: float) -> None:
    """index_fill_ in place, of what this rank holds of a tensor."""
    if not is_sharded(tensor):
        tensor.index_fill_(dim, index, value)
        return
    part, begin = local_part(tensor), offsets(tensor)[dim]
    mine = index[(index >= begin) & (index < begin + part.size(dim))] - begin
    part.index_fill_(dim, mine.to(part.device), value)


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A DTensor placed as `like`, of a tensor that every rank holds whole."""
    from torch.distributed.tensor import DTensor

    given, part = _dtensor(like), local_part(like)
    for dim, begin in enumerate(offsets(like)):
        tensor = tensor.narrow(dim, begin if part.size(dim) else 0, part.size(dim))
    return DTensor.from_local(
        tensor.clone(), given.device_mesh, given.placements, run_check=False,
        shape=given.shape, stride=given.stride(),
    )  # fmt: skip


def whole_state(state: Any) -> Any:
    """A state of dicts and lists with all of every DTensor in it; a collective, if there are."""
    if isinstance(state, dict):
        found = copy.copy(state)  # with its attributes: a state_dict of a model has versions there
        for key, value in state.items():
            found[key] = whole_state(value)
        return found
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(value) for value in state)
    return whole(state).cpu() if is_sharded(state) else state


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 puts parameters of other values in the place of a model's as it runs."""
    if not _among_ranks():
        return False
    kinds = {type(module) for module in walk(model)}  # a few, of hundreds of modules
    return any(base.__name__ == "FSDPModule" for kind in kinds for base in kind.__mro__)


def _dtensor(tensor: Tensor) -> DTensor | Any:
    return tensor
