#!/usr/bin/env python3
"""Submit training runs: to Slurm if `srun` is on the PATH, else to this machine.

    python launch/submit.py --shards DIR --nodes 2                        the paper's headline row, ViT-B/32
    python launch/submit.py --shards DIR --preset ft --seed 1             vanilla fine-tuning
    python launch/submit.py --presets ft fd-clean --seeds 0 1 2           six runs as one job array, a folder each
    python launch/submit.py --resume RUN                                  resume a run that stopped or failed
    python launch/submit.py --shards DIR --chain 5                        five jobs, each of which resumes the run

A cluster file (template: slurm/cluster.toml) has settings of the cluster and the path of its shards; flags override it.
The same command finds the same run folder again, and resumes from its last checkpoint. Settings that are unknown,
contradictory or without effect are refused before a job is queued.
"""

from __future__ import annotations

import argparse
import sys

try:
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from launch.submission.training import add_submit_arguments, submit
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def parser() -> argparse.ArgumentParser:
    p = CommandParser(__doc__)
    add_submit_arguments(p)
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    return submit(parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
