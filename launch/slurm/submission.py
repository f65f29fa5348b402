"""sbatch, which is not idempotent: an answer that is lost ("Socket timed out") leaves it open whether the job was
accepted, and a second sbatch would queue a second job. So the queue is searched for the batch script, whose path no
other submission has, before it is sent again.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from launch.slurm.client import PATIENCE_S, SlurmError, SlurmMissing, SlurmUnavailable, ask, call
from launch.slurm.control import cancel

ANSWER_S = 300.0
"""Seconds that one sbatch may take: a controller that is full makes it wait and try again for two minutes."""
_ASK_AGAIN_S = 2.0
_SETTLES_S = 10.0
"""A request whose answer was lost may still wait in the controller. Slurm's own MessageTimeout is as long."""


class SubmissionUnknown(SlurmUnavailable):
    """Whether the job was accepted could not be found out."""


def submit(script: Path, *options: str, patience_s: float = PATIENCE_S) -> str:
    """Queue a batch script; the id of its job or array.

    Args:
        script: absolute; no other submission may have had this path.
        options: of sbatch, beside those in the script.

    Raises:
        SubmissionUnknown: nobody answers, and the job may have been accepted.
        SlurmUnavailable: nobody answers, and it was not accepted.
        SlurmError: Slurm refuses it.
    """
    deadline = time.monotonic() + patience_s
    sent = False
    while True:
        try:
            done = call(("sbatch", *options, str(script)), answer_s=ANSWER_S)
            if done.returncode:
                raise SlurmError(_refusal(done.stderr or done.stdout))
            job = _job_id(done.stdout) or _the_first(submitted(script, patience_s=patience_s))
            if job is None:
                raise SubmissionUnknown(
                    f"sbatch does not say which job it has queued: {' '.join(done.stdout.split())!r}. Find it with "
                    f"`squeue --me --format='%i %o'`: its batch script is {script}."
                )
            if sent:
                _cancel_others(script, job)
            return job
        except SlurmMissing:
            raise
        except SubmissionUnknown:
            raise
        except SlurmUnavailable as error:
            sent = sent or error.sent
            if sent and (job := _accepted(script, error, patience_s)):
                return job
            if time.monotonic() + _ASK_AGAIN_S > deadline:
                raise SlurmUnavailable(f"{error} The job was not accepted.", sent=False) from None
        time.sleep(_ASK_AGAIN_S)


def submitted(script: Path, *, patience_s: float = PATIENCE_S) -> list[str]:
    """Jobs and arrays (by their first id) that were queued with this batch script, ended ones included for as long as
    the controller remembers them (MinJobAge, 300 s by default).

    Raises:
        SlurmError: Slurm cannot be asked.
    """
    command = ("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%F|%o")
    rows = (line.partition("|") for line in ask(*command, patience_s=patience_s).splitlines())
    # By its name, which has a number of its own: a site's wrapper of sbatch may hand on a copy.
    return sorted({id.strip() for id, _, path in rows if os.path.basename(path.strip()) == script.name}, key=int)


def test_only(text: str, *, patience_s: float = PATIENCE_S) -> str:
    """What Slurm says to a batch script without queueing it: when and where it would start.

    Raises:
        SlurmUnavailable: nobody answers.
        SlurmError: it would be refused.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            done = call(("sbatch", "--test-only"), text=text)
            break
        except SlurmMissing:
            raise
        except SlurmUnavailable:
            if time.monotonic() + _ASK_AGAIN_S > deadline:
                raise
        time.sleep(_ASK_AGAIN_S)
    if done.returncode:
        raise SlurmError(_refusal(done.stderr))
    return done.stderr.strip()


def _accepted(script: Path, lost: SlurmUnavailable, patience_s: float) -> str | None:
    """The job, if the controller has it; looked for twice, as the request may still be on its way."""
    try:
        for pause in (0.0, _SETTLES_S):
            time.sleep(pause)
            if found := submitted(script, patience_s=patience_s):
                return found[0]
    except SlurmError as error:
        raise SubmissionUnknown(
            f"{lost} It is unknown whether the job was accepted, because Slurm cannot be asked: {error} Look before "
            f"you submit again: `squeue --me --format='%i %o'` shows {script.name} if it was."
        ) from None
    return None


def _cancel_others(script: Path, job: str) -> None:
    """Two were accepted after all: the second was sent while the first was still on its way."""
    others = [each for each in submitted(script) if each != job]
    cancel(*others)


def _the_first(jobs: list[str]) -> str | None:
    return jobs[0] if jobs else None


def _job_id(text: str) -> str | None:
    """From "Submitted batch job 12 on cluster c", among lines that a site's wrapper may add, or from --parsable's
    "12;c"; None where [sbatch] has asked for silence."""
    found = re.search(r"Submitted batch job (\d+)", text) or re.search(r"^(\d+)(?:;\S*)?$", text.strip(), re.MULTILINE)
    return found[1] if found else None


def _refusal(text: str) -> str:
    """sbatch's own words."""
    lines = (line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.strip().splitlines())
    return f"Slurm does not take the job: {'; '.join(lines)}"
