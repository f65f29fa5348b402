"""How Slurm's commands are called: one environment, one timeout, one rule for what is tried again.

    text = ask("squeue", "--noheader", "--me")                  a question, or a command that may be given twice
    job = show_job("4711")                                      what the controller knows of a job

A command that fails because the controller does not answer is repeated until ``patience_s`` is over. sbatch is not
idempotent: see ``launch/slurm/submission.py``.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping

from cfmask.errors import UserError

ANSWER_S = 60.0
"""Seconds that one call of a command may take. Slurm's own MessageTimeout is 10 s by default, 100 s on large sites."""
PATIENCE_S = 60.0
"""Seconds for which a controller that does not answer is asked again."""
_ASK_AGAIN_S = 2.0

_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""They say which cluster is meant, and who asks."""
_OPTIONS = ("SALLOC_", "SACCT_", "SBATCH_", "SCANCEL_", "SCONTROL_", "SINFO_", "SLURM_", "SLURMD_", "SQUEUE_", "SRUN_")
_LOCALE = ("LANG", "LANGUAGE", "LC_")
_NO_ANSWER = (
    "Unable to contact slurm controller",
    "Connection refused",
    "Connection reset",
    "Connection timed out",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "Transport endpoint is not connected",
    "Resource temporarily unavailable",
)


class SlurmError(UserError):
    """A command of Slurm's failed; the message has its words."""


class SlurmUnavailable(SlurmError):
    """The command is not installed, or the controller (for sacct: the database) does not answer. Whether a request was
    carried out is then unknown."""


def environment(base: Mapping[str, str] = os.environ, *, for_job: bool = False) -> dict[str, str]:
    """The environment for Slurm's commands. Variables by which Slurm's commands and submitit take options are left out:
    they would silently win over what is asked for here, or hide jobs.

    Args:
        for_job: for sbatch, which hands the environment on to the job: the locale stays the user's.
    """
    dropped = (*_OPTIONS, "SUBMITIT_") + (() if for_job else _LOCALE)
    kept = {name: value for name, value in base.items() if name in _KEPT or not name.startswith(dropped)}
    return kept if for_job else kept | {"LC_ALL": "C"}


def ask(*command: str, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> str:
    """The standard output of a command that may be given twice.

    Raises:
        SlurmUnavailable: the command is not installed, or nobody answers within ``patience_s``.
        SlurmError: it failed.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _call(command, answer_s)
        except SlurmUnavailable:
            if time.monotonic() + _ASK_AGAIN_S > deadline:
                raise
        time.sleep(_ASK_AGAIN_S)


def _call(command: tuple[str, ...], answer_s: float) -> str:
    shown = shlex.join(command[:4])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=answer_s, stdin=subprocess.DEVNULL, env=environment()
        )
    except FileNotFoundError:
        raise SlurmUnavailable(f"There is no {command[0]} on this machine.") from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(f"`{shown}` does not answer within {answer_s:.0f} s.") from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join((done.stderr or done.stdout).split())
    kind = SlurmUnavailable if any(words in said for words in _NO_ANSWER) else SlurmError
    raise kind(f"`{shown}` failed: {said}")


def parse_records(text: str, first: str) -> list[dict[str, str]]:
    """`scontrol show job` and the like, in either form: NAME=VALUE words; ``first`` begins a record."""
    records: list[dict[str, str]] = []
    for word in text.split():
        name, found, value = word.partition("=")
        if name == first:
            records.append({})
        if found and records:
            records[-1].setdefault(name, value)
    return records


def show_job(job: str, *, patience_s: float = PATIENCE_S) -> dict[str, str]:
    """What the controller knows of a job, as `scontrol show job` names it; empty if it does not know it.

    Raises:
        SlurmUnavailable: it does not answer.
    """
    try:
        text = ask("scontrol", "--oneliner", "show", "job", job, patience_s=patience_s)
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return next(iter(parse_records(text, first="JobId")), {})


def version(*, patience_s: float = PATIENCE_S) -> tuple[int, int]:
    """(22, 5) of Slurm 22.05.8, by the commands on this machine."""
    match = re.search(r"(\d+)\.(\d+)", ask("scontrol", "--version", patience_s=patience_s))
    return (int(match[1]), int(match[2])) if match else (0, 0)
