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

A job's number with (+2) behind it: two more jobs of the run wait for its end (submit.py --chain).

`submit.py --resume RUN` resumes any of them that has ended and is not finished.

All of this stands in run folders; what Slurm alone knows comes from one squeue, and one sacct where a job has ended
without a word. Nothing here needs torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.runs import RunFolder
    from cfmask.runtime.command import exits_cleanly
    from launch.state.facts import find_runs, look_at
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
    what.add_argument("--attempts", action="store_true", help="each start of each run")
    what.add_argument("--follow", action="store_true", help="a progress bar of one run until it has ended")
    what.add_argument("--json", action="store_true", help="an object a line instead of a table")
    arguments = p.parse_args(argv)
    runs = find_runs(arguments.runs)
    if arguments.follow:
        if len(runs) != 1:
            raise UserError(f"--follow shows one run, and here are {len(runs)}. Name one of them.")
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
        print("note: Slurm cannot be asked from here: what waits in its queue is unknown.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
