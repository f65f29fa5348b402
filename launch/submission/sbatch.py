"""The sbatch file of a job, and the executors that submit it: to Slurm, or to this machine.

#SBATCH …                 the allocation
logged()                  a function for the script's own lines in the log
(                         a subshell, so that nothing in the cluster file's setup (set -e, exit, a trap, exec) can skip
                          the last lines
  exit if done            in a job of a chain
  setup                   of the cluster file
  . JOBS/environment.sh   [environment] of the cluster file; mode 600, because it may contain tokens
  srun … start.py         the ranks
)
why it ended              the failure report of the rank that died first, and a requeue if the job needs one
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.runtime.files import write_atomically
from launch.allocation import gpus
from launch.allocation.resolve import Allocation
from launch.restarts.batch_script_end import LOGGED, batch_script_end
from launch.restarts.chain import VARIABLE as CHAIN
from launch.slurm.client import ignored_options

if TYPE_CHECKING:
    import submitit

    from launch.ranks.local import LocalExecutor
    from launch.slurm.executor import SlurmExecutor

logger = logging.getLogger(__name__)

NOTICE_S = 120
"""Slurm sends USR2 this many seconds before the time limit, or a tenth of the limit if that is less. The signal may
come half a minute earlier, because Slurm checks at intervals."""
ENVIRONMENT = "environment.sh"
"""File in a job's folder jobs/."""
NO_LIMIT_MIN = 525_600
"""A year: the time limit if there is none and a number is required."""
_ALL_MEMBERS = 1_000_000_000
"""Array parallelism without a limit."""
_RANKS_ENDED_WELL = 99
"""Exit code of the subshell if all ranks exited with 0. A setup that exits with 0 makes the subshell exit with 0."""


def slurm_parameters(allocation: Allocation, name: str, jobs: str) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor.

    Args:
        jobs: The run's folder jobs/, quoted for the shell.
    """
    a = allocation
    sbatch = {name.replace("_", "-"): value for name, value in a.sbatch.items()}
    if a.wckey is not None:
        sbatch.pop("wckey", None)  # cluster files may have it under [sbatch]; the flag and the key override it
    container = [f"--container-image={a.image}"] if a.image else []
    container += [f"--container-mounts={','.join(a.mounts)}"] if a.mounts else []
    optional = {
        name: getattr(a, name)
        for name in ("partition", "account", "qos", "wckey", "constraint", "exclude", "dependency")
    } | {"mem": a.memory}
    return {
        "job_name": name,
        "nodes": a.nodes,
        "ntasks_per_node": a.tasks_per_node,
        "cpus_per_task": a.cpus_per_task,
        # submitit computes with this number and always writes a limit; additional_parameters has the effective one.
        "time": a.time_min or NO_LIMIT_MIN,
        "signal_delay_s": NOTICE_S if a.time_min is None else min(NOTICE_S, 6 * a.time_min),
        "stderr_to_stdout": True,
        "array_parallelism": a.array_parallelism or _ALL_MEMBERS,  # submitit's default is 256
        "srun_args": [
            f"--cpus-per-task={a.cpus_per_task}",  # srun does not inherit it from sbatch
            "--kill-on-bad-exit=1",  # the death of a rank ends the job
            "--wait=0",  # the end of a rank does not, whatever the site's WaitTime: rank 0 may still write results
            # By default srun takes TYPE:1 from the job, which Slurm 22.05 does not bind to tasks.
            *(["--gpus-per-task=1"] if a.gpus_from == "gpus_per_task" else []),
            *container,
            *a.srun_args,
        ],
        "additional_parameters": {"requeue": True, "time": a.time, **sbatch, **_gpu_request(a, sbatch.get("gres"))},
        # "" because the last line of a setup may end with a backslash
        "setup": [LOGGED, "(", *_exit_if_done(a, jobs), *a.setup, "", *_before_ranks(a, jobs)],
        "teardown": [*_AFTER_RANKS, ")", *_END, *batch_script_end(f"{jobs}/failures")],
        **{name: value for name, value in optional.items() if value is not None},
    }


def _gpu_request(allocation: Allocation, other_gres: str | None) -> dict[str, Any]:
    """Options of sbatch.

    Args:
        other_gres: Resources other than GPUs, from [sbatch].
    """
    way, number = allocation.gpus_from, allocation.gpus_per_node
    kind = f"{allocation.gpu_type}:" if allocation.gpu_type else ""
    if way == "exclusive":
        return {"exclusive": True}
    if not number:
        return {}
    if way == "gres":
        return {"gres": ",".join(filter(None, [f"gpu:{kind}{number}", other_gres]))}
    return {way.replace("_", "-"): f"{kind}{1 if way == 'gpus_per_task' else number}"}


def _exit_if_done(allocation: Allocation, jobs: str) -> list[str]:
    """A job of a chain whose run is finished or cancelled ends here, in a second and on one node; its ranks would find
    out only after all of them had imported torch."""
    if allocation.chain is None:
        return []
    lines = []
    for mark, what in (("results.json", "finished"), ("cancelled.json", "cancelled")):
        lines.append(f"if [ -e {jobs}/../{mark} ]; then")
        lines += [f'    echo "not started: the run is {what}" | logged INFO', f"    exit {_RANKS_ENDED_WELL}", "fi"]
    return lines


def _before_ranks(allocation: Allocation, jobs: str) -> list[str]:
    """First reset the setup's shell options: they are not meant for these lines, and -x would print what is
    exported."""
    lines = ["{ set +efnuvx; set +o pipefail; } 2>/dev/null"]
    if allocation.gpus_from == "exclusive" and allocation.gpus_per_node:
        # If Slurm manages the GPUs, the job has all of them, and a step only those that it requests.
        lines.append(f'if [ -n "$SLURM_GPUS_ON_NODE" ]; then export SLURM_GRES=gpu:{allocation.gpus_per_node}; fi')
    if allocation.chain is not None:
        lines.append(f"export {CHAIN}={','.join(allocation.chain)}")
    if allocation.environment:
        lines.append(f". {jobs}/{ENVIRONMENT} || exit 1")
    return lines


_AFTER_RANKS = ("status=$?", f'if [ "$status" -eq 0 ]; then exit {_RANKS_ENDED_WELL}; fi', 'exit "$status"')
_END = (
    "status=$?",
    'if [ "$status" -eq 0 ]; then',
    '    echo "setup in the cluster file ended the batch script with exit 0 before the ranks started" | logged ERROR',
    "    status=1",
    f'elif [ "$status" -eq {_RANKS_ENDED_WELL} ]; then',
    "    status=0",
    "fi",
)


def job_name(root: Path, others: int = 0) -> str:
    """The name of a job in squeue, which begins with that of the run folder: squeue shows its first characters. Names
    of arrays say how many ``others`` there are.

    Only characters that Slurm and the shell leave alone are kept; accounting databases have room for 255 bytes.
    """
    name = re.sub(r"[^\w.+=@,-]+", "-", root.name, flags=re.ASCII)[:100].strip("-") or "cfmask"
    return f"{name}+{others}" if others else name


def name_member(link: str) -> str:
    """A line of an array's batch script with which a member gets the name of its run when it starts. It neither waits
    for Slurm nor fails with it.

    Args:
        link: Link to the run folder, quoted for the shell.
    """
    name, member = f'"$(basename "$(readlink {link})")"', "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    return f"timeout 60 scontrol update JobId={member} JobName={name} >/dev/null 2>&1 &"


# --- environment and command of a rank --------------------------------------------------------------------------------


def write_environment(allocation: Allocation, jobs: Path) -> None:
    """Write the file from which the batch script takes [environment]; only its owner can read it."""
    if allocation.environment:
        lines = (f"export {name}={_double_quoted(value)}\n" for name, value in allocation.environment.items())
        write_atomically(jobs / ENVIRONMENT, "".join(lines), private=True)


def set_environment(allocation: Allocation) -> None:
    """Set [environment] for ranks that are child processes of this one, or this process itself."""
    for name, value in allocation.environment.items():
        os.environ[name] = os.path.expandvars(value)


def _double_quoted(value: str) -> str:
    """Quoted for the shell, so that $NAME and ${NAME} are expanded on the node, and nothing else is."""
    return '"' + re.sub(r'([\\"`]|\$(?![A-Za-z_]|\{[A-Za-z_]\w*\}))', r"\\\1", value) + '"'


def rank_command(python: str, code: str) -> str:
    """The command that starts a rank, as submitit's ``python``: start.py of the job's copy of the code. This code is
    first on PYTHONPATH.

    A signal in the first second, before Python has installed a handler, would end the rank and with it the job. The
    shell ignores these signals, and Python inherits that. There is nothing to save yet.

    Args:
        python: Shell command that starts Python.
        code: Folder of the code, quoted for the shell.
    """
    ignore, path = 'trap "" USR2 TERM', 'export PYTHONPATH="$0${PYTHONPATH:+:$PYTHONPATH}"'
    return f"""sh -c '{ignore}; {path}; exec "$@"' {code} {python} -u {code}/launch/ranks/start.py"""


# --- executors --------------------------------------------------------------------------------------------------------


def slurm_executor(
    folder: Path, name: str, run: str, digest: str, allocation: Allocation, *, logs: str | None = None
) -> SlurmExecutor:
    """The executor for jobs on Slurm.

    Args:
        folder: Gets submitit's files.
        name: Name of the job.
        run: Folder with the job's code/ and jobs/, quoted for the shell.
        digest: The snapshot in code/ that the job runs.
        logs: For members of an array, whose ``run`` is a link: beginning of the logs' paths, with sbatch's patterns.
    """
    from launch.slurm.executor import SlurmExecutor

    parameters = slurm_parameters(allocation, name, f"{run}/jobs")
    if logs:
        parameters["srun_args"].append(f"--output={logs}_%t_log.out")
        parameters["additional_parameters"]["output"] = f"{logs}_0_log.out"
        parameters["setup"].insert(0, name_member(run))
    python = rank_command(allocation.python, f"{run}/code/{digest}")
    executor = SlurmExecutor(folder, max_num_timeout=1000, python=python)
    executor.update_parameters(**parameters)
    return executor


def local_executor(
    folder: Path, code: Path, allocation: Allocation, *, timeout_min: int, followed: bool = True
) -> LocalExecutor:
    """The executor for jobs on this machine.

    Args:
        folder: Gets submitit's files.
        code: Snapshot of the code that the jobs run.
        followed: End the jobs when this process ends.
    """
    from launch.ranks.local import LocalExecutor

    python = rank_command(allocation.python, shlex.quote(str(code)))
    # submitit would take the machine's first GPUs instead of those that CUDA_VISIBLE_DEVICES shows here.
    shown = shlex.join(gpus.for_ranks(allocation.visible_gpus))
    executor = LocalExecutor(folder, python=f"{shown} {python}" if shown else python, followed=followed)
    executor.update_parameters(
        tasks_per_node=allocation.tasks_per_node,
        gpus_per_node=allocation.gpus_per_node,
        timeout_min=timeout_min,
        stderr_to_stdout=True,
    )
    return executor


def send(executor: SlurmExecutor, work: Sequence[Callable[[], Any]]) -> list[submitit.Job[Any]]:
    """Submit a job, or an array of several, with one sbatch. Ctrl-C waits until sbatch has answered.

    Raises:
        SlurmError: Slurm refuses it.
    """
    _report_ignored_options()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit_array(work)
    finally:
        signal.signal(signal.SIGINT, before)


@functools.cache
def _report_ignored_options() -> None:
    """Once for each command, which may submit many jobs."""
    if ignored := ignored_options():
        logger.warning(
            f"{', '.join(ignored)} in the environment: ignored. Flags and the cluster file describe what a job gets."
        )
