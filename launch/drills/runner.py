"""Does drills, several at the same time, and judges the runs."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from launch.drills.environment import STEPS, Drill, DrillEnvironment
from launch.drills.handle import DrillFailed, Poll, RunHandle
from launch.drills.scenarios import UNDISTURBED


@dataclass
class DrillResult:
    """The result of a drill."""

    drill: Drill
    run: RunHandle
    problems: list[str] = field(default_factory=list)
    """Why the scenario failed, or what is wrong with the run; empty if the drill passed."""
    took_s: float = 0.0


def run_drills(drills: Sequence[Drill], env: DrillEnvironment, *, at_once: int) -> list[DrillResult]:
    """Do an undisturbed run and the drills, ``at_once`` of them at the same time, and compare them with it.

    An exception cancels all jobs.

    Returns:
        The undisturbed run's result, then those of the drills in the order given.

    Raises:
        UserError: the undisturbed run fails.
    """
    waiting = sorted([UNDISTURBED, *drills], key=lambda drill: drill.alone)
    under_way: list[tuple[DrillResult, Poll, float]] = []
    results: list[DrillResult] = []
    with tqdm(
        total=len(waiting), unit="drill", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15
    ) as bar:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < (1 if waiting[0].alone else at_once):
                    if under_way and under_way[0][0].drill.alone:
                        break
                    drill = waiting.pop(0)
                    run = env.handle(drill)
                    under_way.append((DrillResult(drill, run), drill.scenario(run, env), time.monotonic()))
                for each in list(under_way):
                    result, scenario, began = each
                    if not _advance(result, scenario):
                        result.took_s = time.monotonic() - began
                        under_way.remove(each)
                        results.append(result)
                        bar.update()
                        if result.problems and result.drill is UNDISTURBED:
                            raise UserError(f"The undisturbed run fails: {result.problems[0]}")
                bar.set_description(", ".join(f"{r.drill.name} {r.run.step}/{STEPS}" for r, _, _ in under_way), False)
                bar.update(0)
                time.sleep(0.05)
        finally:
            for result, scenario, _ in under_way:
                scenario.close()  # type: ignore[attr-defined]
                result.run.cancel()
    order = [UNDISTURBED, *drills]
    results.sort(key=lambda result: order.index(result.drill))
    for result in results[1:]:
        result.problems += [] if result.problems else judge(result, results[0])
    return results


def _advance(result: DrillResult, scenario: Poll) -> bool:
    """Let a scenario check once. Returns whether it continues."""
    try:
        result.run.snapshot()
        next(scenario)
        return True
    except StopIteration:
        return False
    except (DrillFailed, UserError, OSError) as error:
        result.problems.append(str(error))
        result.run.cancel()
        return False


# --- judging ----------------------------------------------------------------------------------------------------------


def judge(result: DrillResult, undisturbed: DrillResult) -> list[str]:
    """The problems of the run that a drill has left; empty if it passes."""
    if not result.drill.trains:
        return []
    ours, theirs = result.run.folder, undisturbed.run.folder
    problems = []
    ends = "; ".join(str(line["why_last_ended"]) for line in read_lines(ours.attempts)[1:])
    if not re.fullmatch(result.drill.ends, ends, re.DOTALL):
        problems.append(f"attempts.jsonl gives other ends of its starts: {ends or 'there was no second start'}")
    if read_lines(ours.receipts) != read_lines(theirs.receipts):
        problems.append("other samples were trained on: its receipts differ from those of the undisturbed run")
    if result.drill.same_ranks:
        last = f"step-{STEPS:08d}"
        tensors, _ = different_tensors(ours.checkpoints / last, theirs.checkpoints / last)
        problems += [f"{len(tensors)} tensors differ: {', '.join(tensors[:3])}"] if tensors else []
    elif differing := different_losses(ours, theirs, tolerance=1e-3):
        problems.append(differing)
    return problems


def different_tensors(ours: Path, theirs: Path) -> tuple[list[str], int]:
    """Compare the weights and moments of two checkpoints.

    Returns:
        The tensors that are missing in one or not bitwise identical, as "NAME of FILE", and the number of all tensors.
    """
    import torch
    from safetensors.torch import load_file

    found, total = [], 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(ours / file), load_file(theirs / file)
        total += len(a.keys() | b.keys())
        found += [f"{name} of {file}" for name in a.keys() ^ b.keys()]
        found += [f"{name} of {file}" for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    return sorted(found), total


def different_losses(ours: RunFolder, theirs: RunFolder, *, tolerance: float) -> str:
    """Describe the first step whose logged losses differ by more than the relative tolerance; "" if there is none."""
    a, b = ({x["step"]: x["loss"] for x in read_lines(run.log) if "loss" in x} for run in (ours, theirs))
    if a.keys() != b.keys():
        return "other steps are logged than in the undisturbed run"
    apart = [step for step in a if abs(a[step] - b[step]) > tolerance * max(abs(b[step]), 1e-3)]
    return f"the loss of step {apart[0]} is {a[apart[0]]:g}, undisturbed {b[apart[0]]:g}" if apart else ""
