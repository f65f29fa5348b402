"""Shows the progress of a run from its folder, and how it ended."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_object
from cfmask.runtime.output import silence_output
from launch.state.bar import Progress, ProgressLine
from launch.state.facts import look_at
from launch.state.failure_reports import report_of, would_recur
from launch.state.processes import kill, wait_until_gone
from launch.state.progress import progress_of
from launch.state.status import ENDED, status_of
from launch.state.table import latest_checkpoint

if TYPE_CHECKING:
    from launch.ranks.local import ControlledJob

_SAME_COMMAND = "The same command resumes from the last checkpoint."
_SAVE_S = 60.0
"""Time for a checkpoint after a signal to this process."""
_ONE_SIGNAL_S = 1.0
"""Within this time a second Ctrl-C is the same one, from the terminal and from a wrapper that passes it on."""
_LOOK_S = 5
"""Between two looks at a run's state. Both must find it ended, because a requeued run has moments without a job."""


def follow_local_job(job: ControlledJob, run: RunFolder, received: Sequence[signal.Signals]) -> int:
    """Show a progress bar with loss, rate and ETA until a job on this machine ends; then its results, or its error.

    Args:
        received: signals that this process has received (``processes.ending_signals``). The first one ends the job
            after a checkpoint; a Ctrl-C after that kills it at once.

    Returns:
        0 if the run is finished, 1 if it failed or was cancelled, 128 + the signal that ended it.
    """

    def states() -> Iterator[str]:
        while not job.done() and not received:
            yield ""

    try:
        _watch(run, states())
    except OSError:
        time.sleep(1)  # the terminal was closed; the HUP may come a moment later
        if not received:
            raise
    if received:
        return _end_local_job(job, run, received)
    if job.exit_code < 0:
        died = signal.Signals(-job.exit_code).name
        print(f"The controller of the job, process {job.job_id}, was killed ({died}): the ranks end.", flush=True)
        wait_until_gone(run)
    return print_end(run, job.job_id, _SAME_COMMAND)


def _end_local_job(job: ControlledJob, run: RunFolder, received: Sequence[signal.Signals]) -> int:
    """Ask the ranks to save a checkpoint and end, and kill them if they take too long.

    Returns:
        128 + the first signal.
    """
    first = received[0]
    if first == signal.SIGHUP:
        silence_output()
    again = " Ctrl-C again kills them at once." if first == signal.SIGINT else ""
    _say(f"{first.name}: the ranks save a checkpoint and end.{again}")
    began, heard = time.monotonic(), len(received)
    job.terminate()
    while not job.done():
        passed_s = time.monotonic() - began
        if passed_s < _ONE_SIGNAL_S:
            heard = len(received)
        if passed_s > _SAVE_S or signal.SIGINT in received[heard:]:
            _say(f"The ranks have not ended in {passed_s:.0f} s: killed")
            kill(run)
        time.sleep(0.1)
    wait_until_gone(run)
    if run.results.exists():
        _say(f"finished: {run.results}")
    else:
        _say(f"The ranks have ended; {latest_checkpoint(run)}. {_SAME_COMMAND}")
    return 128 + first


def _say(text: str) -> None:
    """Print it, unless the same signal has ended the reader of the output (as a Ctrl-C ends `| tee`)."""
    try:
        print(text, flush=True)
    except OSError:
        silence_output()


def follow_run(run: RunFolder) -> int:
    """The same for any run, on Slurm or on this machine, across requeues until it has ended. Of a run that has finished
    before, the results alone are shown.

    Returns:
        0 if the run is finished, 1 if it failed or was cancelled, 130 after a Ctrl-C, which does not end the run.
    """
    try:
        if not run.results.exists():
            _watch(run, _states(run))
    except KeyboardInterrupt:
        print(f"\nThe run continues. Its progress: {run.log}")
        return 130
    [run_state], _ = look_at([run])
    name = run_state.last_job or (run_state.jobs.slurm or ("",))[-1]
    resume = f"python launch/submit.py --resume {shlex.quote(str(run.root))}"
    return print_end(run, name, f"`{resume}` resumes from the last checkpoint.")


def _states(run: RunFolder) -> Iterator[str]:
    """The state to show beside the progress, until the run has ended."""
    ended = 0
    while True:
        [run_state], slurm = look_at([run])
        status = status_of(run_state, slurm)
        ended = ended + 1 if status.state in ENDED else 0
        if ended == 2 or status.state == "finished":
            return
        until = time.monotonic() + _LOOK_S
        while time.monotonic() < until:
            yield "" if status.state == "running" else status.in_words


def _watch(run: RunFolder, states: Iterator[str]) -> None:
    """Show the progress until ``states`` ends."""
    line, progress = ProgressLine(sys.stderr), Progress(run.root.name)
    for state in states:
        time.sleep(0.5)
        with suppress(OSError):  # read again in a moment: an error would end this process, and the job with it
            progress = _progress(run)
        if state:  # nothing trains: the rate is of an earlier start, and the end depends on when the next one begins
            progress = replace(progress, state=state, eta_s=None, samples_per_s=None)
        line.show(replace(progress, state=state or ("" if progress.step is not None else "starting")))
    with suppress(OSError):
        progress = _progress(run)
    line.show(progress, final=True)


def _progress(run: RunFolder) -> Progress:
    last, eta_s = progress_of(run)
    return Progress(
        run.root.name,
        step=last.get("step"),
        total=last.get("total_steps"),
        loss=last.get("loss"),  # an evaluation or a skipped step has none
        samples_per_s=last.get("samples_per_s"),
        eta_s=eta_s,
    )


def print_end(run: RunFolder, job: str, how_to_resume: str) -> int:
    """Print that a run is finished and its results, or its error and how to resume it; the exit code."""
    if run.results.exists():
        print(f"finished: {run.final if run.final.exists() else run.results}")
        results = read_object(run.results) or {}
        of_training = {} if "models" in results else results.get("sets", {})  # an evaluation shows its own
        for name, score in of_training.items():
            print(f"{name}: {score['top1']:.2f} % ({score['correct']} of {score['total']})")
        return 0
    if cancelled := run.cancelled():
        print(f"The run was cancelled by {cancelled['by']}; {latest_checkpoint(run)}")
    else:
        print(f"The run did not finish. {_failure_report(run, job)}")
    if would_recur(run, job):
        print(f"A new start would fail in the same way: remove the cause first. Then: {how_to_resume}")
    else:
        print(how_to_resume)
    return 1


def _failure_report(run: RunFolder, job: str) -> str:
    """The failure report of the job; without one, the end of the log that most probably has the error."""
    if report := report_of(run, job):
        return report.rstrip()
    logs = sorted((run.root / "jobs").glob(f"{job}_*_log.out"), key=_has_error, reverse=True)
    if not logs:
        return f"There is no log in {run.root / 'jobs'}."
    tail = logs[0].read_text(errors="replace").rstrip().splitlines()[-25:]
    return f"The end of {logs[0]}:\n" + "\n".join("  " + line for line in tail)


def _has_error(log: Path) -> tuple[bool, bool]:
    text = log.read_text(errors="replace")
    return any(f"{kind}Error" in text for kind in ("User", "Sample", "FloatingPoint")), "Traceback" in text
