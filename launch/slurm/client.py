"""How Slurm's commands are called: one environment, one timeout, one rule for what is tried again.

    text = ask("squeue", "--noheader", "--me")   a question, or a command that may be given twice
    carry_out("scontrol", …, is_done=…)          a command that may not: it is repeated after a look only

A command that fails because the controller does not answer is repeated until ``patience_s`` is over. "Socket timed
out" says nothing about whether a request was carried out.

Beside this module: ``queue.py`` (what is queued, what has ended), ``control.py`` (requeue, cancel), ``submission.py``
(sbatch), ``states.py`` (what a job's state means), ``texts.py`` (what the commands print).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from subprocess import CompletedProcess

from cfmask.errors import UserError
from launch.slurm.texts import parse_records, version_of

ANSWER_S = 60.0
"""Seconds that one call of a command may take. Slurm's own MessageTimeout is 10 s by default, 100 s on large sites."""
PATIENCE_S = 60.0
"""Seconds for which a controller that does not answer is asked again."""
_ASK_AGAIN_S = 2.0

_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""They say which cluster is meant, and who asks."""
_OPTIONS = (
    *("SACCT_", "SALLOC_", "SATTACH_", "SBATCH_", "SBCAST_", "SCANCEL_", "SCONTROL_", "SCRONTAB_", "SDIAG_", "SINFO_"),
    *("SLURM_", "SLURMD_", "SLURMSTEPD_", "SPRIO_", "SQUEUE_", "SREPORT_", "SRUN_", "SSHARE_", "SSTAT_", "STRIGGER_"),
    "SUBMITIT_",
)
_LOCALE = ("LANG", "LC_")
_OF_STEP = ("PMI_", "PMIX_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""What srun adds for the processes of a step."""

_NOT_SENT = (
    "Unable to contact slurm controller",
    "Connection refused",
    "Could not establish a configuration source",
    "DNS SRV lookup failed",
)
_NO_ANSWER = (
    *_NOT_SENT,
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
    """A command of Slurm's failed; the message has its output."""


class SlurmUnavailable(SlurmError):
    """Slurm cannot be asked. Whether a request was carried out is then unknown, unless ``sent`` is false.

    sent: whether the request may have reached the controller.
    """

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class SlurmMissing(SlurmUnavailable):
    """The command is not installed on this machine."""

    def __init__(self, command: str) -> None:
        super().__init__(f"There is no {command} on this machine.", sent=False)


def environment(base: Mapping[str, str] | None = None, *, for_job: bool = False) -> dict[str, str]:
    """The environment for Slurm's commands. Variables by which Slurm's commands and submitit take options are left out:
    they would silently override what is asked for here, or hide jobs.

    Args:
        base: what to take it from (default: this process's).
        for_job: for sbatch, which hands the environment on to the job: the locale stays the user's. What srun added for
            a job that this process is part of is left out as well.
    """
    base = os.environ if base is None else base
    dropped: tuple[str, ...] = _OPTIONS
    if not for_job:
        dropped += _LOCALE
    elif "SLURM_JOB_ID" in base:
        dropped += _OF_STEP
    kept = {name: value for name, value in base.items() if name in _KEPT or not name.startswith(dropped)}
    return kept if for_job else kept | {"LC_ALL": "C"}


def ignored_options(base: Mapping[str, str] | None = None) -> list[str]:
    """Variables by which the user may mean to give options to sbatch, and which are left out."""
    return sorted(name for name in (os.environ if base is None else base) if name.startswith("SBATCH_"))


def call(command: tuple[str, ...], *, answer_s: float = ANSWER_S, text: str | None = None) -> CompletedProcess[str]:
    """Run a command once; it may have failed.

    Args:
        text: its standard input. sbatch, which hands it on, gets the environment for a job.

    Raises:
        SlurmMissing: it is not installed.
        SlurmUnavailable: nobody answered.
    """
    shown = shlex.join(command[:4])
    env = environment(for_job=os.path.basename(command[0]) == "sbatch")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # jobs and paths may have names in any encoding
            timeout=answer_s,
            input=text or "",
            env=env,
        )
    except FileNotFoundError:
        raise SlurmMissing(command[0]) from None
    except OSError as error:
        raise SlurmUnavailable(f"`{shown}` cannot be run: {error.strerror}.", sent=False) from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(f"`{shown}` does not answer within {answer_s:.0f} s.") from None
    if done.returncode and any(words in done.stderr + done.stdout for words in _NO_ANSWER):
        sent = not any(words in done.stderr + done.stdout for words in _NOT_SENT)
        raise SlurmUnavailable(f"`{shown}` failed: {said(done)}", sent=sent)
    return done


def said(done: CompletedProcess[str]) -> str:
    """What a command that failed printed, on one line."""
    return " ".join((done.stderr.strip() or done.stdout).split())


def ask(*command: str, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> str:
    """The standard output of a command that may be given twice.

    Raises:
        SlurmUnavailable: the command is not installed, or nobody answers within ``patience_s``.
        SlurmError: it failed.
    """
    return _checked(command, call_patiently(command, patience_s=patience_s, answer_s=answer_s))


def call_patiently(
    command: tuple[str, ...], *, patience_s: float, answer_s: float = ANSWER_S, text: str | None = None
) -> CompletedProcess[str]:
    """``call``, repeated while nobody answers. For commands that may be given twice.

    Raises:
        SlurmUnavailable: the command is not installed, or nobody answers within ``patience_s``.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return call(command, answer_s=answer_s, text=text)
        except SlurmMissing:
            raise
        except SlurmUnavailable:
            if time.monotonic() + _ASK_AGAIN_S > deadline:
                raise
        time.sleep(_ASK_AGAIN_S)


def carry_out(*command: str, is_done: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Give a command that changes something. If its answer is lost, look whether it was carried out before it is
    repeated: the first one may still be on its way, or done.

    Args:
        is_done: looks; may raise SlurmUnavailable.

    Raises:
        SlurmUnavailable: nobody answers within ``patience_s``. Whether it was carried out is unknown.
        SlurmError: it was refused.
    """
    deadline = time.monotonic() + patience_s
    repeated = False
    while True:
        try:
            _checked(command, call(command))
            return
        except SlurmMissing:
            raise
        except SlurmUnavailable:
            if time.monotonic() + _ASK_AGAIN_S > deadline:
                raise
        except SlurmError:
            if repeated and is_done():  # "already": by the first one, after the look
                return
            raise
        time.sleep(_ASK_AGAIN_S)
        while True:
            try:
                if is_done():
                    return
                break
            except SlurmUnavailable:
                if time.monotonic() + _ASK_AGAIN_S > deadline:
                    raise
            time.sleep(_ASK_AGAIN_S)
        repeated = True


def _checked(command: tuple[str, ...], done: CompletedProcess[str]) -> str:
    if done.returncode:
        raise SlurmError(f"`{shlex.join(command[:4])}` failed: {said(done)}")
    return done.stdout


def show_job(job: str, *, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> dict[str, str]:
    """What the controller knows of a job, as `scontrol show job` names it; empty if it does not know it.

    Raises:
        SlurmUnavailable: it does not answer.
    """
    command = ("scontrol", "--oneliner", "show", "job", job)
    try:
        text = ask(*command, patience_s=patience_s, answer_s=answer_s)
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return next(iter(parse_records(text, first="JobId")), {})


def version(*, patience_s: float = PATIENCE_S) -> tuple[int, int]:
    """(22, 5) of Slurm 22.05.8, by the commands on this machine."""
    return version_of(ask("scontrol", "--version", patience_s=patience_s))
