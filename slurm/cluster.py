#!/usr/bin/env python3
"""A real Slurm on one machine: try a launch here before you queue on the big cluster.

    python3 slurm/cluster.py up [--nodes 2] [--cpus-per-node 4] [--state DIR] [--no-install]
    python3 slurm/cluster.py status [--state DIR]
    python3 slurm/cluster.py down [--state DIR]

Everything lives in one state folder (default ~/.cache/cfmask-slurm); nothing is read from or written to /etc, and
daemons listen on the loopback interface only:

    STATE/ cluster.json                          what runs: daemons with their command lines and process ids
           slurm.conf                            for users (SLURM_CONF) and, through daemons.conf, for the daemons
           daemons.conf slurmdbd.conf            what only the daemons read; from Slurm 24.05 on cgroup.conf too
           munge/ mysql/ controller/ spool/nK/   the daemons' own state
           log/                                  one log a daemon

The daemons are the real ones (munged, mariadbd, slurmdbd, slurmctld and one slurmd a node), each private to the folder,
so two clusters live side by side and a munged or MariaDB of the machine is left alone. Standard library only.

Daemons and jobs see "localhost" as the host's name. Where the kernel does not let them (a container without the
SYS_ADMIN capability) they see the machine's, and Slurm's daemons listen on every interface; `status` says so.

Exit codes: 0 done (`status`: all daemons run), 1 something failed (`status`: not all of them run), 2 refused.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from configuration import (
    DATABASE,
    NO_SYNC,
    environment,
    log_path,
    log_tail,
    name_host_localhost,
    read_record,
    write_configuration,
    write_record,
)
from processes import POLL, end, family, runs
from programs import PATH, Failed, Refused, install, missing_programs

PACKAGE_LOCK = Path("/run/lock")
"""The folder of a lock on this machine's packages."""

# ---------------------------------------------------------------------------------------------------------------- verbs


def up(state: Path, nodes: int, cpus_per_node: int) -> str:
    """Bring the cluster up, or bring back those of its daemons that have died; return what to say.

    Raises:
        Refused: the folder holds something else, or a cluster of another size that is running.
        Failed: a daemon did not come up (the end of its log is in the message).
    """
    socket_path = state / "munge" / "munge.socket"
    if len(str(socket_path)) > 100:  # sun_path holds 108 bytes
        raise Refused(
            f"the state folder's path is too long for a Unix socket: {state}. Give a shorter one with --state."
        )
    record = read_record(state)
    if record is None and state.is_dir() and any(child.name != "lock" for child in state.iterdir()):
        raise Refused(f"{state} is not empty and not a cluster of ours. Give another folder with --state.")
    dead = [name for name, daemon in record["daemons"].items() if not runs(state, daemon["pid"])] if record else []

    if record is not None and len(dead) < len(record["daemons"]):
        if (record["nodes"], record["cpus_per_node"]) != (nodes, cpus_per_node):
            size = f"{record['nodes']} nodes of {record['cpus_per_node']} CPUs"
            raise Refused(f"a cluster of {size} is up in {state}. Take it down first, or give another --state.")
        if not dead:
            return f"already up: {size_line(record)}"
        for name in dead:
            start(state, record, name)
        wait_idle(state, record, settle=True)
        return f"up again: {size_line(record)} (restarted {', '.join(dead)})"

    # None of it runs, or there is none: what an interrupted `up`, a crash or a reboot left is of no use.
    sweep(state)
    began = time.monotonic()
    try:
        record = create(state, nodes, cpus_per_node)
    except BaseException:
        stop(state)
        raise
    return f"up in {time.monotonic() - began:.0f} s: {size_line(record)}"


def create(state: Path, nodes: int, cpus_per_node: int) -> dict:
    """Write the configuration, start every daemon in the order they need each other; return the record."""
    for folder in ("munge", "mysql", "controller", "log", *(f"spool/n{k}" for k in range(1, nodes + 1))):
        (state / folder).mkdir(parents=True, exist_ok=True)
    key = state / "munge" / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(128))
    record = write_configuration(state, nodes, cpus_per_node)

    start(state, record, "munged")
    # Root is let in by the socket's peer credentials: no password anywhere.
    run_tool(
        state,
        ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={state}/mysql", "--skip-test-db", NO_SYNC],
    )
    # A database is a folder. Where it is missing, slurmdbd reuses the handle whose connection was refused ("Unknown
    # database"); libmariadb 11.8 has closed it by then, and slurmdbd ends.
    (state / "mysql" / DATABASE).mkdir()
    start(state, record, "mariadbd")
    start(state, record, "slurmdbd")
    run_tool(state, ["sacctmgr", "-i", "add", "cluster", "cfmask"])
    for name in record["daemons"]:
        if name == "slurmctld" or name.startswith("slurmd-"):
            start(state, record, name)
    wait_idle(state, record)
    return record


def down(state: Path) -> str:
    """Stop every daemon and job of the cluster and remove its state folder; return what to say."""
    if read_record(state) is None:
        return f"nothing is up in {state}"
    stop(state)
    shutil.rmtree(state)
    return "down"


def status(state: Path) -> tuple[str, bool]:
    """Return the daemons, nodes and queue as text, and whether every daemon runs."""
    record = read_record(state)
    if record is None:
        return f"nothing is up in {state}", False
    lines = []
    for name, daemon in record["daemons"].items():
        alive = runs(state, daemon["pid"])
        lines.append(f"{name:12} {'pid ' + str(daemon['pid']) if alive else 'dead, see ' + str(log_path(state, name))}")
    whole = all(runs(state, daemon["pid"]) for daemon in record["daemons"].values())
    if runs(state, record["daemons"]["slurmctld"]["pid"]):
        for command in (["sinfo"], ["squeue", "--all"]):
            lines += ["", call(state, command, timeout=20).stdout.rstrip()]
    if not record["loopback_only"]:
        lines += ["", "Slurm's daemons listen on every interface: no right to give them a host name of their own."]
    return "\n".join([*lines, "", export_line(state)]), whole


def size_line(record: dict) -> str:
    partitions = "partitions low (preemptible, default), abrupt (the same without grace) and high"
    return f"{record['nodes']} nodes of {record['cpus_per_node']} CPUs, {partitions}"


def export_line(state: Path) -> str:
    return f"export SLURM_CONF={state}/slurm.conf"


# -------------------------------------------------------------------------------------------------------------- daemons


def start(state: Path, record: dict, name: str) -> None:
    """Start one daemon in a session of its own, note its process id, return when it answers.

    Raises:
        Failed: it ended, or did not answer within a minute.
    """
    command = record["daemons"][name]["command"]
    program = shutil.which(command[0], path=PATH)
    assert program is not None
    with log_path(state, name).open("ab") as log:
        process = subprocess.Popen(
            [program, *command[1:]],
            cwd=state,
            env=environment(state),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C meant for the caller is not for the daemons
            preexec_fn=name_host_localhost if record["loopback_only"] else None,
        )
    record["daemons"][name]["pid"] = process.pid
    write_record(state, record)

    ready: dict[str, Callable[[], bool]] = {
        "munged": lambda: (state / "munge" / "munge.socket").exists(),
        "mariadbd": lambda: (state / "mysql" / "socket").exists(),
        "slurmdbd": lambda: listens(record["database_port"]),
    }
    if name in ready:
        deadline = time.monotonic() + 60
        while not ready[name]():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"{name} did not come up. The end of its log:\n{log_tail(state, name)}")
            time.sleep(POLL)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_idle(state: Path, record: dict, *, settle: bool = False, timeout: float = 90) -> None:
    """Wait until every node is idle; with settle, nodes that have jobs will do."""
    good = {"idle", "mixed", "allocated", "completing"} if settle else {"idle"}
    deadline = time.monotonic() + timeout
    states = "no answer"
    while time.monotonic() < deadline:
        states = call(state, ["sinfo", "-h", "-p", "low", "-N", "-o", "%T"], timeout=20).stdout
        if len(states.split()) == record["nodes"] and set(states.split()) <= good:
            return
        for name, daemon in record["daemons"].items():
            if not runs(state, daemon["pid"]):
                raise Failed(f"{name} did not come up. The end of its log:\n{log_tail(state, name)}")
        time.sleep(POLL)
    tails = "\n".join(log_tail(state, name) for name in ("slurmctld", "slurmd-n1"))
    raise Failed(f"the nodes are not idle after {timeout:.0f} s ({states.split()}). The ends of the logs:\n{tails}")


def call(state: Path, command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a tool of Slurm's against this cluster; a tool that hangs counts as one that failed."""
    try:
        return subprocess.run(command, env=environment(state), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:.0f} s")


def run_tool(state: Path, command: list[str]) -> None:
    done = call(state, command, timeout=120)
    if done.returncode != 0:
        raise Failed(f"`{' '.join(command)}` failed:\n{(done.stdout + done.stderr).strip()}")


def stop(state: Path) -> None:
    """End all that runs from this folder: first the controller (no new jobs), then jobs, then the rest."""
    record = read_record(state)
    daemons = {name: daemon["pid"] for name, daemon in record["daemons"].items()} if record else {}
    # Looked for first: what a job started with an empty environment is found through its ancestors, while they live.
    everything = family(state)
    services = [daemons.get(name) for name in ("slurmdbd", "mariadbd", "munged")]
    end([pid for pid in [daemons.get("slurmctld")] if runs(state, pid)], patience=15)
    end([pid for name, pid in daemons.items() if name.startswith("slurmd-") and runs(state, pid)], patience=10)
    end({*everything, *family(state)}.difference(services), patience=2)  # jobs are what is left of it
    for pid in services:
        end([pid] if runs(state, pid) else [], patience=15)
    sweep(state)


def sweep(state: Path) -> None:
    """End what no record tells of, too: an `up` may have been killed between starting a daemon and noting it."""
    for _ in range(3):  # what forked while we looked is caught by the next look
        left = family(state)
        if not left:
            break
        end(left, patience=5)


# -------------------------------------------------------------------------------------------------------------- command


def become_root(arguments: list[str], state: Path) -> None:
    """Run this again under sudo unless we are root.

    Raises:
        Refused: no right to.
    """
    if os.geteuid() == 0:
        return
    sudo = shutil.which("sudo", path=PATH)
    if sudo is None or subprocess.run([sudo, "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True).returncode:
        raise Refused("a Slurm of one's own needs root: run this as root, or with a sudo that asks for no password.")
    state.parent.mkdir(parents=True, exist_ok=True)  # as the user, so that ~/.cache stays theirs
    command = [sudo, "-n", sys.executable, str(Path(__file__).resolve()), *arguments, "--state", str(state)]
    os.execv(sudo, command)


@contextlib.contextmanager
def locked(folder: Path, name: str = "lock") -> Iterator[None]:
    """Hold the folder for this process: a second `up` or `down` waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="slurm/cluster.py", description="A real Slurm on one machine, from Debian's packages, for trying launches."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    parsers = {
        "up": verbs.add_parser("up", help="bring the cluster up; when it is up, say so"),
        "down": verbs.add_parser("down", help="stop its daemons and jobs, and remove the state folder"),
        "status": verbs.add_parser("status", help="show daemons, nodes and queue; exit code 1 unless all is up"),
    }
    for verb in parsers.values():
        verb.add_argument(
            "--state",
            type=Path,
            default=Path("~/.cache/cfmask-slurm"),
            help="folder that the cluster lives in, on a local disk (default %(default)s)",
        )
    parsers["up"].add_argument("--nodes", type=int, default=2, help="node daemons (default %(default)s)")
    parsers["up"].add_argument(
        "--cpus-per-node", type=int, default=4, help="CPUs each node claims to have (default %(default)s)"
    )
    parsers["up"].add_argument("--no-install", action="store_true", help="refuse when packages are missing")
    options = parser.parse_args(arguments)
    state = options.state.expanduser().resolve()

    try:
        if options.verb == "up" and min(options.nodes, options.cpus_per_node) < 1:
            raise Refused("a cluster has at least one node, and a node at least one CPU.")
        if any(character.isspace() or character in "#%=\\," for character in str(state)):
            raise Refused(f"Slurm cannot have a state folder with such characters in its path: {state}")
        become_root(arguments, state)
        if options.verb == "up":
            # Of two `up` at once, one installs: apt's own locks make the other one fail, and programs are there a while
            # before their packages are complete.
            with locked(PACKAGE_LOCK, "cfmask-slurm-packages.lock"):
                if missing := missing_programs():
                    if options.no_install:
                        raise Refused(
                            f"Slurm is not installed (missing: {', '.join(missing)}), and --no-install was given."
                        )
                    install()
            with locked(state):
                print(up(state, options.nodes, options.cpus_per_node))
            print(export_line(state))
            return 0
        if not state.is_dir():
            print(f"nothing is up in {state}")
            return 1 if options.verb == "status" else 0
        if options.verb == "down":
            with locked(state):
                print(down(state))
            return 0
        text, whole = status(state)
        print(text)
        return 0 if whole else 1
    except Refused as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except Failed as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
