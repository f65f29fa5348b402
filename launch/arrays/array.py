"""Do one thing to each of many items in the tasks of a Slurm array.

    run_array(Work("verify", identity, check, checks, keys), array, progress=bar.update)

Task i of N does the items i, i + N, …: nothing has to be agreed upon between tasks. A result is a file, so a task that
is preempted, out of time or on a lost node comes back (restarts.py) and does what is missing, and the command that
follows the array may be interrupted and given again. The folder of an array is one like a run's:

    LOGS/cfmask-verify-0123456789ab/    named after what is done: the same command finds its array, also in the queue
      work/function.pkl 0.pkl 1.pkl …   the function; the items of each task
      results/train-000000.pkl          of an item
      tasks/0/attempts.jsonl ended.json the starts of a task
      code/0123456789ab/                the code that the tasks run (snapshot.py)
      jobs/                             submitit's files, logs, failure reports

It is removed when all results are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cfmask.errors import UserError
from cfmask.files import sole_writer, sync
from cfmask.runs import RunFolder
from cfmask.runtime.attempts import AttemptLog
from cfmask.runtime.pool import ignore
from launch.allocation.resolve import warn_of_paths_outside
from launch.arrays.arguments import Array
from launch.arrays.task import FINISHED, FUNCTION, ArrayTask
from launch.slurm.client import SlurmError
from launch.slurm.control import cancel
from launch.slurm.queue import queue_of_name
from launch.slurm.site import max_array_members
from launch.state.failure_reports import report_of
from launch.submission import snapshot
from launch.submission.batch_script import write_environment
from launch.submission.claims import check_path
from launch.submission.sbatch import array_id, send, slurm_executor, split_array
from launch.submission.submit import REPO

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOOK_S, _ASK_S = 1.0, 5.0
"""Between looks at the results, and at the queue: the controller has more to do."""
_GONE = 2
"""So many looks in a row have to find no job: one that is being requeued, or was just submitted, may be missing from
one answer, and a shared file system shows the last result a moment after its job is gone."""
_END_S = 30.0
"""What tasks that have done everything are given to end by themselves."""


@dataclass(frozen=True)
class Work(Generic[Item, Result]):
    """What an array does.

    kind: for the array's name.
    identity: what the results depend on; with ``kind`` it names the folder and the jobs.
    function: item → result; importable from a copy of cfmask/ and launch/.
    keys: a file name for each item, all different.
    preload: see ``map_in_processes``.
    """

    kind: str
    identity: str
    function: Callable[[Item], Result]
    items: Sequence[Item]
    keys: Sequence[str]
    preload: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"cfmask-{self.kind}-{hashlib.sha256(os.fsencode(self.identity)).hexdigest()[:12]}"


def run_array(
    work: Work[Item, Result],
    array: Array,
    *,
    progress: Callable[[Result], object] = ignore,
    paths: Sequence[str | Path] = (),
    goes_on: bool = False,
) -> list[Result]:
    """The results, in the order of the items; of a new array, or of the one that an earlier command left in the queue.

    Args:
        progress: called with each result, as they come.
        paths: what the tasks read and write, beside the folder.
        goes_on: on Ctrl-C the array goes on; otherwise it is cancelled.

    Raises:
        UserError: Slurm does not take or know the array; it ended, and results are missing.
    """
    folder = array.logs / work.name
    if not work.items:
        return []
    check_path(folder)
    with sole_writer(folder):
        is_followed = bool(queue_of_name(work.name))
        if is_followed and not (folder / "results").is_dir():
            raise UserError(
                f"Jobs of an earlier command are in the queue (squeue --name {work.name}), and their results are "
                f"not in {array.logs}: it had another --logs, or was given in another directory. Give the same "
                f"--logs, or end the jobs: scancel --name {work.name}"
            )
        try:  # from here on an end of this command, at whatever moment it comes, is one of the jobs too
            if is_followed:
                print(
                    f"jobs of an earlier command are in the queue: following them (squeue --name {work.name})",
                    flush=True,
                )
            else:
                warn_of_paths_outside(array.allocation, folder, *paths)
                _submit(work, array, folder)
            results = _follow(work, folder, progress)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and goes_on:
                print(
                    f"\nThe jobs go on (`scancel --name {work.name}` ends them). The same command follows them again, "
                    "and completes the set when they are done.",
                    flush=True,
                )
            else:
                _cancel(work.name)
            raise
        _clean_up(work.name, folder)
    return results


def _submit(work: Work[Any, Any], array: Array, folder: Path) -> None:
    """Nobody is in the queue who might need what is in the folder. All tasks are accepted, or the caller cancels."""
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
    code = snapshot.take(REPO, folder / "code")
    write_environment(array.allocation, folder / "jobs")
    accepted: list[str] = []
    for part in split_array(count, max_array_members() if count > 1 else None, array.allocation.array_parallelism):
        allocation = part.allocation(array.allocation, accepted)
        executor = slurm_executor(folder / "jobs", work.name, shlex.quote(str(folder)), code.digest, allocation)
        tasks = [ArrayTask(folder, number, array.workers, allocation.time_min) for number in part.members]
        accepted.append(array_id(send(executor, tasks)))
    print(
        f"array job {', '.join(accepted)} of {count} tasks, code {code}; logs {folder / 'jobs'}",
        file=sys.stderr,
        flush=True,
    )


def _cancel(name: str) -> None:
    """End the jobs of a command that ends; why it ends matters more than that they could not be ended."""
    try:
        cancel(*queue_of_name(name))
    except SlurmError as error:
        print(f"The jobs go on: {error} `scancel --name {name}` ends them.", file=sys.stderr, flush=True)


def _save(path: Path, value: object) -> None:
    with open(path, "wb") as file:
        pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)
    sync(path)


def _follow(work: Work[Item, Result], folder: Path, progress: Callable[[Result], object]) -> list[Result]:
    """Wait for the results.

    Raises:
        UserError: no job is left, and some are missing.
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
                print(f"{error} The jobs go on; it is asked again.", file=sys.stderr, flush=True)
            ask_at = time.monotonic() + _ASK_S


def _why(folder: Path) -> str:
    """Why tasks ended without their results: what they recorded, else their failure reports, else the latest log."""
    jobs = folder / "jobs"
    reasons: dict[str, list[str]] = {}
    for task in sorted((folder / "tasks").glob("*"), key=lambda path: int(path.name)):
        log = AttemptLog(task)
        job = str(log.lines()[-1].get("job")).rpartition("-")[0] if log.lines() else task.name
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
        return f"They were cancelled before they began, or could not start: there is no log in {jobs}."
    lines = logs[-1].read_text(errors="replace").strip().splitlines()
    return f"They were cancelled, or killed. The last line of {logs[-1]}: {lines[-1] if lines else '(empty)'}."


def _clean_up(name: str, folder: Path) -> None:
    """Every result is there: let the tasks end, and remove the folder, in which the whole plan is once more."""
    deadline = time.monotonic() + _END_S
    with contextlib.suppress(SlurmError):
        while (left := queue_of_name(name)) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        cancel(*left)  # those that still wait would start only to find nothing to do
    shutil.rmtree(folder, ignore_errors=True)
