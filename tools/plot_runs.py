#!/usr/bin/env python3
"""Draw loss and accuracy of runs over steps.

    python tools/plot_runs.py RUN RUN … --out curves.png

The same values are in RUN/tensorboard, and in RUN/log.jsonl with one line for each step.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from cfmask.runtime.command import CommandParser, exits_cleanly
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=Path, default=Path("curves.png"), metavar="FILE", help="image file to write (default: curves.png)"
    )
    arguments = parser.parse_args(argv)
    from cfmask.report.curves import draw_curves  # matplotlib takes a second to import

    draw_curves(arguments.out, arguments.runs)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
