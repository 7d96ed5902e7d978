"""`Ranks`: the processes that share a training run, and the one collective they meet in.

Every rank sends the same number of bytes and is handed what all have sent, in the order of ranks.
What is made of it is made on every rank alone, in that order, so that all hold the same bits,
whatever order a backend would have added in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from taylor_kernels.checks import check_choice, check_number
from taylor_kernels.statistics import Statistic

#: An older PyTorch has it under its old name alone, and one built without it not at all.
_all_gather = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))

Gradients = Literal["averaged", "summed", "local"]
Loss = Literal["mean", "sum"]
Minibatch = Literal["global", "local"]


class Ranks:
    """Which processes score and prune one model together, and what they hold of its gradients.

    Given to `tk.Importance(ranks=...)` or `tk.Pruner(ranks=...)` on every rank, it makes the scores
    those of one process that sees the minibatches of all ranks. Ranks call update(), step(), skip()
    and absent() equally often, one of them for each minibatch of the run; compute() and the pruning
    steps are then collective, and no rank waits longer than the timeout.

    Args:
        group: a process group; None stands for all processes.
        gradients: what `.grad` holds when a criterion reads it: the average over the ranks, as
            DistributedDataParallel and FSDP leave it, their sum, or the rank's own gradient, as
            inside `no_sync()` or without a wrapper. The ranks' tables are compared, and what was
            said otherwise is an error.
        loss: whether a rank's loss is a mean over its examples, or a sum. The loss of the whole
            minibatch is then the mean, or the sum, of the losses of the ranks.
        minibatch: "global": the ranks' minibatches are parts of one. "local": each is one of its
            own, as if one process saw them one after the other. Where `.grad` is local, criteria
            that read it see the rank's minibatch alone, whatever is said here.
        window: minibatches that are kept at most before the ranks exchange what they have of them.
        timeout: seconds that a rank waits for the others; None leaves it to the group. Of gloo
            alone: NCCL ends a collective by the timeout of its group.

    Attributes:
        collectives: how many there were, of this object. Before each there is one of 8 bytes, which
            is not counted: how long what a rank sends is.
        bytes_sent: what this rank has given to them, which is what it sends to each of the others.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: an argument is none of those named.

    Example:
        >>> import os, tempfile, torch, torch.distributed as dist, taylor_kernels as tk
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = dist.FileStore(os.path.join(folder.name, "store"), 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = torch.nn.Linear(4, 3)
        >>> imp = tk.Importance(model, "taylor_fo_gate", ranks=tk.distributed.Ranks(timeout=30))
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> imp.update()
        >>> imp.compute()[""].shape
        torch.Size([3])
        >>> dist.destroy_process_group()
        >>> folder.cleanup()
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        gradients: Gradients = "averaged",
        loss: Loss = "mean",
        minibatch: Minibatch = "global",
        window: int = 64,
        timeout: float | None = None,
    ) -> None:
        for name, value, known in (
            ("gradients", gradients, get_args(Gradients)),
            ("loss", loss, get_args(Loss)),
            ("minibatch", minibatch, get_args(Minibatch)),
        ):
            check_choice(name, value, known)
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window: expected a number of minibatches from 1 on, got {window!r}")
        if timeout is not None:
            check_number("timeout", timeout, lambda s: 0 < s < float("inf"), "seconds, or None")
        self.gradients, self.loss, self.minibatch = gradients, loss, minibatch
        self.window, self._timeout = window, timeout
        self.collectives = self.bytes_sent = 0
        self._join(group)

    def _join(self, group: dist.ProcessGroup | None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "Ranks: torch.distributed is not initialised; call init_process_group() first, or "
                "leave ranks= out where there is one process"
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is none of its ranks")

    @property
    def group(self) -> dist.ProcessGroup:
        """Of these ranks."""
        found = dist.group.WORLD if self._group is None else self._group
        assert found is not None
        return found

    @property
    def device(self) -> torch.device:
        """Where what is sent has to lie: a backend of GPUs alone moves no memory of the host."""
        if dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def gradient_scale(self) -> float:
        """What `.grad` holds over the gradient of the whole minibatch's loss."""
        if self.gradients == "local" or (self.gradients == "averaged") == (self.loss == "mean"):
            return 1.0
        return 1.0 / self.size if self.loss == "sum" else float(self.size)

    def prepare(self, statistic: Statistic, seen: int) -> float:
        """Let a statistic draw what it should on this rank; what it is to divide out as well.

        Args:
            seen: minibatches of the run before this one.
        """
        statistic.updates = seen if statistic.same_draws else seen * self.size + self.rank
        return self.gradient_scale if statistic.reads == "weight gradients" else 1.0

    def gather(self, payload: Tensor) -> Tensor:
        """[size, n] uint8 on the CPU: the [n] bytes of every rank, in order; a collective.

        Raises:
            RuntimeError: it failed, or a rank did not come in time, or the ranks hold payloads of
                different lengths.
        """
        self._check_lengths(payload.numel())
        self.collectives += 1
        self.bytes_sent += payload.numel()
        return self._all_gather(payload).view(self.size, -1)

    def _check_lengths(self, own: int) -> None:
        """All ranks are about to send as much: gloo ends the process where they do not."""
        everyone = self._all_gather(torch.tensor([own]).view(torch.uint8)).view(torch.int64)
        others = (everyone != everyone[0]).nonzero().flatten().tolist()
        if not others:
            return
        lengths = ", ".join(f"rank {rank} {int(everyone[rank])}" for rank in others[:3])
        more = f" and {len(others) - 3} more ranks others" if len(others) > 3 else ""
        raise RuntimeError(
            f"the ranks have different things to exchange: rank 0 has {int(everyone[0])} bytes, "
            f"{lengths}{more}. All make the same meter or pruner, with the same layers, and call "
            "update() or step() equally often, or absent() where they have no minibatch left"
        )

    def _all_gather(self, payload: Tensor) -> Tensor:
        sent = payload.to(self.device)
        received = sent.new_empty(self.size * sent.numel())
        given = self._timeout is not None and sent.device.type == "cpu"
        limit = timedelta(seconds=self._timeout or 0) if given else None
        assert _all_gather is not None  # there was a group to join
        try:
            work = _all_gather(received, sent, self._group, async_op=True)
            work.wait() if limit is None else work.wait(limit)
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: the ranks' exchange failed ({reason}); has "
                "another rank stopped? All make the same meter or pruner and call update() or "
                "step() equally often, or absent() where they have no minibatch left"
            ) from error
        return received.cpu()

    def check_done(self, error: Exception | None, what: str) -> None:
        """All ranks wait until each has done its part; a collective.

        Raises:
            RuntimeError: another rank failed, or is in another collective. The error of this one
                is raised as it is, whatever became of the others.
        """
        failed = torch.zeros(0, dtype=torch.bool)
        try:
            failed = self.gather(torch.tensor([error is not None]).view(torch.uint8)).any(1)
        except RuntimeError:
            if error is None:
                raise
        if error is not None:
            raise error
        if failed.any():
            who = ", ".join(map(str, failed.nonzero().flatten().tolist()))
            raise RuntimeError(f"rank {who} could not {what}; its own error says why")

    def check_alike(self, digests: Mapping[str, int], what: str) -> None:
        """Every rank holds the same digests under the same names; a collective.

        Raises:
            RuntimeError: the first name, in alphabetical order, under which they differ.
        """
        names = sorted(digests)
        own = torch.tensor([digest("\n".join(names).encode()), *(digests[n] for n in names)])
        everyone = self.gather(own.view(torch.uint8)).view(torch.int64)
        differs = (everyone != everyone[0]).any(0)
        if not differs.any():
            return
        first = int(differs.nonzero()[0])
        where = "the layers" if first == 0 else names[first - 1]
        others = (everyone[:, first] != everyone[0, first]).nonzero().flatten().tolist()
        raise RuntimeError(
            f"{where}: {what} on rank {', '.join(map(str, others))} are others than on rank 0 "
            f"(so in {int(differs.sum())} of {len(names)} layers): the ranks no longer train one "
            "model; resume all of them from a checkpoint"
        )


def digest(content: bytes) -> int:
    """64 bits of a hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def check_ranks(ranks: object) -> None:
    """The argument `ranks` is None or a `Ranks`.

    Raises:
        TypeError: it is something else.
    """
    if ranks is not None and not isinstance(ranks, Ranks):
        raise TypeError(
            "ranks: expected a tk.distributed.Ranks, or None where there is one process, got "
            f"{type(ranks).__name__}"
        )
