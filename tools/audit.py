#!/usr/bin/env python3
"""Prove that a run was trained on each planned sample exactly once, across all its starts.

    python tools/audit.py RUN

The receipts of all steps and checkpoints are compared with the plan, which follows from the recipe and the training
set. Samples that bad_samples.jsonl lists count as replaced. A checkpoint with a damaged state.json proves nothing.

Exit status: 0 proven; 1 not proven, and at which step; 2 unknown, because the run or its set is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from cfmask.audit import attempts, audit
    from cfmask.report.tables import table
    from cfmask.runs import RunFolder
    from cfmask.runtime.command import CommandParser, exits_cleanly
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    run = RunFolder(parser.parse_args(argv).run)
    rows, problems = audit(run)
    print(*attempts(run), "", sep="\n")
    print(table(["epoch", "steps", "samples", "replaced", "verdict"], rows))
    if problems:
        print("", *problems, "NOT PROVEN", sep="\n")
        return 1
    print("\nProven: the receipts of steps and checkpoints equal those of the plan.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
