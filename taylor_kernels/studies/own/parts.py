"""A user's model and loader by import path, and minibatches that can be had again."""

from __future__ import annotations

import copy
import inspect
import os
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from taylor_kernels.studies.digest import digest, digest_files
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.own.paths import find, made, naming
from taylor_kernels.studies.own.processes import Processes, started_by_torchrun
from taylor_kernels.studies.own.splitting import PartOfSampler, split
from taylor_kernels.studies.source_code import module_files

#: A function with these arguments makes a loader of one process's part.
_PART = ("rank", "world_size")


def users_model(path: str) -> nn.Module:
    """The model that --model names.

    Raises:
        Mistake: the path leads nowhere, or to what is no model with parameters.
    """
    model = find("--model", path)
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise Mistake(
                f"--model: {path} is a {type(model).__name__}, neither a torch.nn.Module nor a "
                "function that makes one"
            )
        model = made("--model", path, model)
    if not isinstance(model, nn.Module):
        raise Mistake(f"--model: {path}() gave a {type(model).__name__}, not a torch.nn.Module")
    if not any(True for _ in model.parameters()):
        raise Mistake(f"--model: {path} has no parameters, so there is nothing to score")
    return model


class Minibatches:
    """A user's loader, of which an epoch of a number is the same whenever it is run.

    Everything that draws random numbers is seeded anew for every epoch and every minibatch, so
    that a run goes on in the middle of an epoch as if it had never stopped. Generators that a
    DataLoader or its sampler keeps are seeded with it.

    Args:
        option, path: where it comes from: --data or --val, and what that says.
        limit: so many minibatches are an epoch at most; None for all.
        device: what tensors are moved to.
        whole: every process reads all of it, as where a model is judged.

    Raises:
        Mistake: the path leads nowhere, or to what cannot be iterated over, or to one process's
            part where all is wanted.
    """

    def __init__(
        self,
        option: str,
        path: str,
        *,
        seed: int,
        limit: int | None,
        device: torch.device,
        whole: bool = False,
    ) -> None:
        self.option, self.path = option, path
        self._seed, self._limit, self._device, self._whole = seed, limit, device, whole
        self._team: Processes | None = None
        self._own_part = False  # the user's loader itself is of one process's part
        self._rank: tuple[int, ...] = ()  # in seeds, of all processes but the first
        self._least_length: int | None = None
        self._found = find(option, path)
        self._loader = self._made()
        self._used = False

    def of_process(self, team: Processes | None) -> Minibatches:
        """Those of this process: its part of every minibatch; a collective.

        Raises:
            Mistake: they cannot be split.
        """
        if team is None:
            return self
        mine = copy.copy(self)
        mine._team, mine._rank = team, (team.rank,) if team.rank else ()
        mine._own_part |= isinstance(getattr(mine._loader, "sampler", None), DistributedSampler)
        if mine._own_part:
            length = self.length()
            least = team.least(-1 if length is None else length)
            mine._least_length = None if least < 0 else least
        elif team.size > 1:
            mine._loader = split(self._loader, self.option, self.path, team.rank, team.size)
        return mine

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[int, Any]]:
        """The minibatches of an epoch with their numbers, from `start` on.

        Raises:
            Mistake: there is none, or the user's loader raises.
        """
        seed_everything(self._seed, number)
        iterator = self._iterator(number)
        count = 0
        while count != self._limit:
            seed_everything(self._seed, number, count, *self._rank)
            with naming(f"{self.option}: iterating over {self.path}"):
                batch = next(iterator, _END)
            ended = batch is _END
            if self._own_part and self._team is not None:  # parts may not be equally long
                ended = any(flag for (flag,) in self._team.heard(ended))
            if ended:
                break
            count += 1
            if count > start:
                yield count - 1, to_device(batch, self._device)
        if not count:
            raise Mistake(f"{self.option}: {self.path} yields no minibatch")

    def first(self) -> Any:
        """The first minibatch of epoch 0."""
        return next(self.epoch(0))[1]

    def length(self) -> int | None:
        """How many minibatches an epoch has; None where the loader does not say."""
        try:
            length = len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            return None
        if self._own_part and self._team is not None:
            if self._least_length is None:
                return None
            length = self._least_length
        return length if self._limit is None else min(length, self._limit)

    def counted(self) -> int:
        """The same, counted where the loader does not say."""
        length = self.length()
        return sum(1 for _ in self.epoch(0)) if length is None else length

    def _made(self) -> Iterable[Any]:
        found = self._found
        loader = found
        if not isinstance(loader, Iterable) and callable(loader):
            loader = made(self.option, self.path, self._for_process(loader))
        if not isinstance(loader, Iterable):
            raise Mistake(
                f"{self.option}: {self.path} gave a {type(loader).__name__}, which cannot be "
                "iterated over"
            )
        if self._whole:
            self._check_whole(loader)
        return loader

    def _check_whole(self, loader: Any) -> None:
        batches = getattr(loader, "batch_sampler", None)
        for sampler in (
            getattr(loader, "sampler", None),
            batches,
            getattr(batches, "sampler", None),
        ):
            if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
                raise Mistake(
                    f"{self.option}: {self.path} has a DistributedSampler, which gives each of "
                    f"{sampler.num_replicas} processes a part; every process judges on all of it, "
                    "so leave the sampler out"
                )

    def _for_process(self, make: Callable[..., Any]) -> Callable[[], Any]:
        """A function that makes a loader, told which process's part is wanted if it asks."""
        try:
            names = inspect.signature(make).parameters
        except (TypeError, ValueError):  # built in, and says nothing of itself
            return make
        if not all(name in names for name in _PART):
            return make
        if self._whole:
            return partial(make, rank=0, world_size=1)
        self._own_part = True
        variables = ("RANK", "WORLD_SIZE") if started_by_torchrun() else ()
        rank, size = (int(os.environ[name]) for name in variables) if variables else (0, 1)
        return partial(make, rank=rank, world_size=size)

    def _iterator(self, number: int) -> Iterator[Any]:
        if self._used and isinstance(self._loader, Iterator):  # it can be gone through once
            if self._loader is self._found:
                raise Mistake(
                    f"{self.option}: {self.path} is a {type(self._loader).__name__}, which can be "
                    "iterated over once; name a loader, or a function that makes one"
                )
            self._loader = self._made()
        self._used = True
        sampler = getattr(self._loader, "sampler", None)
        if isinstance(sampler, PartOfSampler):
            sampler.before = partial(self._seed_order, number)
            sampler.after = partial(seed_everything, self._seed, number, 0, *self._rank)
            sampler = sampler.whole
        for holder in (self._loader, sampler):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(_mixed(self._seed, number))
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(number)
        if isinstance(getattr(self._loader, "sampler", None), DistributedSampler):
            # Workers' seeds are drawn of it. A user's own parts may need one order on all ranks.
            seed_everything(self._seed, number, *self._rank)
        with naming(f"{self.option}: iterating over {self.path}"):
            return iter(self._loader)

    def _seed_order(self, number: int) -> None:
        """Seed as one process has it where its DataLoader draws the order of an epoch."""
        if getattr(self._loader, "num_workers", 0):  # as the epoch begins, after workers' seed
            seed_everything(self._seed, number)
            if getattr(self._loader, "generator", None) is None:
                torch.empty((), dtype=torch.int64).random_()
        else:  # with the first minibatch
            seed_everything(self._seed, number, 0)


_END = object()


def as_pair(option: str, path: str, number: int, batch: Any) -> tuple[Any, Any]:
    """A minibatch that is a pair (inputs, targets).

    Raises:
        Mistake: it is none.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    many = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
    raise Mistake(
        f"{option}: minibatch {number} of {path} is a {type(batch).__name__}{many}, not a pair "
        "(inputs, targets)"
    )


def sources_digest(*paths: str | None) -> str:
    """Stands for the user's modules and what they import: a loss made by functools.partial, or a
    setting of the model that is no weight, is seen nowhere else."""
    return digest_files(module_files({path.partition(":")[0] for path in paths if path}))


def seed_everything(seed: int, *numbers: int) -> None:
    """Seed the generators of Python, numpy and PyTorch, on all devices."""
    value = _mixed(seed, *numbers) if numbers else seed
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _mixed(*numbers: int) -> int:
    """32 bits that differ where the numbers do."""
    return int(digest(" ".join(map(str, numbers))), 16) % 2**32


def to_device(value: Any, device: torch.device) -> Any:
    """The tensors in nested tuples, lists and dicts, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    move: Callable[..., Any] | None = getattr(value, "to", None)  # as transformers' BatchEncoding
    return move(device) if callable(move) and not isinstance(value, nn.Module) else value
