"""Synthetic data and models for tests: a class-folder tree of small images, its shards, a tiny model file."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cfmask.models.head import save_model
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.logging import message_of
from cfmask.runtime.process import exit_without_finalization
from launch.drills.materials import CLASSES, REPO, convert, draw_images
from slurm_fixture import wait_until
from towers import TINY, Geometry

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel."""


def make_materials(root: Path, *, per_class: int = 32) -> Path:
    """root/images, root/shards of several shards a split, root/tiny.safetensors with root/tiny.json."""
    draw_images(root / "images", per_class=per_class)
    convert(root / "images", root / "shards", "--samples-per-shard", "10")
    save_tiny_model(root / "tiny.safetensors")
    return root


def recipe_flags(materials: Path, run: Path) -> list[object]:
    """A recipe of 6 steps an epoch for 96 training images, into ``run``."""
    return [
        *("--shards", materials / "shards", "--model", materials / "tiny.json"),
        *("--pretrained", materials / "tiny.safetensors", "--batch-size", 16, "--lanes", 4),
        *("--warmup-steps", 2, "--lr", 1e-3, "--loader-workers", 0, "--log-steps", 1, "--run", run),
    ]


def save_tiny_model(path: Path, geometry: Geometry = TINY, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write a model file and the configuration for --model beside it."""
    import dataclasses
    import json

    info = dataclasses.replace(geometry.info(len(classes)), classes=classes)
    path.with_suffix(".json").write_text(json.dumps(info.config))
    save_model(path, geometry.classifier(classes=len(classes)), info)
    return path


def save_moved_model(source: Path, path: Path, by: float) -> None:
    """Write a model file whose weights differ from another's by random steps."""
    import torch

    from cfmask.models.head import load_model

    model, info = load_model(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn_like(parameter)
    save_model(path, model, info)


def forkserver():
    """The context of ``multiprocessing`` whose processes are forked from one that has imported torch and training, and
    has no threads."""
    import multiprocessing

    multiprocessing.set_forkserver_preload(["cfmask.training.passes"])
    return multiprocessing.get_context("forkserver")


def run_ranks(function: Callable, ranks: int, *args: object, join: bool = True):
    """``function(rank, *args)`` in processes, which are forked from one that has imported what ranks need.

    A rank that is done ends as one of a job does, without Python's finalization, which can abort. Environment variables
    that a test sets do not reach it.

    Returns:
        Without ``join``, the context of ``torch.multiprocessing``.
    """
    import torch.multiprocessing

    forkserver()
    return torch.multiprocessing.start_processes(
        _rank, args=(function, args), nprocs=ranks, join=join, start_method="forkserver"
    )


def _rank(rank: int, function: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    function(rank, *args)
    exit_without_finalization(0)


def path_of_all_imports() -> str:
    """PYTHONPATH for processes that import everything, as outside of tests (lean/lean.py)."""
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    return os.pathsep.join(path for path in paths if path != str(REPO / "tests/lean"))


def train(recipe: Recipe, folder: Path, stop_at: int | None = None) -> RunFolder:
    """Train in this process, with one rank; stop at ``stop_at`` like a preempted run."""
    import tensorboard.summary.writer.event_file_writer as events

    import cfmask.training.train
    from cfmask.runtime.distributed import DistributedContext
    from cfmask.session import FINISHED, REQUEUE

    # TensorBoard reads files in the order of their names: second, host, pid, and then a count within the process, in
    # which 10 comes before 9. A run's starts are processes of their own everywhere but here.
    if events._global_uid.get() < 1000:
        events._global_uid = type(events._global_uid)(1000)
    run = RunFolder(folder)
    run.claim(recipe)
    asked = iter(range(10**6))
    outcome = cfmask.training.train.train(
        recipe, run, DistributedContext(), lambda: REQUEUE if next(asked) + 1 == stop_at else None
    )
    assert outcome == (FINISHED if stop_at is None else REQUEUE)
    return run


def plant(clone: Path, **ends: str) -> Path:
    """A working copy with more code at the end of modules, which are named as cfmask__training__train."""
    for folder in ("cfmask", "launch"):
        shutil.copytree(REPO / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for module, end in ends.items():
        path = clone / f"{module.replace('__', '/')}.py"
        path.write_text(path.read_text() + end)
    return clone


SUBMIT_PACED = """
import sys
from launch import submit
from cfmask.runtime.command import exits_cleanly
pace_s = float(sys.argv.pop(1))
sys.exit(exits_cleanly(lambda: submit.submit(submit.parser().parse_args(), pace_s=pace_s))())
"""


def submit_command(*flags: object, repository: Path = REPO, pace_s: float = 0.0) -> list[str]:
    """`python launch/submit.py …`. Its ranks wait ``pace_s`` at each step, so that a run does not finish before it is
    disturbed, also on a busy machine. The code is that of ``environment_of``."""
    program = ["-c", SUBMIT_PACED, str(pace_s)] if pace_s else [str(repository / "launch/submit.py")]
    return [sys.executable, *program, *map(str, flags)]


def environment_of(repository: Path) -> dict[str, str]:
    """The environment for commands of a working copy, which refuse the library of another."""
    path = os.environ["PYTHONPATH"] if repository == REPO else f"{repository}{os.pathsep}{os.environ['PYTHONPATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def submit(
    *flags: object, check: bool = True, repository: Path = REPO, pace_s: float = 0.0, **popen
) -> subprocess.CompletedProcess:
    """Run ``submit_command`` with one thread per process, and wait for its end."""
    environment = {**environment_of(repository), **popen.pop("env", {})}
    command = submit_command(*flags, repository=repository, pace_s=pace_s)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, **popen)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def jobs_of(done: subprocess.CompletedProcess, cwd: Path = Path()) -> dict[str, Path]:
    """Job ids with their run folders, as submit.py printed them.

    Args:
        cwd: The directory in which it ran.
    """
    found = re.findall(r"^ {9}(\d+(?:_\d+)?)  (.*)$", done.stdout, re.MULTILINE)
    if not found:
        [run] = re.findall(r"^run      (.*): (?:new|resumes|starts)", done.stdout, re.MULTILINE)
        found = [(re.findall(r"^job      (\S+) on ", done.stdout, re.MULTILINE)[0], run)]
    return {job: cwd / run for job, run in found}


PACE_S = 0.05


def start(*flags: object, pace_s: float = PACE_S) -> subprocess.Popen:
    """Start ``submit_command`` in its own process group."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        submit_command(*flags, pace_s=pace_s),
        start_new_session=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def assert_same_weights(run: Path, other: Path) -> None:
    """Check that the last checkpoints and the models are bitwise identical."""
    import torch
    from safetensors.torch import load_file

    last = [max((each / "checkpoints").glob("step-*")) for each in (run, other)]
    assert last[0].name == last[1].name
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(each / name) for each in last)
        assert ours and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in ours), name


def assert_log_format(run: Path) -> None:
    """Every line in a job's logs has its time, level, rank and node, except Slurm's own."""
    logs = [*(run / "jobs").glob("*_log.out"), *(run / "jobs").glob("controller.log")]
    lines = [line for log in logs for line in log.read_text().splitlines()]
    assert lines and [line for line in lines if message_of(line) == line and not SLURMS_OWN.match(line)] == []


SLURMS_OWN = re.compile(r"(srun|slurmstepd(-\S+)?): ")


def logs(run: Path) -> str:
    """The end of every rank's log."""
    return "\n".join(f"{p.name}:\n{p.read_text(errors='replace')[-3000:]}" for p in (run / "jobs").glob("*.out"))


def wait_for(run: Path, holds: Callable[[], bool], what: str, timeout: float = 300) -> None:
    """``wait_until``, with the run's logs in the error."""
    try:
        wait_until(holds, what, timeout)
    except BaseException:
        print(logs(run))
        raise


def wait_for_step(run: Path, step: int) -> None:
    wait_for(run, lambda: any(line["step"] >= step for line in read_lines(run / "log.jsonl")), f"step {step} of {run}")


def descendants(pid: int) -> list[int]:
    """Pids of the descendants of a process, except below processes that have ended."""
    command = ["ps", "-eo", "pid=,ppid="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    found: list[int] = []
    of = {pid}
    while of := {child for child, parent in parents.items() if parent in of}:
        found += sorted(of)
    return found


def kill_all(process: subprocess.Popen) -> None:
    """Send SIGKILL to a command and its descendants: controller, ranks, loaders."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Pids of the ranks that a submit command has started, in the order in which they came. Each is the child of a
    process that waits for it (launch/ranks/supervisor.py)."""
    of_command = [process.pid, *descendants(process.pid)]
    shown = ",".join(map(str, of_command))
    listed = subprocess.run(["ps", "-ww", "-o", "pid=,ppid=,args=", "-p", shown], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    starts = [row for row in rows if "submitit.core._submit" in row[2]]
    waiting = {row[0] for row in starts}
    return sorted(int(pid) for pid, parent, _ in starts if parent in waiting)
