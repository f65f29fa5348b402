"""The process group: who is who, how ranks find each other, and what they tell each other."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cfmask.errors import UserError
from cfmask.files import write_atomically

# How long a rank waits for the others. Generous, because rank 0 may be building a zero-shot head meanwhile.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Place:
    """This process among all of a job's.

    attempt: names this start of the job, the same on all ranks and different for every start.
    nodes: machines of the job. cpus: cores that this process may use. gpu: whether it computes on a GPU.
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
        """Its GPU: of those it sees, the one of its local rank (a scheduler may show it just one)."""
        if not self.gpu:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise UserError(
                f"Rank {self.rank} on {socket.gethostname()} sees no GPU. Check the node (nvidia-smi), or train "
                "on CPUs with --gpus-per-node 0."
            )
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())


@contextmanager
def process_group(place: Place, meeting_folder: Path) -> Iterator[dist.Store]:
    """Join the job's process group (nccl with GPUs, gloo without); yields its store.

    Rank 0 listens on a port that the kernel gives it and publishes it in ``meeting_folder`` under the
    attempt's name: no port is guessed, and no earlier attempt's port is taken for this one's.

    Raises:
        UserError: rank 0 gave up before the group was formed, with its reason.
        TimeoutError: rank 0 was not heard of.
    """
    meeting_folder.mkdir(parents=True, exist_ok=True)
    meeting = meeting_folder / f"{place.attempt}.json"
    store: dist.Store
    if place.rank == 0:
        host = "127.0.0.1" if place.nodes == 1 else _address()
        listening = dist.TCPStore(host, 0, place.world_size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        write_atomically(meeting, json.dumps({"host": host, "port": listening.port}))
        store = listening
    else:
        store = _find_store(meeting, place)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=TIMEOUT)
    try:
        yield store
    finally:
        if place.rank == 0:
            meeting.unlink(missing_ok=True)
    # Not after an exception: with collectives under way it could wait for ranks that are waiting for this one.
    dist.destroy_process_group()


def call_off(place: Place, meeting_folder: Path, reason: str) -> None:
    """Tell the waiting ranks of this attempt, from rank 0, that there will be no group."""
    meeting_folder.mkdir(parents=True, exist_ok=True)
    write_atomically(meeting_folder / f"{place.attempt}.json", json.dumps({"error": reason}))


def _find_store(meeting: Path, place: Place) -> dist.Store:
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        try:
            found = json.loads(meeting.read_text())
        except (OSError, ValueError):
            time.sleep(0.1)
            continue
        if "error" in found:
            raise UserError(found["error"])
        try:
            # Not for long: the address may be one that an attempt before this has left.
            store = dist.TCPStore(
                found["host"], found["port"], place.world_size, is_master=False, timeout=timedelta(seconds=10)
            )
            store.set_timeout(timedelta(seconds=60))
            return store
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError):
            time.sleep(0.5)  # rank 0 has gone, or a network is slow: look again
    raise TimeoutError(f"rank {place.rank}: rank 0 published no address in {meeting} within {TIMEOUT}")


def _address() -> str:
    """An address of this machine that the others can reach: what its name resolves to."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        return socket.getaddrinfo(name, None)[0][4][0]  # type: ignore[return-value]
    except OSError:
        return socket.gethostname()
