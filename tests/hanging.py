"""Four processes in groups of two, of which the last hangs: `torchrun --nproc-per-node 4`."""

import time

import torch
import torch.distributed as dist

from skiparse.models.train.parallel import World

with World.joined("cpu", 5.0) as world:
    group = world.context(2).group
    if world.rank == 3:
        time.sleep(1000)
    dist.all_reduce(torch.ones(1), group=group)
    world.wait()
