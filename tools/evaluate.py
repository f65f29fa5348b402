#!/usr/bin/env python3
"""Top-1 accuracy of models on sets of shards, each sample counted once.

python tools/evaluate.py RUN RUN/initial.safetensors --shards DIR --sets val sketch
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfmask.errors import exits_cleanly  # noqa: E402
from cfmask.files import write_atomically  # noqa: E402
from tools._shared import MODEL_HELP, add_data_arguments, data_arguments, evaluate_sets, load_models, table  # noqa: E402


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the counts here as JSON")
    arguments = parser.parse_args(argv)

    models, info = load_models(arguments.models)
    scores = evaluate_sets(models, info, **data_arguments(arguments))
    rows = [[path, *(f"{scores[name][i].top1:.2f}" for name in scores)] for i, path in enumerate(arguments.models)]
    print(table(["top-1 %", *(f"{name} ({scores[name][0].total})" for name in scores)], rows))
    if arguments.out:
        counts = {
            path: {
                name: {"correct": s[i].correct, "total": s[i].total, "top1": s[i].top1} for name, s in scores.items()
            }
            for i, path in enumerate(arguments.models)
        }
        write_atomically(arguments.out, json.dumps(counts, indent=2))


if __name__ == "__main__":
    sys.exit(main())
