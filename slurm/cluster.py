#!/usr/bin/env python3
"""Run a real Slurm on one machine, to test a launch before it is queued on a large cluster.

    python3 slurm/cluster.py up [--nodes 2] [--cpus-per-node 4] [--state DIR] [--no-install]
    python3 slurm/cluster.py status [--state DIR]
    python3 slurm/cluster.py down [--state DIR]

All files are in one state folder (default ~/.cache/cfmask-slurm); nothing is read from or written to /etc, and daemons
listen on the loopback interface only:

    STATE/ cluster.json                          the daemons, with their command lines and process ids
           slurm.conf                            for users (SLURM_CONF) and, through daemons.conf, for the daemons
           daemons.conf slurmdbd.conf            for the daemons only; from Slurm 24.05 on also cgroup.conf
           munge/ mysql/ controller/ spool/nK/   the daemons' state
           log/                                  one log per daemon

The daemons are the real ones (munged, mariadbd, slurmdbd, slurmctld, and one slurmd per node), private to the folder.
Several clusters can run at the same time, and so can a munged or MariaDB of the machine. Standard library only.

Daemons and jobs see "localhost" as the host's name. If the kernel does not allow that (in a container without the
SYS_ADMIN capability), they see the machine's name, and Slurm's daemons listen on every interface; `status` says so.

Exit codes: 0 done (`status`: all daemons run), 1 failed (`status`: a daemon does not run), 2 refused.
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
"""The folder of the lock that serialises the installation of packages."""


def up(state: Path, nodes: int, cpus_per_node: int) -> str:
    """Start the cluster, or those of its daemons that have died. Returns a message.

    Raises:
        Refused: the folder holds something else, or a running cluster of another size.
        Failed: a daemon did not start; the message has the end of its log.
    """
    socket_path = state / "munge" / "munge.socket"
    if len(str(socket_path)) > 100:  # sun_path holds 108 bytes
        raise Refused(
            f"the state folder's path is too long for a Unix socket: {state}. Give a shorter one with --state."
        )
    record = read_record(state)
    if record is None and state.is_dir() and any(child.name != "lock" for child in state.iterdir()):
        raise Refused(f"{state} is not empty and not a cluster of this program. Give another folder with --state.")
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

    # No daemon runs: remove what an interrupted `up`, a crash or a reboot has left.
    sweep(state)
    began = time.monotonic()
    try:
        record = create(state, nodes, cpus_per_node)
    except BaseException:
        stop(state)
        raise
    return f"up in {time.monotonic() - began:.0f} s: {size_line(record)}"


def create(state: Path, nodes: int, cpus_per_node: int) -> dict:
    """Write the configuration and start the daemons in the order of their dependencies. Returns the record."""
    for folder in ("munge", "mysql", "controller", "log", *(f"spool/n{k}" for k in range(1, nodes + 1))):
        (state / folder).mkdir(parents=True, exist_ok=True)
    key = state / "munge" / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(128))
    record = write_configuration(state, nodes, cpus_per_node)

    start(state, record, "munged")
    # MariaDB identifies root by the socket's peer credentials: no password is needed.
    run_tool(
        state,
        [
            *("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={state}/mysql", "--skip-test-db"),
            *(f"--tmpdir={state}", NO_SYNC),  # in /tmp the temporary tables of two servers collide
        ],
    )
    # A database is a folder. If it is missing, slurmdbd reuses the handle whose connection was refused ("Unknown
    # database"), which libmariadb 11.8 has closed by then, and ends.
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
    """Stop all daemons and jobs of the cluster, and remove its state folder. Returns a message."""
    if read_record(state) is None:
        return f"nothing is up in {state}"
    stop(state)
    shutil.rmtree(state)
    return "down"


def status(state: Path) -> tuple[str, bool]:
    """Returns a description of daemons, nodes and queue, and whether all daemons run."""
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
        lines += ["", "Slurm's daemons listen on every interface: the kernel does not allow a host name of their own."]
    return "\n".join([*lines, "", export_line(state)]), whole


def size_line(record: dict) -> str:
    partitions = "partitions low (preemptible, default), abrupt (the same without grace) and high"
    return f"{record['nodes']} nodes of {record['cpus_per_node']} CPUs, {partitions}"


def export_line(state: Path) -> str:
    return f"export SLURM_CONF={state}/slurm.conf"


# --- daemons ----------------------------------------------------------------------------------------------------------


def start(state: Path, record: dict, name: str) -> None:
    """Start a daemon in a session of its own, record its process id, and wait until it answers.

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
            start_new_session=True,  # Ctrl-C must not reach the daemons
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
                raise Failed(f"{name} did not start. The end of its log:\n{log_tail(state, name)}")
            time.sleep(POLL)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_idle(state: Path, record: dict, *, settle: bool = False, timeout: float = 90) -> None:
    """Wait until every node is idle, or, with ``settle``, idle or running jobs."""
    good = {"idle", "mixed", "allocated", "completing"} if settle else {"idle"}
    deadline = time.monotonic() + timeout
    states = "no answer"
    while time.monotonic() < deadline:
        states = call(state, ["sinfo", "-h", "-p", "low", "-N", "-o", "%T"], timeout=20).stdout
        if len(states.split()) == record["nodes"] and set(states.split()) <= good:
            return
        for name, daemon in record["daemons"].items():
            if not runs(state, daemon["pid"]):
                raise Failed(f"{name} did not start. The end of its log:\n{log_tail(state, name)}")
        time.sleep(POLL)
    tails = "\n".join(log_tail(state, name) for name in ("slurmctld", "slurmd-n1"))
    raise Failed(f"the nodes are not idle after {timeout:.0f} s ({states.split()}). The ends of the logs:\n{tails}")


def call(state: Path, command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm against this cluster; a timeout counts as a failure."""
    try:
        return subprocess.run(command, env=environment(state), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:.0f} s")


def run_tool(state: Path, command: list[str]) -> None:
    done = call(state, command, timeout=120)
    if done.returncode != 0:
        raise Failed(f"`{' '.join(command)}` failed:\n{(done.stdout + done.stderr).strip()}")


def stop(state: Path) -> None:
    """End all processes of this cluster: the controller first (no new jobs), then nodes and jobs, then the rest."""
    record = read_record(state)
    daemons = {name: daemon["pid"] for name, daemon in record["daemons"].items()} if record else {}
    # Before anything ends: a job's process with an empty environment is only found through its living ancestors.
    everything = family(state)
    services = [daemons.get(name) for name in ("slurmdbd", "mariadbd", "munged")]
    end([pid for pid in [daemons.get("slurmctld")] if runs(state, pid)], patience=15)
    end([pid for name, pid in daemons.items() if name.startswith("slurmd-") and runs(state, pid)], patience=10)
    end({*everything, *family(state)}.difference(services), patience=2)  # only jobs are left
    for pid in services:
        end([pid] if runs(state, pid) else [], patience=15)
    sweep(state)


def sweep(state: Path) -> None:
    """End processes that are not recorded: an `up` may have been killed before it recorded a daemon."""
    for _ in range(3):  # a process may fork while they are listed
        left = family(state)
        if not left:
            break
        end(left, patience=5)


# --- command ----------------------------------------------------------------------------------------------------------


def become_root(arguments: list[str], state: Path) -> None:
    """Run this program again under sudo, unless this process is root.

    Raises:
        Refused: there is no sudo without a password.
    """
    if os.geteuid() == 0:
        return
    sudo = shutil.which("sudo", path=PATH)
    if sudo is None or subprocess.run([sudo, "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True).returncode:
        raise Refused("starting Slurm needs root: run this as root, or as a user whose sudo asks for no password.")
    state.parent.mkdir(parents=True, exist_ok=True)  # as the user, who then owns ~/.cache
    command = [sudo, "-n", sys.executable, str(Path(__file__).resolve()), *arguments, "--state", str(state)]
    os.execv(sudo, command)


@contextlib.contextmanager
def locked(folder: Path, name: str = "lock") -> Iterator[None]:
    """Lock the folder: a second `up` or `down` waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="slurm/cluster.py", description="Run a real Slurm on one machine, from Debian's packages."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    parsers = {
        "up": verbs.add_parser("up", help="start the cluster, or its daemons that have died"),
        "down": verbs.add_parser("down", help="stop daemons and jobs, and remove the state folder"),
        "status": verbs.add_parser("status", help="show daemons, nodes and queue; exit code 1 unless all daemons run"),
    }
    for verb in parsers.values():
        verb.add_argument(
            "--state",
            type=Path,
            default=Path("~/.cache/cfmask-slurm"),
            help="state folder, on a local disk (default: %(default)s)",
        )
    parsers["up"].add_argument("--nodes", type=int, default=2, help="number of nodes (default: %(default)s)")
    parsers["up"].add_argument(
        "--cpus-per-node", type=int, default=4, help="CPUs that each node declares (default: %(default)s)"
    )
    parsers["up"].add_argument("--no-install", action="store_true", help="fail if packages are missing")
    options = parser.parse_args(arguments)
    state = options.state.expanduser().resolve()

    try:
        if options.verb == "up" and min(options.nodes, options.cpus_per_node) < 1:
            raise Refused("--nodes and --cpus-per-node must be at least 1.")
        if any(character.isspace() or character in "#%=\\," for character in str(state)):
            raise Refused(f"{state}: Slurm does not accept blanks and #%=\\, in the path of its state folder.")
        become_root(arguments, state)
        if options.verb == "up":
            # Only one `up` at a time installs packages: apt's locks would make the second one fail, and programs exist
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
