"""`launch/submit.py --executor local` on one GPU, over NCCL: a run that is killed and resumed has to end with the
weights and moments of an uninterrupted run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cfmask.models.initial import model_info
from launch.drills.materials import CLASSES, convert, draw_images, flags_of_model, save_random_model
from launch.drills.runner import different_tensors
from tools.benchmarks import REPO
from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import B16, Setting

BATCH = 32


def whole_run(setting: Setting, section: Section) -> dict[str, Any]:
    """Compare the last checkpoints of two runs, one of which is killed.

    Raises:
        AssertionError: a run failed, or the checkpoints differ. The table is written first.
    """
    flags = make_materials(setting)
    steps = 2 * (epoch_images(setting) // BATCH)
    runs = {kind: Run(setting.work / f"run-{kind}", flags, steps, setting) for kind in ("alone", "killed")}
    for run in runs.values():
        run.start()
    try:
        killed_at = follow(runs, steps)
    finally:
        for run in runs.values():
            run.kill()
    codes = {kind: run.exit_code for kind, run in runs.items()}
    for run in runs.values():
        if run.exit_code != 0:
            section.note(f"Last output of {run.folder.name}:\n```\n{run.log.read_text()[-2000:]}\n```")
    assert not any(codes.values()), f"exit codes {codes}"
    newest = {kind: max((run.folder / "checkpoints").glob("step-*")) for kind, run in runs.items()}
    assert all(folder.name == f"step-{steps:08d}" for folder in newest.values()), f"last checkpoints: {newest}"
    differing, tensors = different_tensors(newest["alone"], newest["killed"])
    rate = images_per_second(runs["alone"].folder)
    section.table(
        ["killed at step", "of", "last checkpoints", "images/s beside the other run", "s alone", "s killed"],
        [
            [
                killed_at,
                steps,
                f"{len(differing)} of {tensors} tensors differ" if differing else f"same bits, {tensors} tensors",
                f"{rate:.0f}",
                *(f"{run.seconds:.0f}" for run in runs.values()),
            ]
        ],
    )
    if setting.dry:
        section.note("Without a GPU, ranks communicate over gloo, not NCCL.")
    assert not differing, f"the last checkpoints differ, for example in {', '.join(differing[:3])}"
    return {"killed at": killed_at, "steps": steps, "tensors": tensors, "images/s": rate}


class Run:
    """A run by submit.py.

    Attributes:
        exit_code: of the last start; None while it is under way.
        seconds: since the first start.
    """

    def __init__(self, folder: Path, flags: list[str], steps: int, setting: Setting) -> None:
        self.folder, self.log = folder, setting.work / f"{folder.name}.log"
        self._command = [sys.executable, str(REPO / "launch/submit.py"), *flags, "--run", str(folder)]
        self._command += ["--checkpoint-steps", str(steps // 2)]
        self._cwd = setting.work
        self._begun = 0.0
        self._process: subprocess.Popen | None = None
        self.exit_code: int | None = None
        self.seconds = 0.0

    def start(self) -> None:
        self._begun = self._begun or time.monotonic()
        with open(self.log, "a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, cwd=self._cwd
            )

    def ended(self) -> bool:
        assert self._process is not None
        self.exit_code = self._process.poll()
        self.seconds = time.monotonic() - self._begun
        return self.exit_code is not None

    def kill(self) -> None:
        """Kill it and all its ranks by SIGKILL."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def step(self) -> int:
        """The last step in its log."""
        with contextlib.suppress(OSError, ValueError):
            lines = (self.folder / "log.jsonl").read_text().splitlines()
            return max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)
        return 0


def follow(runs: dict[str, Run], steps: int) -> int:
    """Wait for both runs. One is killed after its first checkpoint and started again; returns the step it was at."""
    killed_at = 0
    pending = set(runs)
    while pending:
        time.sleep(0.05)
        if not killed_at and runs["killed"].step() >= steps // 2 + 1:
            runs["killed"].kill()
            killed_at = runs["killed"].step()
            runs["killed"].start()
        pending -= {kind for kind in pending if runs[kind].ended()}
    return killed_at


def epoch_images(setting: Setting) -> int:
    return 192 if setting.dry else 513


def make_materials(setting: Setting) -> list[str]:
    """Shards of raw crops and a model with random weights. Returns the flags of a run on them."""
    root = setting.work / "run-materials"
    side, per_class = (20, 64) if setting.dry else (256, 171)
    assert per_class * len(CLASSES) == epoch_images(setting)
    draw_images(root / "images", per_class=per_class, splits=("train",), size=side)
    draw_images(root / "images", per_class=8, splits=("val",), size=side)
    info = model_info(setting.case(B16, 1).model, classes=CLASSES)
    info = dataclasses.replace(info, provenance="random weights")
    size = info.config["vision_cfg"]["image_size"]
    shards = convert(
        root / "images", root / "shards", "--store", "crop-raw", "--image-size", str(size), "--samples-per-shard", "64"
    )
    save_random_model(root / "model.safetensors", info)
    flags = [
        *("--shards", shards, *flags_of_model(root / "model.safetensors")),
        *("--batch-size", BATCH, "--lanes", 4, "--epochs", 2, "--warmup-steps", 2, "--lr", "1e-4", "--log-steps", 1),
        *("--no-keep-epochs", "--loader-workers", 4, "--eval-sets", "val", "--executor", "local"),
        *("--gpus-per-node", 0 if setting.dry else 1),
    ]
    return [str(flag) for flag in flags]


def images_per_second(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rates = [line["samples_per_s"] for line in lines if "samples_per_s" in line]
    return statistics.median(rates[3:] or rates)
