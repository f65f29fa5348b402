"""Show a run's progress from its run folder while it goes on, and how it ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from cfmask.recipe import Recipe
from cfmask.runs import RunFolder, read_lines
from launch.jobs import failures as last_words
from launch.jobs.run_state import look_at
from launch.jobs.run_status import ENDED, status_of
from launch.jobs.status_table import latest_checkpoint

if TYPE_CHECKING:
    import submitit

_LOOK_S = 5
"""Between looks at a run's state. Two have to agree that it has ended: on a requeue there are moments without a job."""


def follow_job(job: submitit.Job, run: RunFolder, *, local: bool) -> int:
    """A progress bar with loss, rate and ETA until the job ends; then its results, or why there are none.

    Args:
        local: the job runs on this machine; Ctrl-C ends it, after a checkpoint. On Slurm the run is followed, whatever
            becomes of this job, and Ctrl-C leaves it alone.

    Returns:
        0 if the run is finished, 1 if it failed or was cancelled, 130 if it was interrupted.
    """
    if not local:
        return follow_run(run)

    def states() -> Iterator[str]:
        while not job.done():
            yield ""

    try:
        _watch(run, states())
    except KeyboardInterrupt:
        print("Interrupted: the ranks save a checkpoint and end.", flush=True)
        deadline = time.monotonic() + 60
        while not job.done() and time.monotonic() < deadline:
            # A local job's id is its controller's pid; it tells the ranks, and in their first second they are deaf.
            os.kill(int(job.job_id), signal.SIGTERM)
            time.sleep(0.5)
        print("The same command goes on from the last checkpoint.")
        return 130
    return tell_end(run, job.job_id, "The same command goes on from the last checkpoint.")


def follow_run(run: RunFolder) -> int:
    """The same for a run that anyone has started, on Slurm or on this machine, from its first start to its end.

    Returns:
        As ``follow_job``. Ctrl-C leaves the run alone.
    """
    try:
        _watch(run, _states(run))
    except KeyboardInterrupt:
        print(f"The run goes on. Its progress: {run.log}")
        return 130
    [run_state], _ = look_at([run])
    name = run_state.last_job or (run_state.jobs.slurm or ("",))[-1]
    return tell_end(run, name, f"`python launch/submit.py --resume {run.root}` goes on from its last checkpoint.")


def _states(run: RunFolder) -> Iterator[str]:
    """What there is to say beside the progress, as often as it is asked for, until the run has ended."""
    ended = 0
    while True:
        [run_state], slurm = look_at([run])
        status = status_of(run_state, slurm)
        ended = ended + 1 if status.state in ENDED else 0
        if ended == 2 or status.state == "finished":
            return
        until = time.monotonic() + _LOOK_S
        while time.monotonic() < until:
            yield "" if status.state == "running" else ", ".join(filter(None, [status.state, status.next_start]))


def _watch(run: RunFolder, states: Iterator[str]) -> None:
    # In a file a bar is a line each time: there, a few of them.
    pace = 0.5 if sys.stderr.isatty() else 15
    unit = "step" if isinstance(run.work(), Recipe) else "image"
    with tqdm(unit=unit, dynamic_ncols=True, desc="starting", mininterval=pace, miniters=0) as bar:
        for state in states:
            time.sleep(0.5)
            _show(bar, run, state)
        _show(bar, run, "")


def _show(bar: tqdm, run: RunFolder, state: str) -> None:
    lines = [line for line in read_lines(run.log, tail=1 << 16) if "eta_s" in line]
    if lines:
        last = lines[-1]
        bar.total = last["total_steps"]
        bar.n = last["step"]
        loss = f"loss {last['loss']:.3f}, " if "loss" in last else ""  # not of an evaluation, or a step left out
        bar.set_postfix_str(f"{loss}{last['samples_per_s']:.0f} samples/s, ETA {last['eta_s']:.0f} s", refresh=False)
    if lines or state:
        bar.set_description(f"{run.root.name} ({state})" if state else run.root.name, refresh=False)
    bar.update(0)  # the clock runs on


def tell_end(run: RunFolder, job: str, how_to_go_on: str) -> int:
    if run.results.exists():
        if isinstance(run.work(), Recipe):
            for name, score in json.loads(run.results.read_text())["sets"].items():
                print(f"{name}: {score['top1']:.2f} % ({score['correct']} of {score['total']})")
        print(f"finished: {run.final if run.final.exists() else run.results}")
        return 0
    if told := run.cancelled():
        print(f"The run was cancelled by {told['by']}; {latest_checkpoint(run)}")
    else:
        print(f"The run did not finish. {_last_words(run, job)}")
    print(how_to_go_on)
    return 1


def _last_words(run: RunFolder, job: str) -> str:
    """Those of the rank that died first; where nobody has left any, the end of the log that says most."""
    if told := last_words.told(run, job):
        return told.rstrip()
    logs = sorted((run.root / "jobs").glob(f"{job}_*_log.out"), key=_complains, reverse=True)
    if not logs:
        return f"There is no log in {run.root / 'jobs'}."
    tail = logs[0].read_text(errors="replace").rstrip().splitlines()[-25:]
    return f"The end of {logs[0]}:\n" + "\n".join("  " + line for line in tail)


def _complains(log: Path) -> tuple[bool, bool]:
    text = log.read_text(errors="replace")
    return any(f"{kind}Error" in text for kind in ("User", "Sample", "FloatingPoint")), "Traceback" in text
