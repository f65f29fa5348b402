#!/usr/bin/env python3
"""End a run for good, with a checkpoint if there is time.

    python launch/cancel.py RUN

A mark in the run folder (cancelled.json) keeps every job of the run from starting, training on or requeueing; whatever
trains is asked to save a checkpoint and end, and is killed after --grace seconds if it has not; what waits in Slurm's
queue leaves it. `python launch/submit.py --resume RUN` takes the mark away and goes on.

Exit codes: 0 the run has ended (or had before), 1 something of it is still there, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.runs import RunFolder
    from cfmask.runtime.command import exits_cleanly
    from launch.state.cancellation import cancel_run
    from launch.state.facts import find_runs
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    assert __doc__
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("run", type=Path, metavar="RUN", help="run folder")
    p.add_argument(
        "--grace", type=float, default=120, metavar="S", help="seconds for a checkpoint before the kill (default: 120)"
    )
    arguments = p.parse_args(argv)
    [run, *others] = find_runs([arguments.run])
    if others or run.root != arguments.run:
        raise UserError(f"{arguments.run} is a folder of runs. Name one of them.")
    return cancel_run(RunFolder(run.root.resolve()), arguments.grace)


if __name__ == "__main__":
    sys.exit(main())
