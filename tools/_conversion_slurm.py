"""Conversion by a Slurm job array: submitted through submitit, followed by what is on the disk.

Task i of N makes the missing shards i, i + N, i + 2N, …: nothing has to be agreed upon, so a task may be preempted,
requeued or lost at any moment; started again it makes what is missing of its own. No file says which jobs there are:
the queue knows them by their name, which is a function of the plan and the folder.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.convert.planning import Task, is_made
from cfmask.convert.writing import make_all
from cfmask.data.shards import index_path
from cfmask.errors import UserError
from tools._array import Array

REPO = Path(__file__).resolve().parents[1]
_LOOK_S, _ASK_S = 1.0, 5.0  # at the disk; the controller, which has more to do


@dataclass(frozen=True)
class ArrayTask:
    """The callable that is pickled: the shards that one task of the array makes."""

    tasks: list[Task]
    workers: int

    def __call__(self) -> None:
        make_all([task for task in self.tasks if not is_made(task)], workers=self.workers)

    def checkpoint(self) -> Any:
        """Asked by submitit when the job is to be preempted, or its time is nearly up: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def make_on_slurm(tasks: list[Task], array: Array, report: Callable[[tuple[int, int]], object]) -> None:
    """Make the shards in jobs: new ones, or those that an earlier command left in the queue. Ctrl-C leaves them there.

    Args:
        tasks: what is missing, of one split.
        report: called with (images, bytes of the source) of each shard that is made, and with zeros while none is.

    Raises:
        UserError: the jobs ended and shards are missing, or Slurm does not answer.
    """
    if not tasks:
        return
    folder = tasks[0].tar.parent
    name = f"cfmask-shards-{hashlib.sha256(f'{folder}{tasks[0].plan}'.encode()).hexdigest()[:12]}"
    jobs = array.logs / name
    queued = _in_queue(name)
    if queued is None:
        raise UserError("The Slurm controller does not answer (squeue failed). Try again when it does.")
    if queued:
        print(f"jobs of an earlier command are in the queue: following them (squeue --name {name})")
    else:
        _submit(tasks, array, jobs, name)
    try:
        missing = _follow(tasks, name, report)
    except KeyboardInterrupt:
        print(
            f"\nThe jobs go on (`scancel --name {name}` ends them). The same command shows their progress again, and "
            f"writes the manifest when they are done."
        )
        raise
    if missing:
        raise UserError(
            f"The jobs ended, and {len(missing)} of {len(tasks)} shards are missing. {_last_words(jobs)} The "
            f"same command submits what is missing."
        )
    _clean_up(jobs, name)


def _submit(tasks: list[Task], array: Array, folder: Path, name: str) -> None:
    import submitit

    shutil.rmtree(folder, ignore_errors=True)  # nobody is in the queue who might need it
    # The jobs import cfmask and tools from here, wherever they are started.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=1_000_000)
    executor.update_parameters(
        name=name,
        timeout_min=array.time_min,
        cpus_per_task=array.cpus_per_task,
        stderr_to_stdout=True,
        slurm_array_parallelism=array.tasks,
        # srun does not inherit sbatch's --cpus-per-task.
        slurm_srun_args=[f"--cpus-per-task={array.cpus_per_task}"],
        slurm_additional_parameters={"requeue": True},
        # For sites whose jobs do not inherit the environment they are submitted from.
        slurm_setup=[f"export PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}"],
        **{f"slurm_{key}": value for key in ("partition", "account") if (value := getattr(array, key))},
    )
    count = min(array.tasks, len(tasks))
    # Ctrl-C is for this process, not for sbatch on the way.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with executor.batch():
            jobs = [executor.submit(ArrayTask(tasks[i::count], array.cpus_per_task)) for i in range(count)]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"Slurm does not take the jobs: {' '.join(str(error).split())}") from None
    finally:
        signal.signal(signal.SIGINT, before)
    print(f"job array {jobs[0].job_id.partition('_')[0]} of {count} tasks; logs in {folder}")


def _follow(tasks: list[Task], name: str, report: Callable[[tuple[int, int]], object]) -> list[Task]:
    """Wait until every shard is made, or no job is left; returns what is missing then."""
    missing = tasks
    gone = 0
    asked = time.monotonic()
    while True:
        there = set(os.listdir(tasks[0].tar.parent))
        made = {task.tar for task in missing if index_path(task.tar).name in there and is_made(task)}
        for task in missing:
            if task.tar in made:
                report((len(task.samples), sum(sample.image.blob.size for sample in task.samples)))
        missing = [task for task in missing if task.tar not in made]
        # Twice, because a job that is being requeued, or has just been submitted, may be missing from one answer, and
        # a shared file system shows the last index a moment after the job is gone.
        if not missing or gone >= 2:
            return missing
        report((0, 0))
        time.sleep(_LOOK_S)
        if time.monotonic() - asked > _ASK_S:
            gone = gone + 1 if _in_queue(name) is False else 0
            asked = time.monotonic()


def _in_queue(name: str) -> bool | None:
    """Whether jobs of this name wait or run; None if the controller does not say."""
    command = ["squeue", "--noheader", "--user", getpass.getuser(), "--name", name, "--format", "%i"]
    done = subprocess.run(command, capture_output=True, text=True)
    return bool(done.stdout.strip()) if done.returncode == 0 else None


def _clean_up(folder: Path, name: str) -> None:
    """Every shard is made: let the jobs end, and remove their pickles, in which the whole plan is once more."""
    deadline = time.monotonic() + 30
    while _in_queue(name) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    # Those that still wait would start only to find nothing to do.
    subprocess.run(["scancel", "--user", getpass.getuser(), "--name", name], capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def _last_words(folder: Path) -> str:
    """Why, from the log of a task that says so, or of the latest."""
    logs = sorted(folder.glob("*_log.out"), key=lambda log: log.stat().st_mtime)
    if not logs:
        return f"There is no log in {folder}."
    texts = {log: log.read_text(errors="replace").strip().splitlines() for log in logs}
    for log, lines in texts.items():
        for line in lines:
            if "UserError: " in line:
                return f"{log.name} in {folder} says: {line.partition('UserError: ')[2]}"
    last = texts[logs[-1]]
    return f"The last line of {logs[-1]}: {last[-1] if last else '(empty)'}"
