"""The configuration of a cluster: Slurm's files in the state folder, and the record of the daemons."""

from __future__ import annotations

import ctypes
import json
import random
import socket
import subprocess
from pathlib import Path

from processes import MARK
from programs import PATH, Failed, slurm_version

NODE_MEMORY_MB = 65536  # as declared to Slurm: --mem is accepted up to this, and not enforced
# MariaDB need not survive a power cut, which saves seconds; "loose": versions without the option ignore it.
NO_SYNC = "--loose-debug-no-sync"
DATABASE = "slurm_acct_db"
CHANGED_IN = (24, 5)  # earlier versions reject CgroupPlugin=disabled and MANY_REQUEUES, and do not need them
MANY_REQUEUES = """\
# A preemption within the grace time counts, and after 5, the default, the job is held.
MaxBatchRequeue=1000000"""
CLONE_NEWUTS = 0x04000000  # linux/sched.h


def write_configuration(state: Path, nodes: int, cpus_per_node: int) -> dict:
    """Write slurm.conf, daemons.conf and slurmdbd.conf with free ports. Returns the record of the daemons."""
    loopback_only, version = can_name_host(), slurm_version()
    controller_port, database_port, *node_ports = free_ports(2 + nodes)
    names = [f"n{k}" for k in range(1, nodes + 1)]
    node_lines = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
        f" CPUs={cpus_per_node} RealMemory={NODE_MEMORY_MB} State=UNKNOWN"
        for name, port in zip(names, node_ports, strict=True)
    )
    requeues = MANY_REQUEUES if version >= CHANGED_IN else ""
    user_conf = _user_conf(state, controller_port, database_port, ",".join(names), node_lines, requeues)
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
    # With NoInAddrAny, a daemon listens on the address of its host name only, which is "localhost" for daemons (see
    # name_host_localhost). A user's srun sees the machine's name, so this is not in the users' slurm.conf.
    daemons_conf = f"""\
# Written by slurm/cluster.py.
Include {state}/slurm.conf
{"CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if loopback_only else ""}
DebugFlags=NO_CONF_HASH
"""
    (state / "slurm.conf").write_text(user_conf)
    (state / "daemons.conf").write_text(daemons_conf)
    if version >= CHANGED_IN:
        (state / "cgroup.conf").write_text("# Written by slurm/cluster.py.\nCgroupPlugin=disabled\n")
    database_file = state / "slurmdbd.conf"
    database_file.touch(mode=0o600)  # slurmdbd requires it
    database_file.write_text(database_conf)

    commands = _commands(state, names)
    record = {
        "nodes": nodes,
        "cpus_per_node": cpus_per_node,
        "database_port": database_port,
        "loopback_only": loopback_only,
        "daemons": {name: {"command": command, "pid": None} for name, command in commands.items()},
    }
    write_record(state, record)
    return record


def _user_conf(state: Path, port: int, database_port: int, names: str, node_lines: str, requeues: str) -> str:
    """slurm.conf."""
    return f"""\
# Written by slurm/cluster.py.
ClusterName=cfmask
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
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
{requeues}

{node_lines}
PartitionName=low Nodes={names} Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=abrupt Nodes={names} PriorityTier=1 GraceTime=0 MaxTime=INFINITE State=UP
PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def _commands(state: Path, names: list[str]) -> dict[str, list[str]]:
    """The command lines of the daemons, by name."""
    conf = f"{state}/daemons.conf"
    munge = f"{state}/munge"
    return {
        "munged": [
            *("munged", "--foreground", "--force", f"--socket={munge}/munge.socket", f"--key-file={munge}/munge.key"),
            *(f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={log_path(state, 'munged')}"),
        ],
        "mariadbd": [
            *(
                "mariadbd",
                "--no-defaults",
                "--user=root",
                f"--datadir={state}/mysql",
                f"--tmpdir={state}",
                "--skip-networking",
            ),
            *(f"--socket={state}/mysql/socket", f"--pid-file={state}/mysql/pid"),
            *("--innodb-buffer-pool-size=128M", "--innodb-lock-wait-timeout=900", NO_SYNC),
            # On by default since MariaDB 11.6: slurmdbd's transactions would fail if another one has changed a row.
            "--loose-innodb-snapshot-isolation=OFF",
        ],
        "slurmdbd": ["slurmdbd", "-D"],
        "slurmctld": ["slurmctld", "-D", "-f", conf],
        **{f"slurmd-{name}": ["slurmd", "-D", "-N", name, "-f", conf] for name in names},
    }


def free_ports(count: int) -> list[int]:
    """Returns free TCP ports below the range of outgoing connections, in random order: they are not reserved, and two
    clusters that start at the same time must not choose the same ones."""
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
    """Returns the content of cluster.json; None if no cluster was started."""
    try:
        return json.loads((state / "cluster.json").read_text())
    except FileNotFoundError:
        return None


def write_record(state: Path, record: dict) -> None:
    aside = state / "cluster.json.part"
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(state / "cluster.json")


def environment(state: Path) -> dict[str, str]:
    """Returns the environment of a daemon, without the caller's virtual environment and locale."""
    return {
        "PATH": PATH,
        "HOME": "/root",
        "LC_ALL": "C",
        "SLURM_CONF": f"{state}/slurm.conf",
        "MYSQL_UNIX_PORT": f"{state}/mysql/socket",
        MARK: str(state),
    }


def name_host_localhost() -> None:
    """Give this process and its children the host name "localhost"; to be called in a new process.

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


def log_path(state: Path, name: str) -> Path:
    return state / "log" / name


def log_tail(state: Path, name: str, lines: int = 15) -> str:
    path = log_path(state, name)
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(["", f"{path}:", *text.splitlines()[-lines:]])
