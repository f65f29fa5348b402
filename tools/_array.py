"""Do one thing to each of many items in the tasks of a Slurm array.

    run_array(function, items, array, name="verify_shards", progress=bar_update)

Returns the results in the order of the items. ``function`` lives in a module that can be imported (not in a script:
that would be pickled by value), and so do items and results; a UserError that it raises ends the whole.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cfmask.errors import UserError
from cfmask.runtime.pool import ignore, map_in_processes

REPO = Path(__file__).resolve().parents[1]
POLL_S = 2.0
_WARNING_S = 120  # before the time limit

Item = TypeVar("Item")
Result = TypeVar("Result")


# --- in a Slurm array -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Array:
    """tasks: at most. time_min: limit of a task. logs: gets logs and results; nodes must see it. gpus_per_task: 0 for
    work that needs none; else a task has a process a GPU, not a core."""

    tasks: int
    cpus_per_task: int
    time_min: int
    partition: str | None
    account: str | None
    logs: Path
    gpus_per_task: int = 0


_DEFAULTS = {"array": 16, "cpus_per_task": 8, "time": 240, "partition": None, "account": None, "logs": Path("jobs")}


def add_array_arguments(parser: argparse.ArgumentParser, *, gpus: bool = False) -> None:
    """gpus: the work is done on GPUs."""
    g = parser.add_argument_group("as a Slurm array")
    g.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="local: processes of this machine; slurm: a job array, whose end this command waits for (default: local)",
    )
    g.add_argument("--array", type=int, metavar="N", help="tasks; they share the shards out (default: 16)")
    of_task = "cores of a task" if gpus else "cores and processes of a task"
    g.add_argument("--cpus-per-task", type=int, metavar="N", help=f"{of_task} (default: 8)")
    if gpus:
        g.add_argument("--gpus-per-task", type=int, metavar="N", help="GPUs and processes of a task (default: 1)")
    g.add_argument("--time", type=int, metavar="MIN", help="time limit of a task (default: 240)")
    g.add_argument("--partition", metavar="NAME", help="Slurm partition")
    g.add_argument("--account", metavar="NAME", help="Slurm account")
    g.add_argument("--logs", type=Path, metavar="DIR", help="gets logs and results, seen by all nodes (default: jobs)")


def resolve_array(arguments: argparse.Namespace) -> Array | None:
    """What the flags of ``add_array_arguments`` ask for; None for processes of this machine.

    Raises:
        UserError: there is no Slurm here, a number is too small, or a flag would do nothing.
    """
    defaults = _DEFAULTS | ({"gpus_per_task": 1} if hasattr(arguments, "gpus_per_task") else {})
    given = {name: getattr(arguments, name) for name in defaults if getattr(arguments, name) is not None}
    if arguments.executor == "local":
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{flags} without --executor slurm would do nothing: add it, or leave them out.")
        return None
    if not shutil.which("sbatch"):
        raise UserError("There is no sbatch on this machine. Run this on a login node, or leave --executor slurm out.")
    value: dict[str, Any] = {**defaults, **given}
    for name in ("array", "cpus_per_task", "gpus_per_task", "time"):
        if name in value and value[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
    return Array(
        tasks=value["array"],
        cpus_per_task=value["cpus_per_task"],
        time_min=value["time"],
        partition=value["partition"],
        account=value["account"],
        logs=value["logs"].absolute(),
        gpus_per_task=value.get("gpus_per_task", 0),
    )


@dataclass(frozen=True)
class _Task:
    """What a task of the array does. Started again, it starts over."""

    function: Callable[[Any], Any]
    items: list[Any]
    workers: int
    time_min: int
    resumes: bool

    def __call__(self) -> tuple[list[Any], str]:
        """Results, and the message of a UserError if there was one: an exception would come as a page of text."""
        pid, begun = os.getpid(), time.monotonic()

        def on_warning(number: int, frame: object) -> None:
            # submitit's own handler takes a preemption in the last ten minutes, or any in a short job, for a timeout.
            if os.getpid() != pid:
                return
            # Slurm may warn a minute early.
            timed_out = time.monotonic() - begun > 60 * self.time_min - _WARNING_S - 90
            if timed_out and not self.resumes:
                return  # the time limit ends it; the command that waits says so
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
            print(f"requeued: {'out of time' if timed_out else 'preempted'}", flush=True)
            subprocess.run(["scontrol", "requeue", job], check=True)
            os._exit(1)

        signal.signal(signal.SIGUSR2, on_warning)
        try:
            return map_in_processes(self.function, self.items, workers=self.workers), ""
        except UserError as error:
            return [], str(error)


def run_array(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    array: Array,
    *,
    name: str,
    resumes: bool = False,
    progress: Callable[[Result], object] = ignore,
) -> list[Result]:
    """The results of ``items``, of which task i of the array does i, i + N, …; waits for all of them.

    A task that is preempted, or whose node fails, is queued again and starts over. Ctrl-C cancels the array.

    Args:
        resumes: a task that starts over is quick with what it did before, so one that ran out of time is queued again
            as well; otherwise it failed.
        progress: called with each result, a task's all at once when it ends.

    Raises:
        UserError: one that a task met, or a task ended without a result.
    """
    import submitit

    tasks = min(array.tasks, len(items))
    executor = submitit.SlurmExecutor(folder=array.logs)
    # Tasks import cfmask and tools from here. For sites whose jobs do not inherit the environment, it is said twice.
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONPATH"] = path
    executor.update_parameters(
        job_name=f"cfmask-{name}",
        time=array.time_min,
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=array.cpus_per_task,
        signal_delay_s=_WARNING_S,
        stderr_to_stdout=True,
        array_parallelism=tasks,
        srun_args=[f"--cpus-per-task={array.cpus_per_task}"],  # srun does not inherit sbatch's
        additional_parameters={"requeue": True},
        setup=[f"export PYTHONPATH={shlex.quote(path)}"],
        **({"gpus_per_node": array.gpus_per_task} if array.gpus_per_task else {}),  # a task is alone on its node
        **{key: value for key in ("partition", "account") if (value := getattr(array, key))},
    )
    workers = array.gpus_per_task or array.cpus_per_task
    work = [_Task(function, list(items[i::tasks]), workers, array.time_min, resumes) for i in range(tasks)]
    # Ctrl-C is for this process, not for sbatch on the way.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        jobs = executor.map_array(_call, work)
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refuses the array: {' '.join(str(error).split())}") from None
    finally:
        signal.signal(signal.SIGINT, before)
    number = jobs[0].job_id.split("_")[0]
    print(f"array job {number} of {tasks} tasks; logs {array.logs}", file=sys.stderr, flush=True)
    try:
        return _gather(jobs, number, len(items), progress)
    except BaseException:
        subprocess.run(["scancel", number], stderr=subprocess.DEVNULL)
        raise


def _call(task: _Task) -> tuple[list[Any], str]:
    return task()


def _gather(jobs: list[Any], number: str, count: int, progress: Callable[[Any], object]) -> list[Any]:
    """Wait for the tasks' results. Whether a task still lives is asked of squeue, which knows requeued ones, and needs
    no accounting."""
    results: list[Any] = [None] * count
    waiting = dict(enumerate(jobs))
    doubtful: dict[int, float] = {}  # not in the queue since, and no result seen: a shared file system may be late
    while waiting:
        queued = _queued(number)
        for i, job in list(waiting.items()):
            if (done := _result(job)) is not None:
                values, message = done
                if message:
                    raise UserError(message)
                results[i :: len(jobs)] = values
                for value in values:
                    progress(value)
                del waiting[i]
            elif queued is None or i in queued:
                doubtful.pop(i, None)
            elif time.monotonic() - doubtful.setdefault(i, time.monotonic()) > 10 * POLL_S:
                raise UserError(
                    f"Task {i} of the array job {number} ended without a result: cancelled, out of time (--time, or "
                    f"more tasks with --array) or of memory. Its log is {job.paths.stdout}."
                )
        if waiting:
            time.sleep(POLL_S)
    return results


def _result(job: Any) -> tuple[list[Any], str] | None:
    from submitit.core.utils import pickle_load

    path = job.paths.result_pickle
    if not path.exists():
        return None
    outcome, result = pickle_load(path)
    if outcome != "success":
        words = str(result).strip().splitlines()
        raise UserError(f"Task {job.job_id} failed: {words[-1] if words else outcome}. Its log is {job.paths.stdout}.")
    return result


def _queued(number: str) -> set[int] | None:
    """Tasks of the array that wait or run; None if the controller does not answer."""
    asked = subprocess.run(
        ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%F %K"],
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        return None
    lines = (line.split() for line in asked.stdout.splitlines())
    return {int(words[1]) for words in lines if len(words) == 2 and words[0] == number and words[1].isdigit()}
