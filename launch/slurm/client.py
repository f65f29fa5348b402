"""Calls Slurm's commands: one environment, one timeout, and one rule for what is repeated.

    text = ask("squeue", "--noheader", "--me")   a query, or another command that is safe to repeat
    carry_out("scontrol", …, is_done=…)          a command that changes something: repeated only after a check

A command that fails because the controller does not answer is repeated for up to ``patience_s`` seconds. "Socket timed
out" does not say whether the request was carried out.

Other modules of this package: ``queue.py`` (queued and ended jobs), ``control.py`` (requeue, cancel), ``submission.py``
(sbatch), ``site.py`` (configuration of the cluster), ``states.py`` (meaning of job states), ``texts.py`` (parsers).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from subprocess import CompletedProcess
from typing import TypeVar

from cfmask.errors import UserError
from launch.slurm.texts import parse_records, version_of

T = TypeVar("T")

ANSWER_S = 60.0
"""Timeout of one command, in seconds. Slurm's MessageTimeout is 10 s by default and 100 s on large sites."""
PATIENCE_S = 60.0
"""For how many seconds a command is repeated while the controller does not answer."""
_REPEAT_AFTER_S = 2.0

_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables that select the cluster and the user."""
_OPTIONS = (
    *("SACCT_", "SALLOC_", "SATTACH_", "SBATCH_", "SBCAST_", "SCANCEL_", "SCONTROL_", "SCRONTAB_", "SDIAG_", "SINFO_"),
    *("SLURM_", "SLURMD_", "SLURMSTEPD_", "SPRIO_", "SQUEUE_", "SREPORT_", "SRUN_", "SSHARE_", "SSTAT_", "STRIGGER_"),
    "SUBMITIT_",
)
_LOCALE = ("LANG", "LC_")
_OF_STEP = ("PMI_", "PMIX_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Variables that srun sets for the processes of a step."""

_NOT_DONE = (
    "Unable to contact slurm controller",
    "Connection refused",
    "Could not establish a configuration source",
    "DNS SRV lookup failed",
    "Job can not be altered now, try again later",
)
"""Messages after which the request was certainly not carried out."""
_NO_ANSWER = (
    *_NOT_DONE,
    "Communication connection failure",
    "Connection reset",
    "Connection timed out",
    "Message receive failure",
    "Message send failure",
    "Resource temporarily unavailable",
    "Socket timed out",
    "Transport endpoint is not connected",
    "Unable to contact slurmdbd",
    "Zero Bytes were transmitted",
    "in standby mode",
)


class SlurmError(UserError):
    """A Slurm command failed; the message has its output."""


class SlurmUnavailable(SlurmError):
    """Slurm gave no answer, or asked to try again later.

    Attributes:
        sent: Whether the request may have reached the controller; if so, it is unknown whether it was carried out.
        final: Whether repeating the command is useless.
    """

    final = False

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class SlurmMissing(SlurmUnavailable):
    """The command is not installed on this machine."""

    final = True

    def __init__(self, command: str) -> None:
        super().__init__(f"There is no {command} on this machine.", sent=False)


def environment(base: Mapping[str, str] | None = None, *, for_job: bool = False) -> dict[str, str]:
    """The environment for Slurm's commands. Variables from which Slurm's commands and submitit read options are
    removed: they would silently override the options of the call, or hide jobs.

    Args:
        base: The environment to filter (default: that of this process).
        for_job: For sbatch, which passes its environment on to the job: keep the user's locale, and remove the
            variables that srun set for the job that this process is part of.
    """
    base = os.environ if base is None else base
    dropped: tuple[str, ...] = _OPTIONS
    if not for_job:
        dropped += _LOCALE
    elif "SLURM_JOB_ID" in base:
        dropped += _OF_STEP
    kept = {name: value for name, value in base.items() if name in _KEPT or not name.startswith(dropped)}
    return kept if for_job else kept | {"LC_ALL": "C"}


def ignored_options() -> list[str]:
    """Variables by which the user may intend to pass options to sbatch, and which ``environment`` removes."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))


def call(command: tuple[str, ...], *, answer_s: float = ANSWER_S, text: str | None = None) -> CompletedProcess[str]:
    """Run a command once; its exit code may be other than 0.

    Args:
        text: Standard input.

    Raises:
        SlurmMissing: The command is not installed.
        SlurmUnavailable: Slurm gave no answer.
    """
    shown = shlex.join(command[:4])
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # names of jobs and paths may be in any encoding
            timeout=answer_s,
            input=text or "",
            env=environment(for_job=os.path.basename(command[0]) == "sbatch"),
        )
    except FileNotFoundError:
        raise SlurmMissing(command[0]) from None
    except OSError as error:
        raise SlurmUnavailable(f"`{shown}` cannot be run: {error.strerror}.", sent=False) from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(f"`{shown}` does not answer within {answer_s:.0f} s.") from None
    output = done.stderr + done.stdout
    if done.returncode and any(message in output for message in _NO_ANSWER):
        raise SlurmUnavailable(_failure(command, done), sent=not any(message in output for message in _NOT_DONE))
    return done


def repeat(request: Callable[[], T], patience_s: float) -> T:
    """``request()``, repeated while it raises a SlurmUnavailable that is not final, for up to ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return request()
        except SlurmUnavailable as error:
            if error.final or time.monotonic() + _REPEAT_AFTER_S > deadline:
                raise
        time.sleep(_REPEAT_AFTER_S)


def ask(*command: str, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> str:
    """The standard output of a command that is safe to repeat.

    Raises:
        SlurmUnavailable: The command is not installed, or there is no answer within ``patience_s``.
        SlurmError: The command failed.
    """
    return _checked(command, repeat(lambda: call(command, answer_s=answer_s), patience_s))


def ask_about_jobs(*command: str, **wait: float) -> str:
    """``ask``, but "" if Slurm knows none of the jobs: they ended some time ago."""
    try:
        return ask(*command, **wait)
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return ""


def carry_out(*command: str, is_done: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Run a command that changes something. If its answer is lost, check whether it was carried out before repeating
    it.

    Args:
        is_done: Checks the effect; may raise SlurmUnavailable.

    Raises:
        SlurmUnavailable: There is no answer within ``patience_s``. Whether the command was carried out is unknown.
        SlurmError: Slurm refuses.
    """
    repeated = False

    def attempt() -> None:
        nonlocal repeated
        if repeated and is_done():
            return
        try:
            _checked(command, call(command))
        except SlurmUnavailable:
            repeated = True
            raise
        except SlurmError:
            if not (repeated and is_done()):  # a late first request may be why the second one is refused
                raise

    repeat(attempt, patience_s)


def _checked(command: tuple[str, ...], done: CompletedProcess[str]) -> str:
    if done.returncode:
        raise SlurmError(_failure(command, done))
    return done.stdout


def _failure(command: tuple[str, ...], done: CompletedProcess[str]) -> str:
    """The error message for a failed command, on one line."""
    said = " ".join((done.stderr.strip() or done.stdout).split())
    return f"`{shlex.join(command[:4])}` failed: {said or f'exit status {done.returncode}'}"


def show_job(job: str, **wait: float) -> dict[str, str]:
    """The controller's record of a job, with the field names of `scontrol show job`; empty for an unknown job.

    Args:
        wait: ``patience_s`` and ``answer_s`` of ``ask``.

    Raises:
        SlurmUnavailable: The controller does not answer.
    """
    text = ask_about_jobs("scontrol", "--oneliner", "show", "job", job, **wait)
    return next(iter(parse_records(text, first="JobId")), {})


def version(*, patience_s: float = PATIENCE_S) -> tuple[int, int]:
    """The version of the commands on this machine: (22, 5) for Slurm 22.05.8."""
    return version_of(ask("scontrol", "--version", patience_s=patience_s))
