"""sbatch, which is not idempotent: an answer that is lost ("Socket timed out") leaves it open whether the job was
accepted, and a second sbatch would queue a second job. So the queue is searched for the batch script, whose path no
other submission has, before it is sent again.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

from launch.slurm.client import PATIENCE_S, SlurmError, SlurmMissing, SlurmUnavailable, ask, call, call_patiently
from launch.slurm.control import cancel

ANSWER_S = 300.0
"""Seconds that one sbatch may take: a controller that is full makes it wait and try again for two minutes."""
_ASK_AGAIN_S = 2.0
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
        r"Invalid feature",
        "Features are asked for with --constraint, or constraint in the cluster file. `sinfo -o '%N %f'` lists them.",
    ),
)
"""What to do about a refusal, by a part of Slurm's message (slurm_errno.c), in any case. The first that matches."""
_SETTLES_S = 10.0
"""A request whose answer was lost may still wait in the controller. Slurm's own MessageTimeout is as long."""


class SubmissionUnknown(SlurmUnavailable):
    """A job was accepted whose submission is not complete, or it could not be found out whether one was."""


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
            break
        except SlurmMissing:
            raise
        except SlurmUnavailable as error:
            sent = sent or error.sent
            if sent and (job := _accepted(script, error, patience_s)):
                return job
            if time.monotonic() + _ASK_AGAIN_S > deadline:
                raise SlurmUnavailable(f"{error} The job was not accepted.", sent=False) from None
        time.sleep(_ASK_AGAIN_S)
    if done.returncode:
        refused = SlurmError(_refusal(done.stderr or done.stdout))
        # A limit on the jobs of a user may be reached by the one whose answer was lost.
        if sent and (job := _accepted(script, refused, patience_s)):
            return job
        raise refused
    job = _job_id(done.stdout) or _job_of(script, done.stdout, patience_s)
    if sent:
        _cancel_others(script, job, patience_s)
    return job


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
    done = call_patiently(("sbatch", "--test-only"), patience_s=patience_s, text=text)
    if done.returncode:
        raise SlurmError(_refusal(done.stderr))
    return done.stderr.strip()


def _accepted(script: Path, lost: SlurmError, patience_s: float) -> str | None:
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


def _cancel_others(script: Path, job: str, patience_s: float) -> None:
    """Two were accepted after all: the second was sent while the first was still on its way."""
    try:
        others = [each for each in submitted(script, patience_s=patience_s) if each != job]
        cancel(*others, patience_s=patience_s)
    except SlurmError as error:
        print(f"warning: whether {script.name} was queued twice could not be found out: {error}", file=sys.stderr)


def _job_of(script: Path, printed: str, patience_s: float) -> str:
    """The job of a script that sbatch has accepted without saying which job it is.

    Raises:
        SubmissionUnknown: it is not found.
    """
    try:
        found = submitted(script, patience_s=patience_s)
    except SlurmError:
        found = []
    if not found:
        raise SubmissionUnknown(
            f"sbatch does not say which job it has queued: {' '.join(printed.split())!r}. Find it with "
            f"`squeue --me --format='%i %o'`: its batch script is {script}."
        )
    return found[0]


def _job_id(text: str) -> str | None:
    """From "Submitted batch job 12 on cluster c", among lines that a site's wrapper may add, or from --parsable's
    "12;c"; None where [sbatch] has asked for silence."""
    found = re.search(r"Submitted batch job (\d+)", text) or re.search(r"^(\d+)(?:;\S*)?$", text.strip(), re.MULTILINE)
    return found[1] if found else None


def _refusal(text: str) -> str:
    """sbatch's own words, and what to do where a setting is what it refuses."""
    lines = (line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.strip().splitlines())
    words = "; ".join(lines)
    remedy = next((remedy for part, remedy in _REMEDIES if re.search(part, words, re.IGNORECASE)), None)
    return f"Slurm does not take the job: {words}" + (f". {remedy}" if remedy else "")
