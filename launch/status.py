#!/usr/bin/env python3
"""Show runs: how far they are, how fast, what ended their starts, and when they start next.

    python launch/status.py                    all runs in runs/
    python launch/status.py RUN [RUN…]         these, or all in a folder of runs
    python launch/status.py RUN --attempts     each start: when, where, from which step to which, why it ended
    python launch/status.py RUN --follow       a progress bar, across requeues, until the run has ended
    python launch/status.py --json             an object a line, for scripts

What a run can be:

    never started   there is no job
    queued          waits for its first start
    requeued        waits to go on
    starting        its job runs, training has not begun
    running         trains: lets hear of itself
    ending          training has ended, its job has not
    finished        has its results
    cancelling      launch/cancel.py was here; its job is not gone yet
    cancelled       ended for good
    stopped         was told to end, by a signal or scancel
    failed          ended with an error
    dead            no job, no heartbeat, and no word of its own
    unknown         Slurm would know, and cannot be asked from here

`submit.py --resume RUN` goes on with any of them that has ended and is not finished.

All of this stands in run folders; what Slurm alone knows comes from one squeue, and one sacct where a job has ended
without a word. Nothing here needs torch.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.runs import Owner, RunFolder, process_runs, read_lines  # noqa: E402

T = TypeVar("T")

ENDED = ("never started", "finished", "cancelled", "stopped", "failed", "dead")
"""States in which nothing happens any more by itself."""

_ANSWER_S = 20  # how long one of Slurm's commands may take
_MARKS = (
    "recipe.json",
    "evaluation.json",
    "attempts.jsonl",
    "log.jsonl",
    "checkpoints",
)  # one of these makes a run folder
_KILLED = "killed without notice"
_LIFE_ENDS = {
    "BOOT_FAIL": "node failed",
    "CANCELLED": "scancel",
    "DEADLINE": "deadline",
    "FAILED": "its job failed",
    "NODE_FAIL": "node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "REQUEUED": "requeued by Slurm or an administrator",
    "TIMEOUT": "time limit",
}


@dataclass(frozen=True)
class SlurmJob:
    """A job in the queue, in squeue's words. start: when it began, or may begin; restarts: times it was requeued."""

    id: str
    state: str
    start: str
    eligible: str
    restarts: int
    reason: str
    nodes: str


@dataclass(frozen=True)
class Life:
    """One of the times that a job ran, in sacct's words; a requeue begins another."""

    job: str
    state: str
    start: str
    end: str


@dataclass(frozen=True)
class Slurm:
    """What was asked of the scheduler. queue: by job; None if it could not be asked."""

    queue: dict[str, SlurmJob] | None = None
    lives: tuple[Life, ...] = ()


@dataclass(frozen=True)
class Jobs:
    """What was ever submitted. slurm: ids, the latest last; controller: the process on this machine that looks after
    the ranks of the local executor; any: whether anything was."""

    slurm: tuple[str, ...] = ()
    controller: int | None = None
    any: bool = False


@dataclass(frozen=True)
class Facts:
    """What a run folder says. owner: who trains, if it lives; last: log.jsonl's last line with a rate; notes: what
    could not be read."""

    run: RunFolder
    finished: bool
    cancelled: dict[str, Any] | None
    attempts: list[dict[str, Any]]
    ended: dict[str, Any] | None
    owner: Owner | None
    last: dict[str, Any]
    saved_step: int
    jobs: Jobs
    notes: tuple[str, ...]

    @property
    def step(self) -> int | None:
        step = max(self.last.get("step", 0), self.saved_step)
        began = any(isinstance(attempt.get("from_step"), int) for attempt in self.attempts)
        return step if step or began else None


@dataclass(frozen=True)
class Status:
    """A row of the table. job: the one in the queue, or the process of the local executor; next_start: what is known
    about when; last_end: why the latest start that has ended did."""

    run: str
    state: str
    step: int | None
    total_steps: int | None
    samples_per_s: float | None
    loss: float | None
    eta_s: float | None
    job: str | None
    attempts: int
    next_start: str | None
    last_end: str | None
    notes: tuple[str, ...]


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    assert __doc__
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them (default: runs)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--attempts", action="store_true", help="each start of each run")
    what.add_argument("--follow", action="store_true", help="a progress bar of one run until it has ended")
    what.add_argument("--json", action="store_true", help="an object a line instead of a table")
    arguments = p.parse_args(argv)
    runs = find_runs(arguments.runs)
    if arguments.follow:
        if len(runs) != 1:
            raise UserError(f"--follow shows one run, and here are {len(runs)}. Name one of them.")
        from launch.jobs.follow import follow_run

        return follow_run(RunFolder(runs[0].root.resolve()))
    found, slurm = look_at(runs, history=arguments.attempts)
    statuses = [status_of(facts, slurm) for facts in found]
    if arguments.json:
        for status in statuses:
            print(json.dumps(asdict(status)))
        return 0
    print(table(statuses))
    if arguments.attempts:
        for facts, status in zip(found, statuses, strict=True):
            print(f"\n{status.run}\n{attempts_table(facts, status, slurm)}")
    for status in statuses:
        for note in status.notes:
            print(f"note: {status.run}: {note}")
    if slurm.queue is None and any(f.jobs.slurm and not f.finished for f in found):
        print("note: Slurm cannot be asked from here: what waits in its queue is unknown.")
    return 0


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Run folders among the paths, and right below those that are folders of runs.

    Raises:
        UserError: there is none at a path, or it cannot be read.
    """
    runs: list[RunFolder] = []
    for path in paths or [Path("runs")]:
        try:
            if _is_run(path):
                found = [path]
            else:
                found = sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child))
        except OSError as error:
            hint = "Check the path." if paths else "Name run folders, or call this where they were submitted from."
            raise UserError(f"{path} cannot be read: {error.strerror}. {hint}") from error
        if not found:
            raise UserError(
                f"{path} is neither a run folder nor a folder of runs: no recipe.json in it or right below."
            )
        runs += [RunFolder(each) for each in found]
    return runs


def _is_run(path: Path) -> bool:
    return any((path / mark).exists() for mark in _MARKS)


# --- reading ----------------------------------------------------------------------------------------------------


def look_at(runs: Sequence[RunFolder], *, history: bool = False) -> tuple[list[Facts], Slurm]:
    """All there is to know about runs, with one call of squeue and at most one of sacct for all of them.

    Args:
        history: ask also how earlier lives of jobs have ended.
    """
    found = [read(run) for run in runs]
    queue = ask_queue(sorted({job for f in found if not f.finished for job in f.jobs.slurm}))
    if queue is None:
        return found, Slurm()
    silent: set[str] = set()
    for facts in found:
        waits = any(job in queue for job in facts.jobs.slurm)
        if history or not (facts.finished or waits or facts.ended or facts.owner):
            silent.update(facts.jobs.slurm)
    return found, Slurm(queue, ask_lives(sorted(silent)))


def read(run: RunFolder) -> Facts:
    """What a folder says, whatever state it is in."""
    notes: list[str] = []

    def tried(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (OSError, UserError) as error:
            notes.append(" ".join(str(error).split()))
            return otherwise

    def work() -> None:
        run.work()

    def attempts() -> list[dict[str, Any]]:
        lines = read_lines(run.attempts)
        if run.attempts.exists() and len(lines) < _lines_in(run.attempts):
            notes.append(f"{run.attempts.name} has a torn line")
        return lines

    def last() -> dict[str, Any]:
        return ([line for line in read_lines(run.log, tail=1 << 16) if _whole(line)] or [{}])[-1]

    def owner() -> Owner | None:
        found = run.owner()
        return None if found is None or found.why_dead() else found

    tried(work, None)
    starts: list[dict[str, Any]] = tried(attempts, [])
    jobs = tried(lambda: _jobs(run.root / "jobs", starts), Jobs())
    return Facts(
        run=run,
        finished=tried(run.results.exists, False),
        cancelled=tried(run.cancelled, None),
        attempts=starts,
        ended=tried(run.ended, None),
        owner=tried(owner, None),
        last=tried(last, {}),
        saved_step=tried(run.saved_step, 0),
        jobs=jobs,
        notes=tuple(dict.fromkeys(notes)),
    )


def _lines_in(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_bytes().splitlines())


def _jobs(folder: Path, attempts: list[dict[str, Any]]) -> Jobs:
    """submitit leaves a pickle a job, and on Slurm a script a job, or one for an array (12, with jobs 12_0, 12_1 …)."""
    pickles, scripts = (
        {path.name.removesuffix(end): path.lstat().st_mtime for path in folder.glob(f"*{end}")}
        for end in ("_submitted.pkl", "_submission.sh")
    )
    begun = {str(attempt.get("job")).rpartition("-")[0] for attempt in attempts}
    members = {job: pickles.get(job, 0.0) for job in pickles.keys() | begun if re.fullmatch(r"\d+_\d+", job)}
    alone = {job: when for job, when in scripts.items() if job.isdigit() and f"{job}_0" not in pickles}
    local = [int(job) for job in pickles if job.isdigit() and job not in scripts]
    submitted = alone | members
    return Jobs(
        slurm=tuple(sorted(submitted, key=lambda job: submitted[job])),
        controller=next((pid for pid in local if _is_controller(pid, folder)), None),
        any=bool(pickles or members),
    )


def _whole(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(name), int | float) for name in ("step", "total_steps", "samples_per_s", "eta_s"))


def _is_controller(pid: int, jobs: Path) -> bool:
    """Whether the process is submitit's local controller of these jobs, and not one that has its number by now."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return "submitit.local._local" in words and Path(words[-2]).resolve() == jobs.resolve() and process_runs(pid)


def ask_queue(jobs: Sequence[str]) -> dict[str, SlurmJob] | None:
    """Those of the jobs that are queued or run, by one squeue; None where there is none, or it does not answer."""
    if not jobs:
        return {}
    fields = ("JobArrayID", "State", "StartTime", "EligibleTime", "RestartCnt", "Reason", "NodeList")
    shown = ",".join(f"{field}:|" for field in fields)
    told = _ask(
        ["squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--Format", shown],
        none="Invalid job id specified",
    )
    if told is None:
        return None
    rows = [line.split("|")[: len(fields)] for line in told.splitlines() if line.count("|") >= len(fields)]
    return {
        id: SlurmJob(id, state, start, eligible, int(n), why, nodes)
        for id, state, start, eligible, n, why, nodes in rows
    }


def ask_lives(jobs: Sequence[str]) -> tuple[Life, ...]:
    """How all lives of the jobs have ended, by one sacct; nothing where there is no accounting."""
    if not jobs:
        return ()
    told = _ask(["sacct", "-X", "-n", "-P", "-D", "-j", ",".join(jobs), "-o", "JobID,State,Start,End"])
    return tuple(Life(*line.split("|")) for line in (told or "").splitlines() if line.count("|") == 3)


def _ask(command: list[str], none: str | None = None) -> str | None:
    """What it prints; None if it cannot be asked. none: the error that means that there is nothing."""
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and not (none and none in done.stderr):
        return None
    return done.stdout


# --- judging ----------------------------------------------------------------------------------------------------


def status_of(facts: Facts, slurm: Slurm) -> Status:
    """The row of a run."""
    job = in_queue(facts, slurm)
    state = _state(facts, slurm, job)
    runs = state in ("running", "cancelling") and facts.owner is not None
    return Status(
        run=_short(facts.run.root),
        state=state,
        step=facts.step,
        total_steps=facts.last.get("total_steps"),
        samples_per_s=facts.last.get("samples_per_s"),
        loss=facts.last.get("loss"),
        eta_s=facts.last.get("eta_s") if runs else None,
        job=job.id if job else str(facts.jobs.controller) if facts.jobs.controller else None,
        attempts=len(facts.attempts),
        next_start=_next_start(job) if job and job.state == "PENDING" and state != "cancelling" else None,
        last_end=_last_end(facts, slurm, state),
        notes=facts.notes,
    )


def in_queue(facts: Facts, slurm: Slurm) -> SlurmJob | None:
    """The run's job in Slurm's queue, one that runs before one that waits."""
    jobs = [slurm.queue[job] for job in facts.jobs.slurm if job in slurm.queue] if slurm.queue else []
    return min(jobs, key=lambda job: job.state == "PENDING", default=None)


def _state(facts: Facts, slurm: Slurm, job: SlurmJob | None) -> str:
    if facts.finished:
        return "finished"
    trains = _trains(facts, slurm)
    if facts.cancelled:
        return "cancelling" if trains or job or facts.jobs.controller else "cancelled"
    if trains:
        return "running"
    if job and job.state != "PENDING":
        left = facts.ended and facts.attempts and facts.attempts[-1].get("job") == f"{job.id}-{job.restarts}"
        if left or job.state == "COMPLETING":
            return "ending"
        return "starting" if job.state == "RUNNING" else job.state.lower()
    if facts.jobs.controller:
        return "starting"
    if job:
        return "requeued" if job.restarts else "queued"
    return _end_state(facts, slurm)


def _trains(facts: Facts, slurm: Slurm) -> bool:
    """Whether a process trains. One that was killed on another node looks alive for a while: Slurm knows better."""
    if facts.owner is None:
        return False
    job = facts.owner.job or (str(facts.attempts[-1].get("job")) if facts.attempts else "")
    job = job.rpartition("-")[0]  # the attempt's name is job-restarts
    if slurm.queue is None or job not in facts.jobs.slurm:
        return True
    return job in slurm.queue and slurm.queue[job].state != "PENDING"


def _end_state(facts: Facts, slurm: Slurm) -> str:
    """Of a run that no job is there for."""
    why = str(facts.ended["why"]) if facts.ended else ""
    if slurm.queue is None and facts.jobs.slurm and (not why or why.endswith("(requeue)")):
        return "unknown"
    if why:
        return "stopped" if why.startswith(("stopped", "not started: cancelled")) else "failed"
    life = _last_life(facts, slurm)
    if life:
        return {"CANCELLED": "stopped", "FAILED": "failed"}.get(life.state.split()[0], "dead")
    if facts.attempts:
        return "dead"
    if not facts.jobs.any:
        return "never started"
    return "dead" if facts.jobs.slurm else "failed"


def _last_end(facts: Facts, slurm: Slurm, state: str) -> str | None:
    """Why the latest start that has ended did."""
    if state == "finished":
        return "finished"
    if facts.cancelled and state == "cancelled":
        where = f" at step {facts.step}" if facts.step else ""
        return f"cancelled{where} by {facts.cancelled['by']}, {_when(facts.cancelled['when'])}"
    if facts.ended:
        return str(facts.ended["why"])
    if state in ("running", "starting", "cancelling") and facts.owner:
        return facts.attempts[-1].get("why_last_ended") if facts.attempts else None
    if facts.attempts:
        return _explained(_KILLED, facts.attempts[-1], slurm)
    life = _last_life(facts, slurm)
    if life:
        return f"{_life_end(life)}, before training began"
    return "ended before training began" if state in ("failed", "dead") else None


def _last_life(facts: Facts, slurm: Slurm) -> Life | None:
    """The last one of the job that was submitted last."""
    lives = [life for life in slurm.lives if facts.jobs.slurm and life.job == facts.jobs.slurm[-1]]
    return lives[-1] if lives else None


def _explained(why: str, attempt: dict[str, Any], slurm: Slurm) -> str:
    """What Slurm adds to the end of an attempt that has left no word."""
    if why != _KILLED:
        return why
    started = _local_time(attempt.get("started"))
    job = str(attempt.get("job")).rpartition("-")[0]
    for life in slurm.lives:
        begin, end = _local_time(life.start), _local_time(life.end)
        if life.job == job and started and begin and begin <= started and (end is None or started <= end):
            return f"killed: {_life_end(life)}"
    return why


def _life_end(life: Life) -> str:
    word, _, by = life.state.partition(" ")  # CANCELLED by 1000
    return f"{_LIFE_ENDS.get(word, word.lower())} {by}".strip()


def _next_start(job: SlurmJob) -> str:
    eligible, start = _local_time(job.eligible), _local_time(job.start)
    if eligible and eligible > datetime.now():
        return f"eligible {_when(job.eligible)}"
    return f"about {_when(job.start)} ({job.reason})" if start else f"({job.reason})"


def _local_time(text: Any) -> datetime | None:
    """A moment, from 2026-01-31T12:00:00 with or without a time zone; None if it is none."""
    for form in ("%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S"):
        try:
            return datetime.strptime(str(text), form).astimezone().replace(tzinfo=None)
        except ValueError:
            continue
    return None


# --- showing ----------------------------------------------------------------------------------------------------


def table(statuses: Iterable[Status]) -> str:
    header = ("run", "state", "step", "samples/s", "loss", "ETA", "job", "attempts", "next start", "last end")
    return _columns(
        header,
        [
            (
                s.run,
                s.state,
                _steps(s.step, s.total_steps),
                _number(s.samples_per_s, ".0f"),
                _number(s.loss, ".4g"),
                duration(s.eta_s),
                s.job,
                str(s.attempts),
                s.next_start,
                s.last_end,
            )
            for s in statuses
        ],
    )


def attempts_table(facts: Facts, status: Status, slurm: Slurm) -> str:
    """A line a start. What came after the last step that a start had logged, or logs, is in the next one's range."""
    rows = []
    for i, attempt in enumerate(facts.attempts):
        why: str | None
        if i + 1 < len(facts.attempts):
            after = facts.attempts[i + 1]
            until = after.get("last_reached")
            why = _explained(str(after.get("why_last_ended")), attempt, slurm)
        else:
            until = facts.step
            why = None if status.state in ("running", "cancelling") else status.last_end
        rows.append(
            (
                str(attempt.get("attempt", i + 1)),
                _when(attempt.get("started")),
                attempt.get("job"),
                _number(attempt.get("nodes"), "d"),
                _number(attempt.get("world_size"), "d"),
                attempt.get("device"),
                _number(attempt.get("from_step"), "d"),
                _number(until, "d"),
                why,
            )
        )
    header = ("attempt", "started", "job", "nodes", "ranks", "device", "from step", "to step", "ended")
    return _columns(header, rows) if rows else "no start yet"


def _columns(header: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    """Padded columns; on a terminal the last one is cut to its width."""
    lines = [header, *(["-" if cell is None else " ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    texts = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
    return "\n".join(text if width is None or len(text) <= width else text[: width - 1] + "…" for text in texts)


def latest_checkpoint(run: RunFolder) -> str:
    """The newest checkpoint in words."""
    step = run.saved_step()
    return f"the latest checkpoint is {run.checkpoints / f'step-{step:08d}'}" if step else "there is no checkpoint"


def duration(seconds: float | None) -> str | None:
    """1:02:03, or 2 d 03 h."""
    if seconds is None:
        return None
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24:02} h" if hours >= 48 else f"{hours}:{minutes:02}:{left:02}"


def _steps(step: int | None, total: int | None) -> str | None:
    return None if step is None else f"{step}/{total}" if total else str(step)


def _number(value: Any, form: str) -> str | None:
    return format(value, form) if isinstance(value, int | float) else None


def _when(text: Any) -> str:
    """A time of today as such, others with their date."""
    moment = _local_time(text)
    if moment is None:
        return "-"
    return moment.strftime("%H:%M:%S" if moment.date() == datetime.now().date() else "%Y-%m-%d %H:%M")


def _short(root: Path) -> str:
    """As one would type it here."""
    root, here = root.resolve(), Path.cwd()
    return str(root.relative_to(here)) if root.is_relative_to(here) else str(root)


if __name__ == "__main__":
    sys.exit(main())
