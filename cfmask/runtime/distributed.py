"""The process group: who is who, how ranks find each other, and what they tell each other.

Rank 0 binds a port that the kernel gives it, and writes into the run folder, under the name of this start of the job,
which one it is and every address that it may be reached under. The others try these in turn, and take the first behind
which rank 0 itself answers, with the word that stands in the file: on another machine an address may be somebody
else's, and a file may have been left by a start that was killed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import torch
import torch.distributed as dist

from cfmask.errors import UserError
from cfmask.runtime import heartbeat, nccl
from cfmask.runtime.files import write_atomically
from cfmask.runtime.machine import node_name

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(seconds=heartbeat.RENDEZVOUS_TIMEOUT_S)
"""How long a rank waits for the others before they train. Generous, because some nodes may start late, and rank 0 may
be building a zero-shot head meanwhile. In the environment, where launch/submit.py puts it, in minutes."""
COLLECTIVE_TIMEOUT = timedelta(seconds=heartbeat.COLLECTIVE_TIMEOUT_S)
"""How long a collective may take before the job is given up; as above."""

_CONNECT_S = 5.0
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_LINK_LOCAL = 0x20  # net/ipv6.h


@dataclass(frozen=True)
class DistributedContext:
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
        """Threads to read and decode with where the recipe leaves it open: one core is the trainer's."""
        return min(16, max(1, self.cpus - 1))


class CalledOff(UserError):
    """There will be no group in this start of the job, as rank 0 says.

    failed: whether the start counts as failed; one of a run that is finished or cancelled does not.
    """

    def __init__(self, reason: str, *, failed: bool = True) -> None:
        super().__init__(reason)
        self.failed = failed


@contextmanager
def process_group(context: DistributedContext, meeting_folder: Path) -> Iterator[dist.Store]:
    """Join the job's process group (nccl with GPUs, gloo without); yields its store.

    GLOO_SOCKET_IFNAME, if it is set, names the network interface that ranks of several machines meet on.

    Raises:
        CalledOff: rank 0 gave up before the group was formed, with its reason.
        UserError: there is no interface of that name on this machine.
        TimeoutError: rank 0 was not heard of, or other ranks did not come.
    """
    meeting_folder.mkdir(exist_ok=True)  # not its parents: a run folder that is not mounted is not made anew
    meeting = meeting_folder / f"{context.attempt}.json"
    backend = "nccl" if context.device.type == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(context.device)
        nccl.configure(meeting_folder.parent / "jobs" / "failures", context.attempt)
    if context.nodes > 1:
        _addresses_of_interface()  # gloo's own error names no machine, and comes when all ranks have met
    door = _Door() if context.rank == 0 else None
    try:
        if door is not None:
            store = _open_store(context, door, meeting)
        else:
            store, reached_from = _find_store(meeting, context)
        _wait_for_all(store, context)
        if backend == "gloo" and context.nodes > 1:
            # By itself gloo takes what the host's name resolves to, which on many a machine is 127.0.1.1.
            _bind_gloo(door.reached_at if door is not None else reached_from)
        dist.init_process_group(
            backend, store=store, rank=context.rank, world_size=context.world_size, timeout=COLLECTIVE_TIMEOUT
        )
        yield store
    except BaseException:
        # Not otherwise: with collectives under way it could wait for ranks that are waiting for this one.
        if context.world_size == 1 and dist.is_initialized():
            dist.destroy_process_group()
        raise
    finally:
        if door is not None:
            door.close()
            meeting.unlink(missing_ok=True)
    dist.destroy_process_group()


def call_off(context: DistributedContext, meeting_folder: Path, reason: str, *, failed: bool = True) -> None:
    """Tell the waiting ranks of this attempt, from rank 0, that there will be no group: they raise CalledOff."""
    meeting_folder.mkdir(exist_ok=True)  # not its parents: a run folder that is not mounted is not made anew
    write_atomically(meeting_folder / f"{context.attempt}.json", json.dumps({"error": reason, "failed": failed}))


def remove_stale_rendezvous(folder: Path) -> None:
    """Remove the files of starts that were killed; called by rank 0 while it holds the run folder, before it publishes
    its own. A refusal (``call_off``) stays for a minute: its other ranks may still have to read it."""
    for path in folder.glob("*") if folder.exists() else ():
        with suppress(OSError):
            is_refusal = path.suffix == ".json" and b'"error"' in path.read_bytes()
            if not is_refusal or time.time() - path.stat().st_mtime > 60:
                path.unlink()


class _Door:
    """A port of rank 0's where a word is said to whoever comes: who hears the right one has found rank 0.

    reached_at: the address of this machine under which the first one came, of those that are not loopback.
    """

    def __init__(self) -> None:
        self.word = secrets.token_hex(16)
        self.reached_at: str | None = None
        self._socket = (
            socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
            if socket.has_dualstack_ipv6()
            else socket.create_server(("", 0))
        )
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:  # closed
                return
            with visitor, suppress(OSError):
                visitor.sendall(self.word.encode())
                here = _plain(visitor.getsockname()[0])
                if self.reached_at is None and not ip_address(here).is_loopback:
                    self.reached_at = here

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # close alone does not wake the thread
        self._socket.close()


def _knock(host: str, port: int, word: str) -> str | None:
    """The address of this machine on the way to rank 0's door; None if rank 0 does not answer there."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S) as visit:
            heard = b""
            while len(heard) < len(word) and (part := visit.recv(len(word) - len(heard))):
                heard += part
            return _plain(visit.getsockname()[0]) if heard.decode(errors="replace") == word else None
    except OSError:  # nobody there, no way there, no such name, or silence
        return None


def _open_store(context: DistributedContext, door: _Door, meeting: Path) -> dist.Store:
    """Rank 0: listen, and publish where."""
    hosts = _own_hosts() if context.nodes > 1 else ["127.0.0.1", "::1"]
    # It listens on every interface; the name is only for itself.
    store = dist.TCPStore(
        "127.0.0.1", 0, context.world_size, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT
    )
    published = {"hosts": hosts, "port": store.port, "door": door.port, "word": door.word}
    write_atomically(meeting, json.dumps(published))
    return store


def _find_store(meeting: Path, context: DistributedContext) -> tuple[dist.Store, str]:
    """The others: rank 0's store, and the address of this machine from which it was reached."""
    started = time.monotonic()
    tried: list[str] = []
    said = False
    while time.monotonic() - started < TIMEOUT.total_seconds():
        try:
            found = json.loads(meeting.read_text())
            error = found.get("error")
            if error is None:
                tried, port, door, word = (found[name] for name in ("hosts", "port", "door", "word"))
        except (OSError, ValueError, KeyError):  # not there yet, or left by another version
            time.sleep(0.1)
            continue
        if error is not None:
            raise CalledOff(error, failed=found.get("failed", True))
        for host in tried:
            if here := _knock(host, door, word):
                patience = timedelta(seconds=10)
                with suppress(RuntimeError):  # rank 0 has gone meanwhile
                    store = dist.TCPStore(
                        host, port, context.world_size, is_master=False, wait_for_workers=False, timeout=patience
                    )
                    store.set_timeout(COLLECTIVE_TIMEOUT)
                    return store, here
        if not said and time.monotonic() - started > 60:
            said = True
            logger.info(f"rank {context.rank}: rank 0 does not answer yet at {', '.join(tried)}; trying on")
        time.sleep(0.5)
    waited = f"within {TIMEOUT.total_seconds() / 60:g} min (--rendezvous-timeout)"
    if not tried:
        raise TimeoutError(f"rank {context.rank}: rank 0 published no address in {meeting} {waited}")
    raise TimeoutError(
        f"rank {context.rank} on {socket.gethostname()} reached rank 0 at none of its addresses {waited}: "
        f"{', '.join(tried)}. If the nodes see each other on another interface, name it with --interface."
    )


def _wait_for_all(store: dist.Store, context: DistributedContext) -> None:
    keys = [f"rank {rank}" for rank in range(context.world_size)]
    store.set(keys[context.rank], "here")
    try:
        store.wait(keys, TIMEOUT)
    except RuntimeError:
        missing = [key for key in keys if not store.check([key])]
        raise TimeoutError(
            f"{len(missing)} of {context.world_size} ranks did not come within {TIMEOUT.total_seconds() / 60:g} min "
            f"(--rendezvous-timeout): {', '.join(missing[:8])}{' …' if len(missing) > 8 else ''}. Their logs say why."
        ) from None


def _bind_gloo(address: str | None) -> None:
    """Let gloo use the interface on which the ranks have met, unless it was told another one."""
    for interface, own in interface_addresses():
        if own == address and not ip_address(own).is_loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            return


def _own_hosts() -> list[str]:
    """Where other machines may find this one, the likeliest first: addresses, then names.

    Raises:
        UserError: the interface that GLOO_SOCKET_IFNAME names has no address here.
    """
    if chosen := _addresses_of_interface():
        return chosen
    addresses = interface_addresses()
    own = [address for _, address in addresses if not ip_address(address).is_loopback]
    names = [name for name in (os.environ.get("SLURMD_NODENAME"), socket.gethostname()) if name]
    official = [address for name in names for address in _resolve(name) if address in own]
    return list(dict.fromkeys([*official, *own, *names]))


def _addresses_of_interface() -> list[str]:
    """Of this machine, on the interface that GLOO_SOCKET_IFNAME names (or those: eth0,eth1); none if it names none.

    Raises:
        UserError: there is no such interface here.
    """
    chosen = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    addresses = interface_addresses()
    for name in chosen:
        if not any(interface == name for interface, _ in addresses):
            machine = node_name()
            raise UserError(
                f"There is no network interface {name} with an address on {machine}; those are "
                f"{', '.join(f'{i} ({a})' for i, a in addresses)}. Check --interface, and interface in the cluster "
                "file."
            )
    return [address for name in chosen for interface, address in addresses if interface == name]


def _resolve(name: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def interface_addresses() -> list[tuple[str, str]]:
    """Interfaces of this machine with their addresses, IPv4 before IPv6, without those that only hold on a link."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, socket.inet_ntoa(answer[20:24])))
    with suppress(FileNotFoundError):  # a kernel without IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if int(scope, 16) != _LINK_LOCAL:
                found.append((name, str(ip_address(bytes.fromhex(digits)))))
    return found


def _plain(address: str) -> str:
    """An IPv4 address that came through an IPv6 socket as what it is."""
    parsed = ip_address(address.partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
