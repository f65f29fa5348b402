#!/usr/bin/env python3
"""The paper's tables by one command: every row's runs and evaluations as jobs that wait for each other.

    python launch/reproduce.py --arch ViT-B-32 --seeds 0 1 2 --shards DIR --nodes 2      all rows, 83 jobs
    python launch/reproduce.py --arch ViT-B-32 --shards DIR --rows wise-kd               one, and what it needs
    python launch/reproduce.py … --dry-run                                               what would be done, its cost
    python launch/reproduce.py … --follow                                                stay and watch

The same command again submits what is missing, failed or was cancelled, and nothing else, and draws the table of what
is there: OUT/table.md, table.tex, results.json, bars.png. All that it knows of a job stands in that job's run folder.
Without Slurm the same jobs are done one after the other.

A held-out set is needed (make_shards.py --holdout 10240), so that 1,270,927 images of ImageNet are trained on. Runs are
evaluated on it at the ends of their epochs, and rows are of the checkpoint that is best there, as the authors'; with
--checkpoint last, of the last one.

Flags of submit.py apply to all training runs, but for those that a row decides. Runs that wait for the same jobs are an
array; --array-parallelism says how many of its members may run at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.runtime.command import exits_cleanly
    from launch.allocation.cluster_file import load_cluster_file
    from launch.allocation.resolve import resolve_allocation, warn_of_paths_outside
    from launch.allocation.settings import add_allocation_arguments
    from launch.paper.estimate import CPU_TFLOPS, GPU_TFLOPS, estimate
    from launch.paper.execution import describe_arrays, run_here, submit_jobs
    from launch.paper.holdout import add_holdout_arguments
    from launch.paper.plan import LABELS, arrays, to_submit
    from launch.paper.progress import count_jobs, follow, overview, read_statuses, states_of
    from launch.paper.reproduction import ARCHITECTURES, SETS, Reproduction, settle_flags
    from launch.paper.table import write_table
    from launch.submission.recipe_arguments import add_recipe_arguments
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        help="OpenAI's CLIP of this size; where there is no network, with --pretrained and its weights",
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2, the paper's")
    p.add_argument("--rows", nargs="+", choices=list(LABELS), metavar="ROW", help=f"default: all. {', '.join(LABELS)}")
    p.add_argument(
        "--sets",
        nargs="+",
        default=list(SETS),
        metavar="SET",
        help=f"folders under --shards to evaluate on; the first is the one in distribution (default: {' '.join(SETS)})",
    )
    p.add_argument(
        "--soup",
        type=Path,
        metavar="FILE",
        help="a model soup to start from: a cfmask model file, or a state dict of tower and head such as the authors' "
        "of model soups, whose classes are those of the shards in their order (default: the average of the FT models)",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="the plan's folder (default: reproductions/<model>)")
    p.add_argument("--dry-run", action="store_true", help="check everything, show the plan and its cost, queue nothing")
    p.add_argument("--follow", action="store_true", help="on Slurm: stay and show the jobs until none is left")
    p.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="TFLOP/s of a GPU (of a rank on CPUs) that the estimate of the cost assumes (default: as measured in the "
        f"plan's runs; before there are any, {GPU_TFLOPS:g}, {CPU_TFLOPS:g} on CPUs)",
    )
    p.add_argument("--allow-count-mismatch", action="store_true", help="take known sets that have other counts")
    add_holdout_arguments(p)
    add_allocation_arguments(p)
    add_recipe_arguments(p)
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all is done or under way, 1 if a job failed, 130 if it was interrupted."""
    arguments = parser().parse_args(argv)
    settle_flags(arguments)
    file = load_cluster_file(arguments.cluster)
    allocation = resolve_allocation(arguments, file)
    if arguments.follow and not allocation.on_slurm:
        raise UserError("--follow would do nothing: on this machine jobs are done one after the other, and shown.")
    reproduction = Reproduction.of(arguments, file, allocation)
    statuses = read_statuses(reproduction)
    states = states_of(statuses)
    reproduction.check(states)
    warn_of_paths_outside(allocation, reproduction.setup.folder, reproduction.base.data.shards)
    print(overview(reproduction, statuses))
    print(reproduction.selection)
    print(estimate(reproduction, statuses, arguments.tflops))
    chosen = to_submit(reproduction.plan, states)
    if arguments.dry_run:
        how = describe_arrays(arrays(chosen, states)) if allocation.on_slurm else ""
        print(f"Would submit {count_jobs(len(chosen))}{how}. Everything checked; nothing was queued.")
        return 0
    code = 0
    if chosen:
        with reproduction.locked():
            statuses = read_statuses(reproduction)  # another command may have submitted jobs since
            reproduction.make_soup()
            code = (submit_jobs if allocation.on_slurm else run_here)(reproduction, statuses)
    if arguments.follow and not code:
        code = follow(reproduction)
    write_table(reproduction)
    return code


if __name__ == "__main__":
    sys.exit(main())
