"""Names the starts of a job: "123-0" is the first start of job 123, "123_4-2" the third of array task 123_4."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import submitit

LOCAL_START = "CFMASK_LOCAL_START"
"""Environment variable that counts the starts of a local job, from 0 (launch/ranks/controller.py)."""


def restart_of(environment: submitit.JobEnvironment) -> int | None:
    """How often Slurm has restarted this job; None on the local executor, which may run within a Slurm job."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) if environment.cluster == "slurm" else None


def attempt_name(job: str, restart: int | None) -> str:
    """The name of a start, the same on all ranks. The batch script builds the same name in shell."""
    return f"{job}-{int(os.environ.get(LOCAL_START) or 0) if restart is None else restart}"
