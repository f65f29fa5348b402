#!/usr/bin/env python3
"""Draw loss and accuracy of runs over steps.

    python tools/plot_runs.py RUN RUN … --out curves.png
    python tools/plot_runs.py runs                              all runs in a folder

A line is named by its preset. Runs that differ in their seed alone are one line, with a band of one standard deviation.
Runs without a logged step, and evaluations, are left out and named.

The same values are in RUN/tensorboard, and in RUN/log.jsonl with one line for each step.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from cfmask.run_search import find_runs
    from cfmask.runtime.command import CommandParser, exits_cleanly
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of them")
    parser.add_argument(
        "--out", type=Path, default=Path("curves.png"), metavar="FILE", help="image file to write (default: curves.png)"
    )
    arguments = parser.parse_args(argv)
    found = find_runs(arguments.runs)
    from cfmask.report.curves import draw_curves  # matplotlib takes a second to import

    for note in draw_curves(arguments.out, found):
        print(f"note: {note}", file=sys.stderr)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
