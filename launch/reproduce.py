#!/usr/bin/env python3
"""Reproduce the paper's tables: submit the runs and evaluations of all rows as jobs that depend on each other.

    python launch/reproduce.py --arch ViT-B-32 --seeds 0 1 2 --shards DIR --nodes 2      all rows, 83 jobs
    python launch/reproduce.py --arch ViT-B-32 --shards DIR --rows wise-kd               one row, and what it needs
    python launch/reproduce.py … --dry-run                                               show the plan and its cost
    python launch/reproduce.py … --follow                                                stay and show the jobs

Repeating the command submits only jobs that are missing, failed or cancelled, and writes the table of the results so
far: OUT/table.md, table.tex, results.json, and OUT/index.html, a page with everything. The state of a job is in its run
folder. Without Slurm, the jobs run one after the other on this machine.

A held-out set is required (make_shards.py --holdout 10240), which leaves 1,270,927 images of ImageNet to train on. Runs
are evaluated on it at the end of each epoch, and rows are of the checkpoint that is best on it, like the authors'; with
--checkpoint last, of the last one.

The flags of submit.py apply to all training runs, except those that a row decides. Runs that wait for the same jobs
form an array; --array-parallelism limits how many of its members run at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.presets import canonical_name
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from launch.allocation.cluster_file import announce, load_cluster_file
    from launch.allocation.resolve import resolve_allocation, warn_of_paths_outside
    from launch.allocation.settings import add_allocation_arguments
    from launch.paper.estimate import CPU_TFLOPS, GPU_TFLOPS, estimate
    from launch.paper.execution import describe_arrays, run_here, submit_jobs
    from launch.paper.holdout import add_holdout_arguments
    from launch.paper.page import write_report
    from launch.paper.plan import LABELS, arrays, to_submit
    from launch.paper.progress import count_jobs, follow, overview, read_statuses, states_of
    from launch.paper.reproduction import ARCHITECTURES, SETS, Reproduction, settle_flags
    from launch.paper.table import published_line
    from launch.submission.recipe_arguments import add_recipe_arguments
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


INCOMPLETE = 3
"""Exit status of a dry run if sets or weights are missing."""


def parser() -> argparse.ArgumentParser:
    p = CommandParser(__doc__)
    p.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        help="OpenAI's CLIP of this size; without network access, also give --pretrained and its weights",
    )
    p.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds (default: 0 1 2, as in the paper)"
    )
    p.add_argument(
        "--rows",
        nargs="+",
        type=canonical_name,
        choices=list(LABELS),
        metavar="ROW",
        help=f"rows of the table (default: all): {', '.join(LABELS)}",
    )
    p.add_argument(
        "--sets",
        nargs="+",
        default=list(SETS),
        metavar="SET",
        help=f"folders under --shards to evaluate on; the first is in distribution (default: {' '.join(SETS)})",
    )
    p.add_argument(
        "--soup",
        type=Path,
        metavar="FILE",
        help="a model soup to start from: a cfmask model file, or a state dict of tower and head, like those of the "
        "authors of model soups, with the classes of the shards in their order (default: the average of the FT models)",
    )
    p.add_argument("--fit-on", choices=("published",), help="also draw effective robustness, above the published line")
    p.add_argument("--out", type=Path, metavar="DIR", help="the plan's folder (default: reproductions/<model>)")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and show the plan, the cost of its rows, and what is missing (then the exit status is "
        "3); nothing is queued, and neither shards nor weights are needed",
    )
    p.add_argument("--follow", action="store_true", help="on Slurm: stay and show the jobs until all have ended")
    p.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="TFLOP/s per GPU (per rank on CPUs) for the estimate of the cost (default: as measured in the plan's "
        f"runs; before that {GPU_TFLOPS:g}, or {CPU_TFLOPS:g} on CPUs)",
    )
    p.add_argument(
        "--allow-count-mismatch", action="store_true", help="accept known sets with unexpected numbers of images"
    )
    add_holdout_arguments(p)
    add_allocation_arguments(p)
    add_recipe_arguments(p)
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all jobs are done or queued, 1 if a job failed, 130 if interrupted, and for a dry run 3 if sets or
    weights are missing."""
    arguments = parser().parse_args(argv)
    settle_flags(arguments)
    file = load_cluster_file(arguments.cluster)
    allocation = resolve_allocation(arguments, file)
    if arguments.follow and not allocation.on_slurm:
        raise UserError("--follow would do nothing: without Slurm, the command runs and shows the jobs itself.")
    reproduction = Reproduction.of(arguments, file, allocation)
    statuses = read_statuses(reproduction)
    states = states_of(statuses)
    to_do = reproduction.to_do() if arguments.dry_run else []
    reproduction.check(states, to_do)
    line = published_line(reproduction) if arguments.fit_on else None
    warn_of_paths_outside(allocation, reproduction.setup.folder, reproduction.base.data.shards)
    announce(file)
    print(overview(reproduction, statuses), reproduction.selection, sep="\n")
    cost = estimate(reproduction, statuses, arguments.tflops)
    print(f"\n{cost}\n{reproduction.materials}" if arguments.dry_run else cost.note)
    chosen = to_submit(reproduction.plan, states)
    if arguments.dry_run:
        how = describe_arrays(arrays(chosen, states)) if allocation.on_slurm else ""
        if to_do:
            print(f"\nTo do before {count_jobs(len(chosen))}{how} can be submitted (docs/reproduce.md):\n")
            print("\n".join(f"    {line}" for line in to_do))
            return INCOMPLETE
        print(f"Would submit {count_jobs(len(chosen))}{how}. Everything checked; nothing was queued.")
        return 0
    code = 0
    if chosen:
        with reproduction.locked():
            statuses = read_statuses(reproduction)  # another command may have submitted jobs since
            reproduction.make_soup()
            code = (submit_jobs if allocation.on_slurm else run_here)(reproduction, statuses)
    code = follow(reproduction) if arguments.follow and not code else code
    write_report(reproduction, arguments.tflops, line)
    return code


if __name__ == "__main__":
    sys.exit(main())
