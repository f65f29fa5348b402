"""Runs sbatch, which is not safe to repeat: if its answer is lost ("Socket timed out"), the job may have been accepted,
and a second sbatch would queue a second job. The queue is therefore searched for the batch script, whose path no other
submission shares, before sbatch is repeated.
"""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path
from subprocess import CompletedProcess

from launch.slurm.client import PATIENCE_S, SlurmError, SlurmMissing, SlurmUnavailable, ask, call, repeat
from launch.slurm.control import cancel

logger = logging.getLogger(__name__)

ANSWER_S = 300.0
"""Timeout of one sbatch, in seconds: with a full controller, sbatch retries for two minutes by itself."""
_REMEDIES = (
    (
        r"wckey",
        "This site checks workload characterization keys: give one of yours with --wckey NAME, or wckey in the cluster "
        "file. `sacctmgr show wckey where user=$USER` lists them; an administrator adds them.",
    ),
    (
        r"Invalid account",
        "Give an account of yours with --account NAME, or account in the cluster file. "
        "`sacctmgr show assoc where user=$USER format=account,partition,qos` lists them.",
    ),
    (
        r"Invalid qos",
        "Give a quality of service that your account has with --qos NAME, or qos in the cluster file. "
        "`sacctmgr show assoc where user=$USER format=account,partition,qos` lists them.",
    ),
    (
        r"invalid partition",
        "Give a partition with --partition NAME, or partition in the cluster file. `sinfo -s` lists them.",
    ),
    (
        r"Invalid node name",
        "Nodes are left out with --exclude, or exclude in the cluster file. `sinfo -N` lists them.",
    ),
    (
        r"Invalid feature",
        "Features are asked for with --constraint, or constraint in the cluster file. `sinfo -o '%N %f'` lists them.",
    ),
)
"""Remedies by a part of Slurm's message (slurm_errno.c), in any case; the first match counts."""
_SETTLES_S = 10.0
"""A request whose answer was lost may wait in the controller for this long, which is Slurm's default MessageTimeout."""


class SubmissionUnknown(SlurmUnavailable):
    """A job may have been accepted, or was accepted and its submission is incomplete."""

    final = True


def submit(script: Path, *options: str, patience_s: float = PATIENCE_S) -> str:
    """Queue a batch script.

    Args:
        script: Absolute path, never used for another submission.
        options: Options of sbatch, in addition to those in the script.

    Returns:
        The id of the job or array.

    Raises:
        SubmissionUnknown: There is no answer, and the job may have been accepted.
        SlurmUnavailable: There is no answer, and the job was not accepted.
        SlurmError: Slurm refuses the job.
    """
    sent = False

    def attempt() -> CompletedProcess[str] | str:
        nonlocal sent
        try:
            return call(("sbatch", *options, str(script)), answer_s=ANSWER_S)
        except SlurmMissing:
            raise
        except SlurmUnavailable as error:
            sent = sent or error.sent
            if sent and (job := _accepted(script, error, patience_s)):
                return job
            raise SlurmUnavailable(f"{error} The job was not accepted.", sent=False) from None

    done = repeat(attempt, patience_s)
    if isinstance(done, str):
        return done
    if done.returncode:
        refused = SlurmError(_refusal(done.stderr or done.stdout))
        # The earlier request may have been accepted, and have used up the user's limit on jobs.
        if sent and (job := _accepted(script, refused, patience_s)):
            return job
        raise refused
    job = _job_id(done.stdout) or _job_of(script, done.stdout, patience_s)
    if sent:
        _cancel_others(script, job, patience_s)
    return job


def submitted(script: Path, *, patience_s: float = PATIENCE_S) -> list[str]:
    """Ids of the jobs and arrays that were queued with this batch script. Ended jobs are included for as long as the
    controller remembers them (MinJobAge, 300 s by default).

    Raises:
        SlurmError: Slurm cannot be asked.
    """
    command = ("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%F|%o")
    rows = (line.partition("|") for line in ask(*command, patience_s=patience_s).splitlines())
    # Compare names only, which are unique: a site's wrapper of sbatch may submit a copy from another folder.
    return sorted({id.strip() for id, _, path in rows if os.path.basename(path.strip()) == script.name}, key=int)


def test_only(text: str, *, patience_s: float = PATIENCE_S) -> str:
    """Slurm's answer to a batch script that is not queued: when and where the job would start.

    Raises:
        SlurmUnavailable: There is no answer.
        SlurmError: Slurm would refuse the job.
    """
    done = repeat(lambda: call(("sbatch", "--test-only"), text=text), patience_s)
    if done.returncode:
        raise SlurmError(_refusal(done.stderr))
    return done.stderr.strip()


def _accepted(script: Path, lost: SlurmError, patience_s: float) -> str | None:
    """The script's job, if the controller has one. Looks twice, because the request may still be on its way."""
    try:
        for pause in (0.0, _SETTLES_S):
            time.sleep(pause)
            if found := submitted(script, patience_s=patience_s):
                return found[0]
    except SlurmError as error:
        raise SubmissionUnknown(
            f"{lost} It is unknown whether the job was accepted, because Slurm cannot be asked: {error} Before you "
            f"submit again, check `squeue --me --format='%i %o'`: it shows {script.name} if the job was accepted."
        ) from None
    return None


def _cancel_others(script: Path, job: str, patience_s: float) -> None:
    """Cancel the job of an earlier request that arrived late."""
    try:
        cancel(*(each for each in submitted(script, patience_s=patience_s) if each != job), patience_s=patience_s)
    except SlurmError as error:
        logger.warning(f"It could not be determined whether {script.name} was queued twice: {error}")


def _job_of(script: Path, printed: str, patience_s: float) -> str:
    """The job of a script that sbatch accepted without printing the job's id.

    Raises:
        SubmissionUnknown: The job is not found.
    """
    try:
        return submitted(script, patience_s=patience_s)[0]
    except (SlurmError, IndexError):
        raise SubmissionUnknown(
            f"sbatch does not say which job it has queued: {' '.join(printed.split())!r}. Find it with "
            f"`squeue --me --format='%i %o'`: its batch script is {script}."
        ) from None


def _job_id(text: str) -> str | None:
    """The id in "Submitted batch job 12 on cluster c", among lines that a site's wrapper may add, or in the output of
    --parsable, "12;c". None if [sbatch] in the cluster file silences sbatch."""
    found = re.search(r"Submitted batch job (\d+)", text) or re.search(r"^(\d+)(?:;\S*)?$", text.strip(), re.MULTILINE)
    return found[1] if found else None


def _refusal(text: str) -> str:
    """sbatch's message, and a remedy if a setting is the cause."""
    message = "; ".join(
        re.sub(r"^(sbatch: )?(error: |allocation failure: )?", "", line) for line in text.strip().splitlines()
    )
    remedy = next((remedy for part, remedy in _REMEDIES if re.search(part, message, re.IGNORECASE)), None)
    return f"Slurm does not take the job: {message}" + (f". {remedy}" if remedy else "")
