"""How the ranks of a start find rank 0's store.

Rank 0 binds a port that the kernel chooses, and publishes all addresses of its machine in the rendezvous file,
RUN/rendezvous/ATTEMPT.json. The other ranks probe these addresses in turn: behind the right one, rank 0's rendezvous
server sends the token that the file contains. The token is needed because an address may belong to another machine, and
because a start that was killed may have left its file.

torch's own rendezvous needs one address and port that is known in advance; a scheduler does not provide them.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import torch.distributed as dist

from cfmask.errors import UserError
from cfmask.runtime import heartbeat
from cfmask.runtime.files import write_atomically
from cfmask.runtime.network import own_hosts, unmapped

logger = logging.getLogger(__name__)

RENDEZVOUS_TIMEOUT = timedelta(seconds=heartbeat.RENDEZVOUS_TIMEOUT_S)
"""How long a rank waits for the others before training. Some nodes may start late, and rank 0 may build a zero-shot
head before it joins."""
COLLECTIVE_TIMEOUT = timedelta(seconds=heartbeat.COLLECTIVE_TIMEOUT_S)
"""How long a collective may take before the start fails."""
_CONNECT_S = 5.0
_REFUSAL_AGE_S = 60
"""A refusal older than this is stale."""


class CalledOff(UserError):
    """Rank 0 has given up this start before the process group was formed.

    failed: whether the start counts as failed. A start of a finished or cancelled run does not.
    """

    def __init__(self, reason: str, *, failed: bool = True) -> None:
        super().__init__(reason)
        self.failed = failed


def call_off(folder: Path, attempt: str, reason: str, *, failed: bool = True) -> None:
    """On rank 0: let the other ranks of this attempt raise ``CalledOff`` instead of waiting for the process group."""
    write_atomically(_file_of(folder, attempt), json.dumps({"error": reason, "failed": failed}))


def remove_stale_rendezvous(folder: Path) -> None:
    """Remove the files of starts that were killed. Called by rank 0 while it holds the run folder, before it publishes
    its own file. A refusal (``call_off``) stays for a minute, because other ranks may still have to read it."""
    for path in folder.glob("*") if folder.exists() else ():
        with suppress(OSError):
            is_refusal = path.suffix == ".json" and b'"error"' in path.read_bytes()
            if not is_refusal or time.time() - path.stat().st_mtime > _REFUSAL_AGE_S:
                path.unlink()


@contextmanager
def rendezvous(
    folder: Path, attempt: str, *, rank: int, world_size: int, nodes: int
) -> Iterator[tuple[dist.Store, str | None]]:
    """Wait for all ranks; yields the store, and this machine's address on the connection between rank 0 and another
    machine (None if there is none).

    Args:
        folder: of rendezvous files; made if it is missing.
        attempt: names this start of the job.

    Raises:
        CalledOff: rank 0 gave up, with its reason.
        UserError: ``GLOO_SOCKET_IFNAME`` names an interface that this machine does not have.
        TimeoutError: rank 0 was not found, or other ranks did not arrive.
    """
    file = _file_of(folder, attempt)
    if rank:
        store, address = _find_store(file, rank, world_size)
        _wait_for_all(store, rank, world_size)
        yield store, address
        return
    with closing(RendezvousServer()) as server:
        # The store listens on every interface; the address is used only by this process.
        store = dist.TCPStore(
            "127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT
        )
        hosts = own_hosts() if nodes > 1 else ["127.0.0.1", "::1"]
        published = {"hosts": hosts, "port": store.port, "rendezvous_port": server.port, "token": server.token}
        try:
            write_atomically(file, json.dumps(published))
            _wait_for_all(store, rank, world_size)
            yield store, server.address
        finally:
            file.unlink(missing_ok=True)


def _file_of(folder: Path, attempt: str) -> Path:
    folder.mkdir(exist_ok=True)  # without its parents: if the run folder is not mounted, it must not be created
    return folder / f"{attempt}.json"


class RendezvousServer:
    """A port of rank 0 that sends a token to everyone who connects.

    address: of this machine, as the first other machine has reached it.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self.address: str | None = None
        self._socket = (
            socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
            if socket.has_dualstack_ipv6()
            else socket.create_server(("", 0))
        )
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:  # closed
                return
            with client, suppress(OSError):
                client.sendall(self.token.encode())
                here = unmapped(client.getsockname()[0])
                if self.address is None and not ip_address(here).is_loopback:
                    self.address = here

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # close alone does not end accept
        self._socket.close()


def probe(host: str, port: int, token: str) -> str | None:
    """This machine's address on the connection to rank 0's rendezvous server; None if rank 0 does not answer there."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S) as connection:
            received = b""
            while len(received) < len(token) and (part := connection.recv(len(token) - len(received))):
                received += part
            return unmapped(connection.getsockname()[0]) if received == token.encode() else None
    except OSError:  # refused, no route, unknown name, timeout
        return None


def _find_store(file: Path, rank: int, world_size: int) -> tuple[dist.Store, str]:
    """Rank 0's store, and the address of this machine from which it was reached."""
    started = time.monotonic()
    hosts: list[str] = []
    logged = False
    while time.monotonic() - started < RENDEZVOUS_TIMEOUT.total_seconds():
        try:
            published = json.loads(file.read_text())
            error = published.get("error")
            if error is None:
                hosts, port, server, token = (published[n] for n in ("hosts", "port", "rendezvous_port", "token"))
        except (OSError, ValueError, KeyError):  # not published yet, or left by another version
            time.sleep(0.1)
            continue
        if error is not None:
            raise CalledOff(error, failed=published.get("failed", True))
        for host in hosts:
            if address := probe(host, server, token):
                with suppress(RuntimeError):  # rank 0 has ended since
                    store = dist.TCPStore(
                        host,
                        port,
                        world_size,
                        is_master=False,
                        wait_for_workers=False,
                        timeout=timedelta(seconds=10),
                    )
                    store.set_timeout(COLLECTIVE_TIMEOUT)
                    return store, address
        if not logged and time.monotonic() - started > 60:
            logged = True
            logger.info(f"rank 0 does not answer yet at {', '.join(hosts)}; still trying")
        time.sleep(0.5)
    waited = f"within {_minutes()} min (--rendezvous-timeout)"
    if not hosts:
        raise TimeoutError(f"rank {rank}: rank 0 published no address in {file} {waited}")
    raise TimeoutError(
        f"rank {rank} on {socket.gethostname()} reached rank 0 at none of its addresses {waited}: {', '.join(hosts)}. "
        "If the nodes see each other on another interface, name it with --interface."
    )


def _wait_for_all(store: dist.Store, rank: int, world_size: int) -> None:
    keys = [f"rank {each}" for each in range(world_size)]
    store.set(keys[rank], "here")
    try:
        store.wait(keys, RENDEZVOUS_TIMEOUT)
    except RuntimeError:
        missing = [key for key in keys if not store.check([key])]
        raise TimeoutError(
            f"{len(missing)} of {world_size} ranks did not come within {_minutes()} min (--rendezvous-timeout): "
            f"{', '.join(missing[:8])}{' …' if len(missing) > 8 else ''}. Their logs say why."
        ) from None


def _minutes() -> str:
    return f"{RENDEZVOUS_TIMEOUT.total_seconds() / 60:g}"
