"""The entry point of every rank: verifies the code that this file is part of, makes it the code of the job, and starts
the rank under its supervisor (supervisor.py).

    PYTHONPATH=CODE python -u CODE/launch/ranks/start.py -u -m submitit.core._submit RUN/jobs

CODE is RUN/code/0123456789ab. It comes first on PYTHONPATH (sbatch.rank_command), before what is installed.

submitit's own command begins with -m, for which Python searches the working directory first: a job that is requeued
next week would import what the repository holds by then.

Nothing but the standard library is imported before the code is verified.
"""

from __future__ import annotations

import hashlib
import os
import runpy
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

CODE = Path(__file__).resolve().parents[2]
FOLDERS = ("cfmask", "launch")
"""All that a job imports of the repository."""


def code_files(repository: Path) -> Iterator[Path]:
    """The files of a repository, or of a snapshot of it, that are the code of a job."""
    for folder in FOLDERS:
        for path in sorted((repository / folder).rglob("*")):
            hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(repository).parts)
            if path.is_file() and not hidden:
                yield path


def digest_of(repository: Path) -> str:
    """12 hexadecimal digits that two trees share only if a job would run the same code."""
    whole = hashlib.sha256()
    for path in code_files(repository):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(repository)} {len(content)}\n".encode() + content)
    return whole.hexdigest()[:12]


def verify(code: Path) -> None:
    """A snapshot is named after its digest.

    Raises:
        SystemExit: its files are not those that were submitted.
    """
    if code.parent.name != "code":
        return  # a repository
    try:
        found = digest_of(code)
    except OSError as error:
        _refuse(f"The code of this job, {code}, cannot be read: {error}.")
    if found != code.name:
        _refuse(
            f"The code of this job, {code}, is damaged: its digest is {found}, and has to be its name. Files "
            f"were changed or lost since it was submitted. `python launch/submit.py --resume {code.parents[1]}` takes "
            "a new copy and resumes the run."
        )


def _refuse(why: str) -> NoReturn:
    """Log in the format of cfmask/runtime/logging.py, which is part of the code that was not verified."""
    rank = os.environ.get("SLURM_PROCID") or os.environ.get("SUBMITIT_LOCAL_GLOBALID", "0")
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    sys.exit(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR rank {rank} {node} | {why}")


def main() -> None:
    if "-m" not in sys.argv:
        sys.exit("error: This file starts a rank of a job, and is no command: use launch/submit.py.")
    verify(CODE)
    module = sys.argv.index("-m") + 1
    os.environ["SUBMITIT_LOG_LEVEL"] = "CRITICAL"  # its records are repetitions, in another format
    sys.argv = sys.argv[module:]
    from cfmask.runtime.logging import log_to_job
    from cfmask.runtime.machine import node_name
    from cfmask.runtime.output import tolerate_lost_output
    from launch.allocation.gpus import show_to_rank
    from launch.ranks.supervisor import supervise
    from launch.state.failure_reports import RankStart

    run = CODE.parents[1]
    tolerate_lost_output()
    log_to_job(RankStart.found(run).rank, node_name())
    show_to_rank()
    sys.exit(supervise(lambda: runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True), run=run))


if __name__ == "__main__":
    main()
