"""What a job is given: settings that are flags of submit.py and keys of the cluster file alike, and how they add up.

A setting comes from its flag; else, where a run is resumed, from what it got last; else from the cluster file; else it
has its default. None of this changes what is trained.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from launch.jobs.cluster_file import COUNT, NUMBER, TEXT, TEXT_OR_COUNT, ClusterFile
from launch.jobs.gpus import VISIBLE, first_visible, installed_gpus, visible_gpus

NOTICE_S = 120
"""How long before the time limit Slurm sends USR2, where that is not more than a tenth of it. It may be half a minute
earlier: Slurm looks that often."""
REQUEUE_ME = 144
"""The exit code of a rank that asks for a requeue, where it cannot do so itself (a container without scontrol): of the
batch script on Slurm, of submitit's local executor here, whose own number it is."""


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A flag, and a key of the cluster file. read: makes the value of the text, or says in a ValueError what it should
    be. kind: what it may be in the file; None: it cannot stand there. slurm: it does something on Slurm only."""

    name: str
    read: Callable[[str], Any]
    default: Any
    help: str
    metavar: str | None = None
    kind: tuple[str, tuple[type, ...]] | None = TEXT
    slurm: bool = True

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ValueError("a whole number, 1 or more")
    return int(text)


def minutes(text: str) -> int:
    """A time limit in Slurm's own forms: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Seconds count as a minute."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError("minutes, or Slurm's H:MM:SS or D-HH:MM:SS")
    days, *parts = (int(part) if part else None for part in match.groups())
    given = [part for part in parts if part is not None]
    if days is None and len(given) < 3:  # M or M:S
        given = [0, *given]
    hours, mins, seconds = (given + [0, 0])[:3]
    total = (days or 0) * 1440 + hours * 60 + mins + (seconds > 0)
    if total < 1:
        raise ValueError("more than nothing")
    return total


def gpus(text: str) -> tuple[str, int]:
    """Slurm's [TYPE:]N: the type, "" if any will do, and the number."""
    match = re.fullmatch(r"(?:([A-Za-z][\w.-]*):)?(\d+)", text)
    if not match:
        raise ValueError("a number, or TYPE:NUMBER as in a100:8")
    return match[1] or "", int(match[2])


def patience(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ValueError("a number of minutes, above 0")
    return value


def text(value: str) -> str:
    if not value or re.search(r"[\s\"'\\]", value):
        raise ValueError("a word")
    return value


SETTINGS = (
    Setting("nodes", count, 1, "machines (default: 1)", "N", COUNT),
    Setting(
        "gpus_per_node",
        gpus,
        None,
        "GPUs of a machine, one task each (default: 8 on Slurm, else those of this machine that CUDA_VISIBLE_DEVICES "
        "shows)",
        "[TYPE:]N",
        TEXT_OR_COUNT,
        slurm=False,
    ),
    Setting(
        "tasks_per_node", count, None, "ranks of a machine that trains on CPUs (default: 1)", "N", COUNT, slurm=False
    ),
    Setting("cpus_per_task", count, 8, "cores of a rank, for its threads and its data loader (default: 8)", "N", COUNT),
    Setting(
        "time",
        minutes,
        1440,
        "time limit: minutes, or Slurm's H:MM:SS, D-HH:MM:SS; a run requeues itself before it (default: 1440)",
        "MIN",
        kind=TEXT_OR_COUNT,
    ),
    Setting("partition", text, None, "Slurm partition", "NAME"),
    Setting("account", text, None, "Slurm account", "NAME"),
    Setting("qos", text, None, "Slurm quality of service", "NAME"),
    Setting("constraint", text, None, "features that nodes must have", "LIST"),
    Setting(
        "memory",
        text,
        None,
        "memory of a node, as for sbatch's --mem: 480G; 0 is all of it",
        "SIZE",
        kind=TEXT_OR_COUNT,
    ),
    Setting("exclude", text, None, "nodes to stay away from: n07,n[11-14]", "NODES"),
    Setting("dependency", text, None, "what to wait for, as for sbatch: afterany:123,singleton", "LIST", None),
    Setting("array_parallelism", count, None, "members of a sweep that may run at once (default: all)", "N", COUNT),
    Setting(
        "interface", text, None, "network interface that ranks talk on (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)", "NAME"
    ),
    Setting(
        "rendezvous_timeout",
        patience,
        None,
        "how long ranks wait for each other before they train (default: 30)",
        "MIN",
        NUMBER,
        slurm=False,
    ),
    Setting(
        "collective_timeout",
        patience,
        None,
        "how long ranks wait for each other in a step before the job is given up (default: 30)",
        "MIN",
        NUMBER,
        slurm=False,
    ),
)

DEFAULTS = {setting.name: setting.default for setting in SETTINGS}
FILE_KEYS = {setting.name: setting.kind for setting in SETTINGS if setting.kind is not None}


def add_allocation_arguments(parser: argparse.ArgumentParser, *, here: bool = False) -> None:
    """here: the work may be done in this process, and is, unless one of these flags is given."""
    g = parser.add_argument_group("allocation", "Where the job runs. Changes nothing about what comes of it.")
    if here:
        executors: tuple[str, ...] = ("here", "auto", "slurm", "local")
        said = "here: this process; auto: slurm if srun is there, else local (default: here, and auto with --nodes or "
        said += "any other of these flags)"
    else:
        executors = ("auto", "slurm", "local", "debug")
        said = "auto: slurm if srun is there, else local; debug: one rank in this process (default: auto)"
    g.add_argument("--executor", choices=executors, default=executors[0], help=said)
    g.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="cluster file with values for these flags, and more ($CFMASK_CLUSTER, else ./cluster.toml, else "
        "~/.config/cfmask/cluster.toml; template: slurm/cluster.toml)",
    )
    for setting in SETTINGS:
        g.add_argument(
            setting.flag,
            type=_argument(setting),
            metavar=setting.metavar,
            default=None,
            help=setting.help.replace("%", "%%"),
        )
    g.add_argument(
        "--after", nargs="+", type=_job_id, metavar="JOB", help="start when these jobs have ended well (afterok)"
    )


def given_flags(arguments: argparse.Namespace) -> list[str]:
    """Flags of an allocation that the command line has."""
    given = [setting.flag for setting in SETTINGS if getattr(arguments, setting.name) is not None]
    return given + [f"--{name}" for name in ("after", "cluster") if getattr(arguments, name)]


def _argument(setting: Setting) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        try:
            return setting.read(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{word!r} is not {error}") from None

    return read


def _job_id(word: str) -> str:
    if not re.fullmatch(r"\d+(_\d+)?", word):
        raise argparse.ArgumentTypeError(f"{word!r} is not the number of a job")
    return word


# --- the allocation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allocation:
    """What a job is given, nothing left open. tasks_per_node: one per GPU; on machines without GPUs as many as asked
    for. mounts: of the container, if there is an image. again: values of settings that the run gets again when it is
    resumed, unless flags say otherwise: what flags said, and how many ranks there were. visible_gpus: of this machine,
    one for each local rank, as entries for CUDA_VISIBLE_DEVICES."""

    executor: str
    nodes: int
    gpus_per_node: int
    gpu_type: str
    tasks_per_node: int
    cpus_per_task: int
    time_min: int
    again: Mapping[str, Any] = field(default_factory=dict)
    visible_gpus: tuple[str, ...] = ()
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    array_parallelism: int | None = None
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    srun_args: tuple[str, ...] = ()
    python: str = ""
    image: str | None = None
    mounts: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def on_slurm(self) -> bool:
        return self.executor == "slurm"

    def __str__(self) -> str:
        kind = "GPU" if self.gpus_per_node else "CPU"
        return f"{self.executor}: {self.nodes} × {self.tasks_per_node} {kind} ranks"


def resolve_allocation(
    arguments: argparse.Namespace, file: ClusterFile, last: Mapping[str, Any] | None = None
) -> Allocation:
    """Add up flags, what a resumed run had last, cluster file and defaults.

    Args:
        last: ``Allocation.again`` of the run's last submission with the same kind of executor.

    Raises:
        UserError: what cannot be allocated, contradicts, or would do nothing.
    """
    executor = choose_executor(arguments)
    flags = {setting.name: getattr(arguments, setting.name) for setting in SETTINGS}
    flags = {name: value for name, value in flags.items() if value is not None}
    if executor != "slurm":
        _refuse_slurm_flags(arguments, flags, executor)
    from_file = _read_file(file) if executor == "slurm" else {}
    layers = (flags, last or {}, from_file)

    def value(name: str) -> Any:
        return next((layer[name] for layer in layers if name in layer), DEFAULTS[name])

    if executor == "slurm":
        # It says which GPUs of a node a job sees; those that are visible here are another matter.
        shown: tuple[str, ...] = ()
        gpu_type, gpus_per_node, tasks_per_node = _ranks(layers, default_gpus=8)
    else:
        installed = installed_gpus()
        visible = visible_gpus(os.environ.get(VISIBLE), installed)
        default_gpus = 0 if installed is None or visible is None else len(visible)
        gpu_type, gpus_per_node, tasks_per_node = _ranks(layers, default_gpus)
        shown = first_visible(gpus_per_node, visible)
    ranks = {"nodes": value("nodes"), "gpus_per_node": (gpu_type, gpus_per_node), "tasks_per_node": tasks_per_node}
    again = {k: v for k, v in {**(last or {}), **flags}.items() if k not in ("dependency", "array_parallelism")}
    if executor == "debug" and tasks_per_node > 1:
        raise UserError("--executor debug is one rank in this process. Ask for one GPU or task, or use local.")
    if arguments.after and "dependency" in flags:
        raise UserError("--after and --dependency both say what to wait for. Put all of it into --dependency.")
    timeouts = {
        f"CFMASK_{name.upper()}": f"{value(name):g}"
        for name in ("rendezvous_timeout", "collective_timeout")
        if value(name) is not None
    }
    image = file.image if executor == "slurm" else None
    # Exactly this one: NCCL alone would take any interface whose name begins so.
    interface = value("interface")
    networks = {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface} if interface else {}
    return Allocation(
        executor=executor,
        nodes=value("nodes"),
        gpus_per_node=gpus_per_node,
        gpu_type=gpu_type,
        tasks_per_node=tasks_per_node,
        visible_gpus=shown,
        cpus_per_task=value("cpus_per_task"),
        time_min=value("time"),
        again={**again, **ranks},
        partition=value("partition"),
        account=value("account"),
        qos=value("qos"),
        constraint=value("constraint"),
        memory=value("memory"),
        exclude=value("exclude"),
        dependency="afterok:" + ":".join(arguments.after) if arguments.after else value("dependency"),
        array_parallelism=value("array_parallelism"),
        setup=tuple(from_file.get("setup", ())),
        environment={**timeouts, **networks, **file.environment},
        srun_args=tuple(from_file.get("srun_args", ())),
        python=from_file.get("python") or ("python3" if image else shlex.quote(sys.executable)),
        image=image,
        mounts=file.mounts if executor == "slurm" else (),
        sbatch=file.sbatch if executor == "slurm" else {},
    )


def choose_executor(arguments: argparse.Namespace) -> str:
    """Raises UserError if it is slurm and there is none."""
    if arguments.executor == "auto":
        return "slurm" if shutil.which("srun") else "local"
    if arguments.executor == "slurm" and not shutil.which("sbatch"):
        raise UserError("There is no sbatch on this machine. Run this on a login node, or use --executor local.")
    return str(arguments.executor)


def _refuse_slurm_flags(arguments: argparse.Namespace, flags: Mapping[str, Any], executor: str) -> None:
    why = f"--executor is {executor}" + (" (there is no srun here)" if arguments.executor == "auto" else "")
    if flags.get("nodes", 1) != 1:
        raise UserError(
            f"--nodes {flags['nodes']} needs Slurm, and {why}: one machine is all there is here. Run this where srun "
            "is, or leave --nodes out."
        )
    idle = [setting.flag for setting in SETTINGS if setting.slurm and setting.name in flags and setting.name != "nodes"]
    idle += ["--after"] if arguments.after else []
    if idle:
        raise UserError(f"{', '.join(idle)} would do nothing: it is for Slurm, and {why}. Leave it out.")


def _read_file(file: ClusterFile) -> dict[str, Any]:
    """The file's values, read as their flags would be."""
    values = dict(file.values)
    for setting in SETTINGS:
        if setting.name in values:
            try:
                values[setting.name] = setting.read(str(values[setting.name]))
            except ValueError as error:
                given = file.values[setting.name]
                raise UserError(
                    f"The cluster file {file.path}: {setting.name} is {given!r}, which is not {error}."
                ) from None
    return values


def _ranks(layers: Sequence[Mapping[str, Any]], default_gpus: int) -> tuple[str, int, int]:
    """Type and number of a node's GPUs, and its ranks: who says either says both."""
    says = next((s for s in layers if "gpus_per_node" in s or "tasks_per_node" in s), {})
    tasks = says.get("tasks_per_node")
    default = ("", 0 if tasks is not None else default_gpus)
    gpu_type, number = says.get("gpus_per_node", default)
    if tasks is not None and number and tasks != number:
        raise UserError(
            f"--tasks-per-node {tasks} contradicts --gpus-per-node {number}: there is one task for each GPU. Leave "
            "--tasks-per-node out, or give --gpus-per-node 0 to train on CPUs."
        )
    return gpu_type, number, number or tasks or 1


# --- for submitit -----------------------------------------------------------------------------------------------------


def slurm_parameters(allocation: Allocation, name: str, jobs: str) -> dict[str, Any]:
    """What submitit's SlurmExecutor takes.

    Args:
        jobs: the run's jobs/, as a word of the shell.
    """
    a = allocation
    given = {
        "partition": a.partition,
        "account": a.account,
        "qos": a.qos,
        "constraint": a.constraint,
        "mem": a.memory,
        "exclude": a.exclude,
        "dependency": a.dependency,
        "array_parallelism": a.array_parallelism,
        "gpus_per_node": f"{a.gpu_type}:{a.gpus_per_node}" if a.gpu_type else a.gpus_per_node or None,
    }
    container = [f"--container-image={a.image}"] if a.image else []
    container += [f"--container-mounts={','.join(a.mounts)}"] if a.mounts else []
    return {
        "job_name": name,
        "nodes": a.nodes,
        "ntasks_per_node": a.tasks_per_node,
        "cpus_per_task": a.cpus_per_task,
        "time": a.time_min,
        "signal_delay_s": min(NOTICE_S, 6 * a.time_min),
        "stderr_to_stdout": True,
        # srun does not inherit sbatch's --cpus-per-task. One dead rank must end the job; one that has ended well must
        # not (a site's WaitTime), while rank 0 writes the results.
        "srun_args": [
            f"--cpus-per-task={a.cpus_per_task}",
            "--kill-on-bad-exit=1",
            "--wait=0",
            *container,
            *a.srun_args,
        ],
        "additional_parameters": {"requeue": True, **{k.replace("-", "_"): v for k, v in a.sbatch.items()}},
        "setup": [*a.setup, *(f"export {name}={_in_shell(value)}" for name, value in a.environment.items())],
        "teardown": [
            "status=$?",
            # After all that srun has said: why, as the rank that died first has it (last_words.py).
            "attempt=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
            "-${SLURM_RESTART_COUNT:-0}",
            f'words={jobs}/last_words/"$attempt"',
            'if [ "$status" -ne 0 ]; then cat "$words.txt" 2>/dev/null; fi',
            f'if [ "$status" -eq {REQUEUE_ME} ] || [ "$status" -ne 0 -a -e "$words.lost" ]; then',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$status"',
        ],
        **{key: value for key, value in given.items() if value is not None},
    }


def rank_command(python: str, code: str) -> str:
    """What starts a rank, as submitit's ``python``: the code's own start.py.

    A signal that comes in the first second, while Python imports and there is no handler, would end the rank, and with
    it the job; sh ignores it, and passes that on. Nothing is lost by not hearing it: there is nothing to save yet.

    Args:
        python, code: as words of a shell, a command and a folder.
    """
    return f"""sh -c 'trap "" USR2 TERM; exec "$0" "$@"' {python} -u {code}/launch/jobs/start.py"""


def set_environment(allocation: Allocation) -> None:
    """For ranks that are this process's children, or itself."""
    for name, value in allocation.environment.items():
        os.environ[name] = os.path.expandvars(value)


def _in_shell(value: str) -> str:
    """In double quotes, where $NAME and ${NAME} mean what they do on the node."""
    return '"' + re.sub(r'([\\"`]|\$(?![A-Za-z_{]))', r"\\\1", value) + '"'


def uncovered(allocation: Allocation, paths: Sequence[Path]) -> list[Path]:
    """Of the paths, those that no mount brings into the container."""
    if not allocation.image:
        return []
    sources = [Path(mount.partition(":")[0]) for mount in allocation.mounts]
    return [path for path in paths if not any(path == source or source in path.parents for source in sources)]
