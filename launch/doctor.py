#!/usr/bin/env python3
"""Check a cluster from the machine on which runs are submitted, and print what to change.

    python launch/doctor.py --nodes 2             with submit.py's flags and cluster file
    python launch/doctor.py --nodes 2 --no-probe  only what Slurm answers without a job
    python launch/doctor.py --executor local      this machine
    python launch/doctor.py --json                one JSON object per line, for scripts

First, Slurm's settings are checked: partition, time limit, nodes of the requested size, preemption (mode, warning
signal, grace), requeue, accounting, and whether sbatch accepts the file that submit.py would send. Then a job of a
minute is started like a run (the same sbatch file, srun arguments, environment, container, Python and code snapshot).
Every rank reports its software, cores, memory, GPUs, the shared folder and how soon nodes see each other's files, free
space, clocks, the process group, and an all-reduce. At the end the job requeues itself, and is cancelled. Its files are
removed unless there was a problem.

Exit codes: 0 no problems (there may be warnings), 1 problems, 2 invalid flags or cluster file, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from launch.allocation.cluster_file import announce, load_cluster_file
    from launch.allocation.resolve import resolve_allocation
    from launch.allocation.settings import add_allocation_arguments
    from launch.checks.examination import examine, shared_folder
    from launch.checks.findings import Findings
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")

_NO_USE = (
    *("dependency", "array_parallelism", "restarts_without_progress", "rendezvous_timeout", "collective_timeout"),
    *("notify", "wandb", "after"),
)
"""Flags of submit.py that have no effect on a probe."""


def parser() -> argparse.ArgumentParser:
    p = CommandParser(__doc__)
    p.add_argument("--shared", type=Path, metavar="DIR", help="folder for runs (default: ./runs if it exists, else .)")
    p.add_argument(
        "--wait", type=float, default=300, metavar="S", help="seconds that the job may wait in the queue (default: 300)"
    )
    p.add_argument("--no-probe", action="store_true", help="do not queue a job")
    p.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    add_allocation_arguments(p)
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    # An exception, as for Ctrl-C: so that the queued probe is cancelled.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = parser().parse_args(argv)
    if idle := [f"--{name.replace('_', '-')}" for name in _NO_USE if getattr(arguments, name)]:
        raise UserError(f"{', '.join(idle)} would do nothing here. Remove it.")
    file = load_cluster_file(arguments.cluster)
    allocation = resolve_allocation(arguments, file)
    announce(file)
    findings = Findings(as_json=arguments.json)
    examine(
        findings,
        allocation,
        file,
        executor=arguments.executor,
        shared=shared_folder(arguments.shared),
        probe=not arguments.no_probe,
        wait_s=arguments.wait,
    )
    return findings.sum_up()


if __name__ == "__main__":
    sys.exit(main())
