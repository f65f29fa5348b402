#!/usr/bin/env python3
"""Submit training runs: to Slurm where `srun` is there, to this machine otherwise.

    python launch/submit.py --shards DIR --nodes 2                        the paper's headline row, ViT-B/32
    python launch/submit.py --shards DIR --preset ft --seed 1             vanilla fine-tuning
    python launch/submit.py --presets ft fd-clean --seeds 0 1 2           six runs as one job array, a folder each
    python launch/submit.py --resume RUN                                  go on with a run, whatever became of it
    python launch/submit.py --shards DIR --chain 5                        five jobs, each of which resumes the run

A cluster file (slurm/cluster.toml is the template) says what a cluster is like, and where its shards are; flags win.
The same command again finds the same run folder, and goes on from its last checkpoint. Settings that are
unknown, contradictory or without effect are refused here, before a job is queued.
"""

from __future__ import annotations

import argparse
import sys

try:
    from cfmask.runtime.command import exits_cleanly
    from launch.submission.training import add_submit_arguments, submit
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_submit_arguments(p)
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    return submit(parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
