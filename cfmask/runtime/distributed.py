"""The distributed context of a process, and the process group of a job."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from cfmask.errors import UserError
from cfmask.runtime import nccl
from cfmask.runtime.network import addresses_of_chosen_interfaces, use_interface_of
from cfmask.runtime.rendezvous import COLLECTIVE_TIMEOUT, rendezvous


@dataclass(frozen=True)
class DistributedContext:
    """This process among all processes of a job.

    rank, world_size, local_rank: as in torch.distributed.
    nodes: number of machines of the job.
    attempt: name of this start of the job; the same on all ranks, and different for every start.
    cpus: cores that this process may use.
    gpu: whether it computes on a GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    nodes: int = 1
    attempt: str = "0"
    cpus: int = 1
    gpu: bool = False

    @property
    def device(self) -> torch.device:
        """The GPU of the local rank among those that this process sees (a scheduler may show it only one).

        Raises:
            UserError: the process sees no GPU, or fewer than its local rank needs.
        """
        if not self.gpu:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise UserError(
                f"Rank {self.rank} on {socket.gethostname()} sees no GPU. Check the node (nvidia-smi), or train "
                "on CPUs with --gpus-per-node 0."
            )
        visible = torch.cuda.device_count()
        if 1 < visible <= self.local_rank:
            raise UserError(
                f"Rank {self.rank} on {socket.gethostname()} is number {self.local_rank} of its node, counted from 0, "
                f"and the node shows {visible} GPUs. Ask for as many as there are (--exclusive {visible}, or "
                f"--gpus-per-node {visible})."
            )
        return torch.device("cuda", self.local_rank % visible)

    @property
    def loader_workers(self) -> int:
        """Default number of data-loader threads: one core is left to the training loop."""
        return min(16, max(1, self.cpus - 1))


@contextmanager
def process_group(context: DistributedContext, rendezvous_folder: Path) -> Iterator[dist.Store]:
    """Join the job's process group (NCCL with GPUs, gloo without); yields its store.

    Args:
        rendezvous_folder: RUN/rendezvous, the same on all ranks.

    Raises:
        CalledOff, UserError, TimeoutError: see ``rendezvous``.
    """
    backend = "nccl" if context.device.type == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(context.device)
        nccl.configure(rendezvous_folder.parent / "jobs" / "failures", context.attempt)
    if context.nodes > 1:
        addresses_of_chosen_interfaces()  # gloo's own error comes after the rendezvous, and does not name the machine
    try:
        with rendezvous(
            rendezvous_folder,
            context.attempt,
            rank=context.rank,
            world_size=context.world_size,
            nodes=context.nodes,
        ) as (store, address):
            if backend == "gloo" and context.nodes > 1:
                use_interface_of(address)
            dist.init_process_group(
                backend, store=store, rank=context.rank, world_size=context.world_size, timeout=COLLECTIVE_TIMEOUT
            )
        yield store
    except BaseException:
        # With several ranks, destroying the group could wait for ranks that wait for this one in a collective.
        if context.world_size == 1 and dist.is_initialized():
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
