"""Show a running job's progress from its run folder, and how it ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import submitit
from tqdm import tqdm

from cfmask.runs import RunFolder, read_lines


def follow_job(job: submitit.Job, run: RunFolder, *, local: bool) -> int:
    """A progress bar with loss, rate and ETA until the job ends; then its results, or why there are none.

    Args:
        local: the job runs on this machine; Ctrl-C ends it, after a checkpoint. On Slurm it goes on.

    Returns:
        0 if the run is finished, 1 if it failed, 130 if it was interrupted.
    """
    try:
        # In a file a bar is a line each time: there, a few of them.
        pace = 0.5 if sys.stderr.isatty() else 15
        with tqdm(unit="step", dynamic_ncols=True, desc="starting", mininterval=pace, miniters=0) as bar:
            while not job.done():
                time.sleep(0.5)
                _show(bar, run)
            _show(bar, run)
    except KeyboardInterrupt:
        if not local:
            print(f"The job goes on. Its progress: {run.log}")
            return 130
        print("Interrupted: the ranks save a checkpoint and end.", flush=True)
        os.kill(int(job.job_id), signal.SIGTERM)  # a local job's id is its controller's pid; it tells the ranks
        deadline = time.monotonic() + 60
        while not job.done() and time.monotonic() < deadline:
            time.sleep(0.1)
        print("The same command goes on from the last checkpoint.")
        return 130
    if run.results.exists():
        for name, score in json.loads(run.results.read_text())["sets"].items():
            print(f"{name}: {score['top1']:.2f} % ({score['correct']} of {score['total']})")
        print(f"finished: {run.final}")
        return 0
    print(f"The run did not finish. {_last_words(run, job)}")
    print("The same command goes on from the last checkpoint.")
    return 1


def _show(bar: tqdm, run: RunFolder) -> None:
    lines = [line for line in read_lines(run.log) if "loss" in line]
    if not lines:
        bar.update(0)  # the clock runs on
        return
    last = lines[-1]
    bar.set_description(run.root.name, refresh=False)
    bar.total = last["total_steps"]
    bar.n = last["step"]
    bar.set_postfix_str(
        f"loss {last['loss']:.3f}, {last['samples_per_s']:.0f} samples/s, ETA {last['eta_s']:.0f} s", refresh=False
    )
    bar.update(0)


def _last_words(run: RunFolder, job: submitit.Job) -> str:
    """The end of the log of the rank that has most to say about it."""
    logs = sorted((run.root / "jobs").glob(f"{job.job_id}_*_log.out"), key=_complains, reverse=True)
    if not logs:
        return f"There is no log in {run.root / 'jobs'}."
    tail = logs[0].read_text(errors="replace").rstrip().splitlines()[-25:]
    return f"The end of {logs[0]}:\n" + "\n".join("  " + line for line in tail)


def _complains(log: Path) -> tuple[bool, bool]:
    text = log.read_text(errors="replace")
    return any(f"{kind}Error" in text for kind in ("User", "Sample", "FloatingPoint")), "Traceback" in text
