"""A loader of which every process reads its part, in the order in which one alone would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from taylor_kernels.studies.options import Mistake

_NEEDED = (
    "give a torch.utils.data.DataLoader over a map-style data set, with batch_size=; or a function "
    "of (rank, world_size) that makes a loader of that process's part of every minibatch"
)


class PartOfSampler(DistributedSampler):
    """Splits the order of another sampler, which every process draws alike.

    Attributes:
        whole: the other sampler.
        before, after: called as the order is drawn.
    """

    def __init__(self, whole: Sampler, rank: int, size: int, *, drop_last: bool) -> None:
        super().__init__(whole, size, rank, shuffle=False, drop_last=drop_last)  # type: ignore[arg-type]
        self.whole = whole
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Any]:
        self.before()
        order = list(self.whole)
        self.after()
        for position in super().__iter__():
            yield order[position]


def split(loader: Any, option: str, path: str, rank: int, size: int) -> DataLoader:
    """A loader of a process's part of the minibatches of another: an equal part of each.

    Examples that do not fill the last minibatch up to a multiple of `size` are made up for by the
    first ones of the epoch, as DistributedSampler has it.

    Raises:
        Mistake: it cannot be split; the message says what is needed.
    """
    if not isinstance(loader, DataLoader):
        raise Mistake(
            f"{option}: {path} gave a {type(loader).__name__}, of which {size} processes cannot "
            f"each read a part; {_NEEDED}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise Mistake(
            f"{option}: {path} is over an IterableDataset, of which {size} processes cannot each "
            f"read a part; {_NEEDED}"
        )
    if type(loader.batch_sampler) is not BatchSampler or not isinstance(loader.sampler, Sized):
        raise Mistake(
            f"{option}: {path} has a batch_sampler of its own, no batch_size, or a sampler without "
            f"a length, so that its minibatches cannot be split among {size} processes; {_NEEDED}"
        )
    if (loader.batch_size or 0) % size:
        raise Mistake(
            f"{option}: {path} has batch_size={loader.batch_size}, which {size} processes cannot "
            "share equally; take a multiple of their number"
        )
    given = {
        name: getattr(loader, name)
        for name in ("num_workers", "collate_fn", "pin_memory", "drop_last", "timeout",
                     "worker_init_fn", "multiprocessing_context", "generator", "prefetch_factor",
                     "persistent_workers", "pin_memory_device")
        if hasattr(loader, name)
    }  # fmt: skip
    if not given.get("pin_memory_device"):
        given.pop("pin_memory_device", None)  # deprecated, and said to be where it is given
    whole: Any = loader.sampler
    sampler = PartOfSampler(whole, rank, size, drop_last=loader.drop_last)
    return DataLoader(
        loader.dataset, batch_size=(loader.batch_size or 0) // size, sampler=sampler, **given
    )
