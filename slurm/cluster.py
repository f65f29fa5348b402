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
import ctypes
import fcntl
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "munge")
PROGRAMS = (
    *("slurmctld", "slurmd", "slurmdbd", "srun", "sbatch", "sacct", "munged"),
    *("mariadbd", "mariadb-install-db", "my_print_defaults"),
)
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"))
MARK = "CFMASK_SLURM_STATE"  # in the environment of every daemon: tells ours from those of the machine
NODE_MEMORY_MB = 65536  # declared, not counted: --mem is accepted up to this and not enforced
# MariaDB need not survive a power cut, which saves seconds; "loose": a version without the option starts all the same.
NO_SYNC = "--loose-debug-no-sync"
DATABASE = "slurm_acct_db"
NO_CGROUPS_SINCE = (24, 5)  # before, slurmd does not know CgroupPlugin=disabled, and does not insist on cgroups
CLONE_NEWUTS = 0x04000000  # linux/sched.h
POLL = 0.2


class Refused(Exception):
    """Nothing was done, for the reason given; exit code 2."""


class Failed(Exception):
    """Something that should have worked did not; exit code 1."""


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


# -------------------------------------------------------------------------------------------------------- configuration


def write_configuration(state: Path, nodes: int, cpus_per_node: int) -> dict:
    """Write slurm.conf, daemons.conf and slurmdbd.conf with free ports; return the record of what is to run."""
    loopback_only = can_name_host()
    controller_port, database_port, *node_ports = free_ports(2 + nodes)
    names = [f"n{k}" for k in range(1, nodes + 1)]
    node_lines = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
        f" CPUs={cpus_per_node} RealMemory={NODE_MEMORY_MB} State=UNKNOWN"
        for name, port in zip(names, node_ports, strict=True)
    )
    user_conf = f"""\
# Written by slurm/cluster.py.
ClusterName=cfmask
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge/munge.socket
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/controller/pid
SlurmdPidFile={state}/spool/%n/pid
SlurmctldLogFile={state}/log/slurmctld
SlurmdLogFile={state}/log/slurmd-%n
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database_port}
AccountingStoragePass={state}/munge/munge.socket
JobAcctGatherType=jobacct_gather/none

# Several nodes on one host: sizes as declared below, processes followed by parentage (no cgroups, no root file system).
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2

# Reacts in about a second, and gives up on a dead node in half a minute.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
KillWait=5
SlurmdTimeout=30

# A job in `high` preempts jobs in `low`: their own --signal first, TERM and KILL after GraceTime, then requeued; and in
# `abrupt`: TERM, and KILL after KillWait.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1

{node_lines}
PartitionName=low Nodes={",".join(names)} Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=abrupt Nodes={",".join(names)} PriorityTier=1 GraceTime=0 MaxTime=INFINITE State=UP
PartitionName=high Nodes={",".join(names)} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
    database_conf = f"""\
# Written by slurm/cluster.py.
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={database_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge/munge.socket
PidFile={state}/log/slurmdbd.pid
LogFile={state}/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc={DATABASE}
{"CommunicationParameters=NoInAddrAny" if loopback_only else ""}
"""
    # Told not to listen on every interface, a daemon listens on the address of its host name, which we can make
    # "localhost" for it (see start()). A user's srun keeps the machine's name, so this is not for their slurm.conf.
    daemons_conf = f"""\
# Written by slurm/cluster.py.
Include {state}/slurm.conf
{"CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if loopback_only else ""}
DebugFlags=NO_CONF_HASH
"""
    (state / "slurm.conf").write_text(user_conf)
    (state / "daemons.conf").write_text(daemons_conf)
    if slurm_version() >= NO_CGROUPS_SINCE:
        (state / "cgroup.conf").write_text("# Written by slurm/cluster.py.\nCgroupPlugin=disabled\n")
    database_file = state / "slurmdbd.conf"
    database_file.touch(mode=0o600)  # slurmdbd insists
    database_file.write_text(database_conf)

    conf = f"{state}/daemons.conf"
    munge = f"{state}/munge"
    commands = {
        "munged": [
            *("munged", "--foreground", "--force", f"--socket={munge}/munge.socket", f"--key-file={munge}/munge.key"),
            *(f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={log_path(state, 'munged')}"),
        ],
        "mariadbd": [
            *("mariadbd", "--no-defaults", "--user=root", f"--datadir={state}/mysql", "--skip-networking"),
            *(f"--socket={state}/mysql/socket", f"--pid-file={state}/mysql/pid"),
            *("--innodb-buffer-pool-size=128M", "--innodb-lock-wait-timeout=900", NO_SYNC),
            # On by default since MariaDB 11.6: rows that another transaction has changed end slurmdbd's with an error.
            "--loose-innodb-snapshot-isolation=OFF",
        ],
        "slurmdbd": ["slurmdbd", "-D"],
        "slurmctld": ["slurmctld", "-D", "-f", conf],
        **{f"slurmd-{name}": ["slurmd", "-D", "-N", name, "-f", conf] for name in names},
    }
    record = {
        "nodes": nodes,
        "cpus_per_node": cpus_per_node,
        "database_port": database_port,
        "loopback_only": loopback_only,
        "daemons": {name: {"command": command, "pid": None} for name, command in commands.items()},
    }
    write_record(state, record)
    return record


def slurm_version() -> tuple[int, int]:
    """Return (22, 5) for Slurm 22.05.8.

    Raises:
        Failed: slurmd does not say.
    """
    done = subprocess.run([shutil.which("slurmd", path=PATH) or "slurmd", "-V"], capture_output=True, text=True)
    found = re.search(r"(\d+)\.(\d+)", done.stdout)
    if found is None:
        raise Failed(f"`slurmd -V` does not tell Slurm's version: {(done.stdout + done.stderr).strip()!r}")
    return int(found[1]), int(found[2])


def free_ports(count: int) -> list[int]:
    """Return free TCP ports below the range the kernel hands to outgoing connections.

    They are probed, not held. From a random place on, so that two clusters that start at once do not meet.
    """
    low, high = 10000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(low, high)) if high - low > 1000 else list(range(low, 60000))
    random.SystemRandom().shuffle(candidates)
    ports: list[int] = []
    for port in candidates:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise Failed(f"no {count} free TCP ports on this machine")


def read_record(state: Path) -> dict | None:
    """Return what cluster.json says, or None where no cluster has been started."""
    try:
        return json.loads((state / "cluster.json").read_text())
    except FileNotFoundError:
        return None


def write_record(state: Path, record: dict) -> None:
    aside = state / "cluster.json.part"
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(state / "cluster.json")


# -------------------------------------------------------------------------------------------------------------- daemons


def environment(state: Path) -> dict[str, str]:
    """Return what a daemon sees: nothing of the caller's virtual environment or locale reaches it."""
    return {
        "PATH": PATH,
        "HOME": "/root",
        "LC_ALL": "C",
        "SLURM_CONF": f"{state}/slurm.conf",
        "MYSQL_UNIX_PORT": f"{state}/mysql/socket",
        MARK: str(state),
    }


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


def name_host_localhost() -> None:
    """In a new process before it runs: give it "localhost" as host name, seen by it and its children alone.

    Raises:
        OSError: the kernel does not allow it (a container without SYS_ADMIN).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUTS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname("localhost")


def can_name_host() -> bool:
    try:
        return subprocess.run(["true"], preexec_fn=name_host_localhost).returncode == 0
    except subprocess.SubprocessError:
        return False


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


def log_path(state: Path, name: str) -> Path:
    return state / "log" / name


def log_tail(state: Path, name: str, lines: int = 15) -> str:
    path = log_path(state, name)
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(["", f"{path}:", *text.splitlines()[-lines:]])


# ------------------------------------------------------------------------------------------------------------- stopping


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


def end(pids: Iterable[int | None], patience: float) -> None:
    """Send TERM to these processes, and KILL to those that are left after `patience` seconds."""
    mine = {(pid, start) for pid in pids if pid is not None and (start := start_time(pid))}
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        for pid, _ in mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + wait
        while mine and time.monotonic() < deadline:
            time.sleep(POLL / 2)
            mine = {(pid, start) for pid, start in mine if start_time(pid) == start}


def processes() -> Iterator[int]:
    """Yield the ids of the processes of this machine, without this one."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            yield int(entry)


def stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (the state) on; none if the process is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [] if fields[0] in "ZX" else fields


def start_time(pid: int) -> str:
    """Return when a process began (clock ticks since boot), which tells it from a later one of the same id; "" if it is
    gone."""
    fields = stat(pid)
    return fields[19] if fields else ""


def runs(state: Path, pid: int | None) -> bool:
    return pid is not None and belongs(state, pid)


def family(state: Path) -> set[int]:
    """Return the daemons of this cluster, the processes of its jobs, and whatever these have started."""
    parents = {pid: int(fields[1]) for pid in processes() if (fields := stat(pid))}
    found = {pid for pid in parents if belongs(state, pid)}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def belongs(state: Path, pid: int) -> bool:
    """Whether a process is a daemon of this cluster or runs in one of its jobs, by what it shows of itself."""
    process = Path(f"/proc/{pid}")
    try:
        # A process that has ended and waits to be reaped shows no environment.
        variables = (process / "environ").read_bytes().split(b"\0")
        if f"{MARK}={state}".encode() in variables:
            return True
        # slurmstepd writes its title over its environment. It stays where slurmd was started.
        if (process / "comm").read_text().startswith("slurm") and Path(os.readlink(process / "cwd")) == state:
            return True
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    in_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
    return in_job and any(variable.startswith(f"SLURM_CONF={state}/".encode()) for variable in variables)


def munged_runs() -> bool:
    names = []
    for pid in processes():
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/{pid}/comm").read_text().strip())
    return "munged" in names


# -------------------------------------------------------------------------------------------------- packages and rights


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def install() -> None:
    """Install the Debian packages.

    Raises:
        Refused: no apt-get, or it failed.
    """
    if shutil.which("apt-get", path=PATH) is None:
        raise Refused("Slurm is not installed, and without apt-get (Debian, Ubuntu) it cannot be installed from here.")
    print(f"installing {' '.join(PACKAGES)} and MariaDB with apt-get ...", file=sys.stderr)
    had_munged = munged_runs()

    def apt(*arguments: str) -> str:
        command = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", *arguments]
        settings = os.environ | {"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
        done = subprocess.run(command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise Refused(f"Slurm is not installed, and `{' '.join(command)}` failed: {' '.join(last)}")
        return done.stdout

    apt("update")
    # MariaDB's programs without its service; older releases have the version in the package's name.
    pattern = r"^mariadb-(server|client)-core(-[0-9.]+)?$"
    search = ["apt-cache", "--names-only", "search", pattern]
    found = [line.split()[0] for line in subprocess.run(search, capture_output=True, text=True).stdout.splitlines()]
    cores = [min((name for name in found if kind in name), key=len, default=None) for kind in ("server", "client")]
    database = [name for name in cores if name] or ["mariadb-server"]
    apt("install", "-y", "--no-install-recommends", *PACKAGES, *database)
    if not had_munged and munged_runs():
        # The package starts the machine's munged at once; ours is private, so leave the machine as it was.
        subprocess.run(["service", "munge", "stop"], stdin=subprocess.DEVNULL, capture_output=True)
    if missing := missing_programs():
        raise Refused(f"the packages are installed, but these programs are still missing: {', '.join(missing)}.")


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
def locked(state: Path) -> Iterator[None]:
    """Hold the folder for this process: a second `up` or `down` waits for the first."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock:
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
