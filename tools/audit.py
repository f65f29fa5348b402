#!/usr/bin/env python3
"""Prove that runs were trained on each planned sample exactly once, across all their starts.

    python tools/audit.py RUN            its starts and epochs
    python tools/audit.py runs           a line for each training run in a folder

The receipts of all steps and checkpoints are compared with the plan, which follows from the recipe and the training
set. Samples that bad_samples.jsonl lists count as replaced. A checkpoint with a damaged state.json proves nothing. A
run that has not finished is compared up to its last step.

Exit status: 0 all runs are proven; 1 a run is not proven, and at which step; 2 a run is unknown, because it has never
started, or its files or its set are missing.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from cfmask.errors import UserError
    from cfmask.report.tables import table
    from cfmask.run_search import find_runs, is_evaluation
    from cfmask.runs import RunFolder
    from cfmask.runtime.command import CommandParser, exits_cleanly
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")

if TYPE_CHECKING:
    from cfmask.audit import Audit

# cfmask.audit is imported in functions: torch takes seconds to import, and --help does not need it.


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of them")
    arguments = parser.parse_args(argv)
    from cfmask.audit import NEVER_STARTED, NOT_PROVEN, UNKNOWN, Sets, audit

    found = find_runs(arguments.runs)
    runs = [run for run in found if not is_evaluation(run)]
    if not runs:
        raise UserError(f"{arguments.runs[0]} has no training run: evaluations train on nothing.")
    sets: Sets = {}
    audits = [audit(run, sets) for run in runs]
    if [run.root for run in found] == arguments.runs[:1]:
        show(runs[0], audits[0])
    else:
        rows = [[run.root.name, each.verdict, each.reached] for run, each in zip(runs, audits, strict=True)]
        print(table(["run", "verdict", "state"], rows))
        for run, each in zip(runs, audits, strict=True):
            if each.reached == NEVER_STARTED:
                continue  # the table says so
            print(*(f"\n{run.root.name}: {problem}" for problem in each.problems), sep="", end="")
        if len(runs) < len(found):
            print(f"\nEvaluations, which train on nothing: {len(found) - len(runs)}.")
        count = Counter(each.verdict for each in audits)
        print("\n" + ", ".join(f"{n} {verdict}" for verdict, n in count.items()))
    verdicts = {each.verdict for each in audits}
    return 1 if NOT_PROVEN in verdicts else 2 if UNKNOWN in verdicts else 0


def show(run: RunFolder, found: Audit) -> None:
    """Print the starts and epochs of a run. Raises UserError if the verdict is unknown."""
    from cfmask.audit import NOT_PROVEN, UNKNOWN, attempts

    if found.verdict == UNKNOWN:
        raise UserError(found.problems[0])
    print(*attempts(run), "", sep="\n")
    print(table(["epoch", "steps", "samples", "replaced", "verdict"], found.rows))
    if found.problems:
        print("", *found.problems, NOT_PROVEN, sep="\n")
    else:
        so_far = "" if found.reached.startswith("finished") else f" The run is {found.reached}."
        print(f"\nProven: the receipts of steps and checkpoints equal those of the plan.{so_far}")


if __name__ == "__main__":
    sys.exit(main())
