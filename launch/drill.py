#!/usr/bin/env python3
"""Inject faults into small training runs on Slurm, and check that each run ends with weights that are bitwise identical
to those of an undisturbed run.

    python launch/drill.py --nodes 2                                   all drills that need no special rights
    python launch/drill.py --nodes 2 --preempt-with='--partition=high' also preemptions, by a job with these arguments
    python launch/drill.py --drills requeued rank-killed               these drills
    python launch/drill.py --list                                      list all drills and what they need

All other flags are submit.py's, and the cluster file is read as by submit.py. On the Slurm of slurm/cluster.py, drills
that need an administrator are done as well: they kill nodes and the controller, and fill a disk.

Exit codes: 0 every drill passed, 1 a drill failed, 2 invalid flags, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from launch.allocation.cluster_file import announce, load_cluster_file
    from launch.allocation.resolve import resolve_allocation
    from launch.drills.cluster import DevCluster
    from launch.drills.environment import RECIPE, STEPS, DrillEnvironment
    from launch.drills.materials import make_materials
    from launch.drills.report import draw, table
    from launch.drills.runner import run_drills
    from launch.drills.scenarios import DRILLS
    from launch.submission.training import add_submit_arguments
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def parser() -> CommandParser:
    p = CommandParser(__doc__)
    names = [drill.name for drill in DRILLS]
    p.add_argument("--drills", nargs="+", choices=names, metavar="NAME", help="drills to do (default: all possible)")
    p.add_argument("--list", action="store_true", help="list all drills and exit")
    p.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="new folder that all nodes see, for runs, table and chart (default: drills/<time>)",
    )
    p.add_argument(
        "--preempt-with",
        type=shlex.split,
        metavar="ARGS",
        help="sbatch arguments of a job that preempts the runs, as in --preempt-with='--partition=high'",
    )
    p.add_argument(
        "--pace",
        type=float,
        default=0.25,
        metavar="S",
        help=f"seconds that a run waits at each of its {STEPS} steps, to leave time for faults (default: 0.25)",
    )
    p.add_argument("--at-once", type=int, default=1, metavar="N", help="number of drills at the same time (default: 1)")
    p.add_argument(
        "--patience", type=float, default=15, metavar="MIN", help="minutes after which a wait fails (default: 15)"
    )
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    arguments, rest = parser().parse_known_args(argv)
    if arguments.list:
        for drill in DRILLS:
            needs = {"preempt": " (--preempt-with)", "cluster": " (slurm/cluster.py)"}.get(drill.needs, "")
            print(f"{drill.name:25}{drill.what}{needs}")
        return 0
    nodes = _checked_nodes(rest)
    cluster = DevCluster.find()
    preempt_with = arguments.preempt_with or (["--partition=high"] if cluster else [])
    folder = (arguments.folder or Path("drills") / time.strftime("%Y%m%d-%H%M%S")).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Give a new folder with --folder.")
    env = DrillEnvironment(folder, (), nodes, cluster, preempt_with, arguments.pace, 60 * arguments.patience)
    asked = [drill for drill in DRILLS if not arguments.drills or drill.name in arguments.drills]
    skipped = [(drill, why) for drill in asked if (why := env.lacks(drill))]
    if arguments.drills and skipped:
        reasons = "; ".join(f"{drill.name} {why}" for drill, why in skipped)
        raise UserError(f"{reasons}. Remove it from --drills, or give what it needs.")
    folder.mkdir(parents=True, exist_ok=True)
    env = dataclasses.replace(env, flags=(*make_materials(folder / "materials", per_class=160), *RECIPE, *rest))
    results = run_drills([drill for drill in asked if not env.lacks(drill)], env, at_once=arguments.at_once)
    shown = table(results, skipped)
    (folder / "drills.md").write_text(shown + "\n")
    draw(results, folder / "drills.png")
    print(f"\n{shown}\n\n{folder / 'drills.md'}, {folder / 'drills.png'}")
    return 1 if any(result.problems for result in results) else 0


def _checked_nodes(flags: Sequence[str]) -> int:
    """The number of nodes in submit.py's flags.

    Raises:
        UserError: the flags are not for Slurm.
    """
    submit_parser = CommandParser(prog="submit.py", see_also=parser().flags)
    add_submit_arguments(submit_parser)
    arguments = submit_parser.parse_args(list(flags))
    if arguments.dry_run or arguments.resume:
        raise UserError(
            "--dry-run and --resume would do nothing here: drills submit runs of their own. Leave them out."
        )
    file = load_cluster_file(arguments.cluster)
    allocation = resolve_allocation(arguments, file)
    if not allocation.on_slurm:
        raise UserError(
            "Drills need Slurm. Run this on a login node, or start a Slurm on this machine: "
            "python3 slurm/cluster.py up (slurm/README.md)."
        )
    announce(file)
    return allocation.nodes


if __name__ == "__main__":
    sys.exit(main())
