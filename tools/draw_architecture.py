#!/usr/bin/env python3
"""Draw which package imports which, as the code has it now: the diagram of docs/architecture.md.

    python3 tools/draw_architecture.py                       docs/architecture.svg
    python3 tools/draw_architecture.py --out /tmp/now.svg    elsewhere

Needs nothing but Python: the code is read, not run. tests/test_architecture.py says when it has to be drawn again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
try:
    from cfmask.runtime.command import exits_cleanly
    from cfmask.runtime.files import write_atomically
    from tools.diagram.imports import read_graph
    from tools.diagram.svg import draw
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    print(f"{arguments.out}: {len(graph.boxes)} boxes, {len(graph.edges)} pairs of boxes with imports")
    return 0


if __name__ == "__main__":
    sys.exit(main())
