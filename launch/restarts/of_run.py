"""The restart policy of a training run or an evaluation: where its starts are recorded, and what progress is."""

from __future__ import annotations

import json
import shlex
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.attempts import AttemptLog
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.patience import StorageUnavailable
from launch.restarts.chain import Chain
from launch.restarts.policy import Restarts

if TYPE_CHECKING:
    import submitit


def restarts_of(run: RunFolder, environment: submitit.JobEnvironment | None = None) -> Restarts:
    """For the job that this process is part of."""
    restarts = Restarts.of_this_job(
        AttemptLog(run.root),
        resume=f"python launch/submit.py --resume {shlex.quote(str(run.root))}",
        unit="image" if (run.root / "evaluation.json").exists() else "step",
        environment=environment,
    )
    chain = None if restarts.restart is None else Chain.of_job(run, restarts.job)
    return restarts if chain is None else replace(restarts, chain=chain, resume=f"{restarts.resume} --chain N")


def saved_progress(run: RunFolder) -> int:
    """What the next start resumes from: the step of the newest checkpoint; of an evaluation, the images counted."""
    if not run.has_work():
        return 0  # launch/doctor.py's folder
    if not isinstance(run.work(), Recipe):
        return counted_images(run.progress)
    named = run.saved_step()
    steps = [line["from_step"] for line in read_lines(run.attempts) if isinstance(line.get("from_step"), int)]
    if len(steps) < 2 or steps[-1] != steps[-2] or named <= steps[-1]:
        return named
    # Two starts from the same step, and there is a newer checkpoint. If it is damaged, every start falls back to the
    # one before it: that is no progress. It is read from its beginning to its end, which takes a while.
    from cfmask import resume

    try:
        found = resume.latest(run.checkpoints, report=lambda text: None)
    except StorageUnavailable:
        return named
    return 0 if found is None else found.step


def counted_images(progress: Path) -> int:
    """Of an evaluation's progress.safetensors, which holds the number in its header; 0 without one."""
    try:
        with open(progress, "rb") as file:
            [size] = struct.unpack("<Q", file.read(8))
            return int(json.loads(file.read(size))["__metadata__"]["images"])
    except (OSError, ValueError, KeyError, struct.error):
        return 0
