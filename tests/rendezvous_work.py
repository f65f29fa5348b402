"""A rank that joins a group of two; it imports no more than that needs."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from cfmask import distributed
from cfmask.distributed import DistributedContext, process_group


def meet(rank: int, folder: Path, context: DistributedContext, hosts: tuple[str, ...] = (), late_s: float = 0) -> None:
    """Join the group, and write the sum of the ranks' numbers, which shows that both are in it."""
    time.sleep(late_s if rank == 0 else 0)
    if hosts:
        distributed._own_hosts = lambda: list(hosts)
    with process_group(dataclasses.replace(context, rank=rank, world_size=2), folder / "rendezvous"):
        total = torch.tensor(rank + 1)
        dist.all_reduce(total)
        (folder / f"{context.attempt}-{rank}").write_text(str(total.item()))


if __name__ == "__main__":
    distributed._CONNECT_S = 1
    meet(int(sys.argv[1]), Path(sys.argv[2]), DistributedContext(nodes=2))
