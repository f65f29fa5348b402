"""The restart policy of a training run or an evaluation: where its starts are recorded, and what its progress is."""

from __future__ import annotations

import json
import shlex
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.patience import StorageUnavailable
from launch.restarts.chain import Chain
from launch.restarts.policy import Restarts

if TYPE_CHECKING:
    import submitit


def restarts_of(run: RunFolder, environment: submitit.JobEnvironment | None = None) -> Restarts:
    """The policy for the job that this process is part of."""
    restarts = Restarts.of_this_job(
        run,
        resume=f"python launch/submit.py --resume {shlex.quote(str(run.root))}",
        unit="image" if (run.root / "evaluation.json").exists() else "step",
        environment=environment,
    )
    chain = None if restarts.restart is None else Chain.of_job(run, restarts.job)
    return restarts if chain is None else replace(restarts, chain=chain, resume=f"{restarts.resume} --chain N")


def saved_progress(run: RunFolder) -> int:
    """What the next start resumes from: the step of the newest checkpoint, or the images that an evaluation has
    counted."""
    if not run.has_work():
        return 0  # the folder of launch/doctor.py
    if not isinstance(run.work(), Recipe):
        return counted_images(run.progress)
    saved = run.saved_step()
    steps = [line["from_step"] for line in read_lines(run.attempts) if isinstance(line.get("from_step"), int)]
    if len(steps) < 2 or steps[-1] != steps[-2] or saved <= steps[-1]:
        return saved
    # Two starts began at the same step although there is a newer checkpoint. If that one is damaged, every start falls
    # back to the one before it, which is no progress. Only here, because reading a whole checkpoint takes a while.
    from cfmask.checkpoint import resume

    try:
        found = resume.latest(run.checkpoints, report=lambda text: None)
    except StorageUnavailable:
        return saved
    return 0 if found is None else found.step


def counted_images(progress: Path) -> int:
    """The number of images in the header of an evaluation's progress.safetensors; 0 without one."""
    try:
        with open(progress, "rb") as file:
            [size] = struct.unpack("<Q", file.read(8))
            return int(json.loads(file.read(size))["__metadata__"]["images"])
    except (OSError, ValueError, KeyError, struct.error):
        return 0
