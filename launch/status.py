#!/usr/bin/env python3
"""Show runs: their progress, accuracy, state, why their starts ended, and when they start next.

    python launch/status.py                    all runs in runs/, the last submitted first
    python launch/status.py RUN [RUN…]         these runs, or all in a folder of runs
    python launch/status.py --match 'ft-*'     runs with such names; without * and ?, names that contain the text
    python launch/status.py --running --failed runs in one of these states
    python launch/status.py RUN --attempts     each start: when, where, from which step to which, why it ended
    python launch/status.py RUN --follow       a progress bar, across requeues, until the run has ended
    python launch/status.py --html runs.html   a page of the runs: states, curves, starts, recipes, in one file
    python launch/status.py --json             a JSON list with an object for each run, for scripts

"best" is the top-1 accuracy at the best epoch so far, on the set that chooses it (--best-on), or on val.

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
    unknown         only Slurm knows, and it does not answer here; or the folder cannot be read

On a terminal the table fits the window: a wide one shows more columns, a narrow one fewer, and a reason that does not
fit is below its run. A pipe or file gets everything in full. NO_COLOR=1 switches colours off. (+2) after a job's
number: two more jobs of the run wait for its end (submit.py --chain).

`submit.py --resume RUN` resumes a run that has ended and is not finished.

The information comes from run folders, one squeue, and one sacct if a job has ended without a recorded reason. torch is
not needed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.run_search import find_runs
    from cfmask.runs import RunFolder
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.jsonl import finite
    from launch.state.facts import look_at, matching
    from launch.state.status import FAILED, newest_first, status_of
    from launch.state.table import attempts_table, table, totals
    from launch.state.terminal import Terminal, wrap
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    assert __doc__
    p = CommandParser(__doc__)
    p.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them (default: runs)")
    p.add_argument("--match", metavar="PATTERN", help="show only runs whose names match, as in a shell")
    p.add_argument("--running", action="store_true", help="show only runs whose job runs")
    p.add_argument("--failed", action="store_true", help="show only runs that failed or died")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--attempts", action="store_true", help="show each start of each run")
    what.add_argument("--follow", action="store_true", help="show a progress bar of one run until it has ended")
    what.add_argument("--json", action="store_true", help="print a JSON list of the runs instead of a table")
    what.add_argument("--html", type=Path, metavar="FILE", help="write a page of the runs, which needs no other file")
    arguments = p.parse_args(argv)
    every = find_runs(arguments.runs)
    runs = matching(every, arguments.match) if arguments.match else every
    every_state = not (arguments.running or arguments.failed)
    if arguments.follow and every_state:
        return _follow(runs)
    found, slurm = look_at(runs, history=arguments.attempts or bool(arguments.html))
    shown = [(each, status_of(each, slurm)) for each in newest_first(found)]
    shown = [
        (each, status)
        for each, status in shown
        if every_state or (arguments.running and status.runs) or (arguments.failed and status.state in FAILED)
    ]
    statuses = [status for _, status in shown]
    if arguments.follow:
        return _follow([run_state.run for run_state, _ in shown])
    if arguments.json:
        print("[" + ",\n ".join(json.dumps(finite(asdict(status))) for status in statuses) + "]")
        return 0
    if arguments.html:
        from launch.state.page import write_runs_page  # matplotlib takes a second to import

        write_runs_page(arguments.html, shown, slurm, len(every))
    terminal = Terminal.of(sys.stdout)
    if statuses:
        print(table(statuses, terminal))
    if arguments.attempts:
        for run_state, status in shown:
            print(f"\n{status.run}\n{attempts_table(run_state, status, slurm, terminal)}")
    ends = [totals(statuses, len(every))]
    if slurm.queue is None and any(f.jobs.slurm and not f.finished for f in found):
        ends.append("note: Slurm does not answer here: pending jobs are unknown.")
    print("\n".join(line for end in ends for line in wrap(end, terminal.width, indent=0)))
    return 0


def _follow(runs: list[RunFolder]) -> int:
    if len(runs) != 1:
        raise UserError(f"--follow shows one run, but {len(runs)} are given. Name one of them.")
    from launch.state.follow import follow_run

    return follow_run(RunFolder(runs[0].root.resolve()))


if __name__ == "__main__":
    sys.exit(main())
