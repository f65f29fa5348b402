#!/usr/bin/env python3
"""Draw which package imports which: the diagram of docs/architecture.md.

    python3 tools/draw_architecture.py                       docs/architecture.svg
    python3 tools/draw_architecture.py --out /tmp/now.svg    another file

The code is read, not run. tests/test_architecture.py fails when the diagram is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.files import write_atomically
    from tools.diagram.imports import read_graph
    from tools.diagram.matrix import draw
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")

REPO = Path(__file__).resolve().parents[1]


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=REPO / "docs" / "architecture.svg",
        metavar="FILE",
        help="SVG file to write (default: docs/architecture.svg)",
    )
    arguments = parser.parse_args(argv)
    graph = read_graph(REPO)
    write_atomically(arguments.out, draw(graph))
    print(f"{arguments.out}: {len(graph.boxes)} packages, {len(graph.edges)} pairs of packages with imports")
    return 0


if __name__ == "__main__":
    sys.exit(main())
