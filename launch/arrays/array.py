"""Applies a function to many items in the tasks of a Slurm array.

    run_array(Work("verify", identity, check, checks, keys), array, progress=bar.update)

Task i of N processes the items i, i + N, …, so tasks do not have to communicate. Each result is a file: a task that is
preempted, out of time or on a lost node returns (launch/restarts/policy.py) and processes what is missing, and the
command that follows the array may be interrupted and repeated. The folder of an array is like that of a run:

    LOGS/cfmask-verify-0123456789ab/    named after the work: the same command finds its array, also in the queue
      work/function.pkl 0.pkl 1.pkl …   the function; the items of each task
      results/train-000000.pkl          the result of an item
      tasks/0/attempts.jsonl ended.json the starts of a task
      code/0123456789ab/                the code that the tasks run (snapshot.py)
      jobs/                             submitit's files, logs, failure reports

It is removed when all results have been read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.attempts import AttemptLog
from cfmask.runtime.files import sole_writer, sync
from cfmask.runtime.pool import ignore
from cfmask.runtime.work import Item, Result, Work
from launch.allocation.resolve import warn_of_paths_outside
from launch.arrays.arguments import Array
from launch.arrays.task import FINISHED, FUNCTION, ArrayTask
from launch.slurm.client import SlurmError
from launch.slurm.control import cancel
from launch.slurm.queue import queue_of_name
from launch.slurm.site import max_array_members
from launch.slurm.states import is_completing
from launch.state.failure_reports import report_of
from launch.submission import snapshot
from launch.submission.claims import check_path
from launch.submission.dependencies import array_id, split_array
from launch.submission.sbatch import send, slurm_executor, write_environment

logger = logging.getLogger(__name__)

_LOOK_S, _ASK_S = 1.0, 5.0
"""Intervals of checks for results, and of queries to the queue."""
_GONE = 2
"""The array has ended when this many queries in a row show no job: a job that was just submitted or is being requeued
may be missing from one answer, and a shared file system may show the last result late."""
_END_S = 30.0
"""Time for tasks to end by themselves after the last result."""


def run_array(
    work: Work[Item, Result],
    array: Array,
    *,
    progress: Callable[[Result], object] = ignore,
    paths: Sequence[str | Path] = (),
    survives_interrupt: bool = False,
) -> list[Result]:
    """Run an array, or follow the one that an earlier command has left in the queue.

    Args:
        progress: Called with each result as it arrives.
        paths: What the tasks read and write outside the array's folder.
        survives_interrupt: On Ctrl-C, leave the array in the queue instead of cancelling it.

    Returns:
        The results, in the order of the items.

    Raises:
        UserError: Slurm refuses or does not know the array, or it ended without all results.
    """
    folder = array.logs / work.name
    if not work.items:
        return []
    check_path(folder)
    with sole_writer(folder):
        exists = _jobs_left(work.name)
        if exists and not (folder / "results").is_dir():
            raise UserError(
                f"Jobs of an earlier command are in the queue (squeue --name {work.name}), but their results are not "
                f"in {array.logs}: that command had other --logs, or was given in another directory. Give the same "
                f"--logs, or end the jobs: scancel --name {work.name}"
            )
        try:  # from here on, the jobs end with this command
            if exists:
                print(
                    f"jobs of an earlier command are in the queue: following them (squeue --name {work.name})",
                    flush=True,
                )
            else:
                warn_of_paths_outside(array.allocation, folder, *paths)
                _submit(work, array, folder)
            results = _follow(work, folder, progress)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and survives_interrupt:
                print(
                    f"\nThe jobs continue (`scancel --name {work.name}` ends them). The same command follows them "
                    "again, and completes the set when they are done.",
                    flush=True,
                )
            else:
                _cancel(work.name)
            raise
        _clean_up(work.name, folder)
    return results


def _jobs_left(name: str) -> bool:
    """Whether jobs of an earlier command run or wait. Jobs that are leaving their nodes are waited for: after Ctrl-C or
    scancel they end without their results, so there is nothing to follow; after a requeue they return."""
    said = False
    while (jobs := queue_of_name(name)) and all(is_completing(job.state) for job in jobs.values()):
        if not said:
            print(f"jobs of an earlier command are ending: waiting for them (squeue --name {name})", flush=True)
        said = True
        time.sleep(_ASK_S)
    return bool(jobs)


def _submit(work: Work[Any, Any], array: Array, folder: Path) -> None:
    """Submit all tasks. The folder has no job in the queue. If a task is refused, the caller cancels the others."""
    for old in folder.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    for name in ("work", "results", "jobs"):
        (folder / name).mkdir()
    count = min(array.tasks, len(work.items))
    _save(folder / "work" / FUNCTION, (work.function, work.preload))
    for number in range(count):
        keyed = zip(work.keys[number::count], work.items[number::count], strict=True)
        _save(folder / f"work/{number}.pkl", list(keyed))
    code = snapshot.take(snapshot.REPO, folder / "code")
    write_environment(array.allocation, folder / "jobs")
    accepted: list[str] = []
    for part in split_array(count, max_array_members() if count > 1 else None, array.allocation.array_parallelism):
        allocation = part.allocation(array.allocation, accepted)
        executor = slurm_executor(folder / "jobs", work.name, shlex.quote(str(folder)), code.digest, allocation)
        tasks = [ArrayTask(folder, number, array.workers, allocation.time_min) for number in part.members]
        accepted.append(array_id(send(executor, tasks)))
    by = f"; cluster file {array.cluster_file}" if array.cluster_file else ""
    print(
        f"array job {', '.join(accepted)} of {count} tasks, code {code}; logs {folder / 'jobs'}{by}",
        file=sys.stderr,
        flush=True,
    )


def _cancel(name: str) -> None:
    """Cancel the jobs while an exception ends this command; a failure must not hide that exception."""
    try:
        cancel(*queue_of_name(name))
    except SlurmError as error:
        logger.warning(f"The jobs continue: {error} `scancel --name {name}` ends them.")


def _save(path: Path, value: object) -> None:
    with open(path, "wb") as file:
        pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)
    sync(path)


def _follow(work: Work[Item, Result], folder: Path, progress: Callable[[Result], object]) -> list[Result]:
    """Wait for the results.

    Raises:
        UserError: No job is left, and results are missing.
    """
    results: list[Any] = [None] * len(work.items)
    missing = {f"{key}.pkl": place for place, key in enumerate(work.keys)}
    gone, ask_at = 0, time.monotonic() + _ASK_S
    while True:
        for name in sorted(missing.keys() & set(os.listdir(folder / "results"))):
            place = missing.pop(name)
            results[place] = pickle.loads((folder / "results" / name).read_bytes())
            progress(results[place])
        if not missing:
            return results
        if gone >= _GONE:
            raise UserError(
                f"The jobs ended, and {len(missing)} of {len(work.items)} results are missing. {_why(folder)} The same "
                "command submits what is missing."
            )
        time.sleep(_LOOK_S)
        if time.monotonic() > ask_at:
            try:
                gone = 0 if queue_of_name(work.name) else gone + 1
            except SlurmError as error:
                logger.warning(f"{error} The jobs continue; Slurm will be asked again.")
            ask_at = time.monotonic() + _ASK_S


def _why(folder: Path) -> str:
    """Why tasks ended without their results: by their records, else their failure reports, else the latest log."""
    jobs = folder / "jobs"
    reasons: dict[str, list[str]] = {}
    for task in sorted((folder / "tasks").glob("*"), key=lambda path: int(path.name)):
        log = AttemptLog(task)
        job = str(log.attempt_lines()[-1].get("job")).rpartition("-")[0] if log.attempt_lines() else task.name
        ended = log.ended()
        report = report_of(RunFolder(folder), job)
        why = ended["why"] if ended else report.strip().splitlines()[-1] if report else None
        if why and why != FINISHED:
            reasons.setdefault(why, []).append(job)
    if reasons:
        first, others = next(iter(reasons.items())), len(reasons) - 1
        also = f" (and {others} other reasons)" if others else ""
        return f"Task {', '.join(first[1][:5])}: {first[0].rstrip('.')}{also}. Logs: {jobs}."
    logs = sorted(jobs.glob("*_log.out"), key=lambda log: log.stat().st_mtime)
    if not logs:
        return f"They were cancelled before they started, or could not start: there is no log in {jobs}."
    lines = logs[-1].read_text(errors="replace").strip().splitlines()
    return f"They were cancelled, or killed. The last line of {logs[-1]}: {lines[-1] if lines else '(empty)'}."


def _clean_up(name: str, folder: Path) -> None:
    """Let the tasks end, and remove the folder, which contains all items."""
    deadline = time.monotonic() + _END_S
    with contextlib.suppress(SlurmError):
        while (left := queue_of_name(name)) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        cancel(*left)  # tasks that still wait would find nothing to do
    shutil.rmtree(folder, ignore_errors=True)
