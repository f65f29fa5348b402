#!/usr/bin/env python3
"""Show runs: their progress, speed, why their starts ended, and when they start next.

    python launch/status.py                    all runs in runs/
    python launch/status.py RUN [RUN…]         these runs, or all in a folder of runs
    python launch/status.py RUN --attempts     each start: when, where, from which step to which, why it ended
    python launch/status.py RUN --follow       a progress bar, across requeues, until the run has ended
    python launch/status.py --json             a JSON object for each run, for scripts

The states of a run:

    never started   there is no job
    queued          waits for its first start
    requeued        waits in the queue to resume
    starting        its job runs, training has not begun
    running         trains, and its heartbeat is fresh
    ending          training has ended, its job has not
    finished        has its results
    cancelling      was cancelled (launch/cancel.py); its job has not ended yet
    cancelled       was cancelled, and its jobs have ended
    stopped         ended by a signal or scancel
    failed          ended with an error
    dead            no job, no heartbeat, and no recorded end
    unknown         only Slurm knows, and it does not answer here

(+2) after a job's number: two more jobs of the run wait for its end (submit.py --chain).

`submit.py --resume RUN` resumes a run that has ended and is not finished.

The information comes from run folders, one squeue, and one sacct if a job has ended without a recorded reason. torch is
not needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.run_search import find_runs
    from cfmask.runs import RunFolder
    from cfmask.runtime.command import exits_cleanly
    from launch.state.facts import look_at
    from launch.state.status import status_of
    from launch.state.table import attempts_table, table
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    assert __doc__
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them (default: runs)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--attempts", action="store_true", help="show each start of each run")
    what.add_argument("--follow", action="store_true", help="show a progress bar of one run until it has ended")
    what.add_argument("--json", action="store_true", help="print a JSON object for each run instead of a table")
    arguments = p.parse_args(argv)
    runs = find_runs(arguments.runs)
    if arguments.follow:
        if len(runs) != 1:
            raise UserError(f"--follow shows one run, but {len(runs)} are given. Name one of them.")
        from launch.state.follow import follow_run

        return follow_run(RunFolder(runs[0].root.resolve()))
    found, slurm = look_at(runs, history=arguments.attempts)
    statuses = [status_of(each, slurm) for each in found]
    if arguments.json:
        for status in statuses:
            print(json.dumps(asdict(status)))
        return 0
    print(table(statuses))
    if arguments.attempts:
        for run_state, status in zip(found, statuses, strict=True):
            print(f"\n{status.run}\n{attempts_table(run_state, status, slurm)}")
    for status in statuses:
        for note in status.notes:
            print(f"note: {status.run}: {note}")
        if status.straggler:
            print(f"note: {status.run}: slowest: {status.straggler}")
    if slurm.queue is None and any(f.jobs.slurm and not f.finished for f in found):
        print("note: Slurm does not answer here: pending jobs are unknown.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
