"""Prunes a network that several processes train: torchrun --nproc-per-node 2 examples/prune_ddp.py

They start from run.ckpt in the working directory where there is one, however many wrote it.
"""

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import taylor_kernels as tk

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)  # the same network on every rank; its weights are rank 0's in any case
images = torch.randn(256, 1, 8, 8)
labels = images.mean((2, 3)).argsort(0).argsort(0).flatten() // 64  # four classes, dark to bright

model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
pruner = tk.Pruner(
    model, images[:1], flops=0.5, every=4, per_step=2, optimizer=optimizer,
    ranks=tk.distributed.Ranks(timeout=60),
)  # fmt: skip
start = 0
if os.path.exists("run.ckpt"):
    start = tk.load_checkpoint("run.ckpt", model=model, optimizer=optimizer, pruner=pruner)["step"]
ddp = DistributedDataParallel(model)

for step in range(start, 60):
    chosen = torch.randperm(256, generator=torch.Generator().manual_seed(step))[:32]
    mine = chosen.chunk(size)[rank]  # a part of the same minibatch, whatever the number of ranks
    optimizer.zero_grad()
    cross_entropy(ddp(images[mine]), labels[mine]).backward()
    record = pruner.step()  # after backward(), on every rank
    optimizer.step()
    if record and rank == 0:
        print(f"step {record.step}: {record.flops_fraction:.0%} of the FLOPs left", flush=True)
    if step % 10 == 9:  # every rank calls it, rank 0 writes
        tk.save_checkpoint("run.ckpt", model=ddp, optimizer=optimizer, pruner=pruner, step=step + 1)

pruner.compact()
ddp = tk.distributed.rewrapped(ddp)  # the old wrapper averages parameters that are gone
cross_entropy(ddp(images[rank::size]), labels[rank::size]).backward()
print(f"rank {rank}: {pruner.widths}", flush=True)
del ddp  # a wrapper that outlives its process group can abort the process at its end
gc.collect()
dist.barrier()
dist.destroy_process_group()
