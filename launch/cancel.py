#!/usr/bin/env python3
"""Cancel a run, with a checkpoint if there is time.

    python launch/cancel.py RUN

A mark in the run folder (cancelled.json) prevents all jobs of the run from starting, training and requeueing. Running
jobs are asked to save a checkpoint and end, and are killed after --grace seconds. Pending jobs are removed from Slurm's
queue. `python launch/submit.py --resume RUN` removes the mark and resumes the run.

Exit codes: 0 the run has ended (or had before), 1 a job or process has not ended, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.run_search import find_runs
    from cfmask.runs import RunFolder
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from launch.state.cancellation import cancel_run
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    assert __doc__
    p = CommandParser(__doc__)
    p.add_argument("run", type=Path, metavar="RUN", help="run folder")
    p.add_argument(
        "--grace", type=float, default=120, metavar="S", help="seconds until running jobs are killed (default: 120)"
    )
    arguments = p.parse_args(argv)
    if not arguments.grace >= 0:
        raise UserError("--grace must be at least 0.")
    [run, *others] = find_runs([arguments.run])
    if others or run.root != arguments.run:
        raise UserError(f"{arguments.run} is a folder of runs. Name one of them.")
    return cancel_run(RunFolder(run.root.resolve()), arguments.grace)


if __name__ == "__main__":
    sys.exit(main())
