"""Scheduled evaluation during training: it is logged once, also after interruptions, and does not affect training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import made
from cfmask.checkpoint.state import read_state
from cfmask.errors import UserError
from cfmask.recipe import Data, Method, Model, Optim, Recipe, Run
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines

SCHEDULE = [(3, 0.5), (6, 1), (9, 1.5), (12, 2)]  # every 3 of 6 steps an epoch: each second one is an epoch's end


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def recipe_of(materials: Path, eval_steps: int | None = 3, **run) -> Recipe:
    return Recipe(
        model=Model(name=str(materials / "tiny.json"), pretrained=str(materials / "tiny.safetensors")),
        method=Method(mask="object", fill="single-fill"),
        data=Data(shards=str(materials / "shards"), loader_workers=0, eval_sets=("val",)),
        optim=Optim(epochs=2, batch_size=16, lanes=4, lr=1e-3, warmup_steps=2),
        run=Run(precision="fp32", eval_steps=eval_steps, **{"checkpoint_steps": 2, "log_steps": 1, **run}),
    ).resolved()


def evaluations(run: RunFolder) -> list[dict]:
    return [line for line in read_lines(run.log) if "eval" in line]


def curve(run: RunFolder) -> list[tuple[int, float]]:
    """The accuracy in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.root / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("eval/val")]


@pytest.fixture(scope="module")
def evaluated(materials, tmp_path_factory) -> RunFolder:
    run = made.train(recipe_of(materials), tmp_path_factory.mktemp("evaluated") / "run")
    return run


def test_evaluation_does_not_change_the_training(materials, evaluated, tmp_path):
    plain = made.train(recipe_of(materials, eval_steps=None), tmp_path / "plain")
    ours, theirs = load_file(evaluated.final), load_file(plain.final)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    newest = [max(run.checkpoints.glob("step-*")) / "optimizer.safetensors" for run in (evaluated, plain)]
    assert newest[0].read_bytes() == newest[1].read_bytes()
    assert [line["loss"] for line in read_lines(evaluated.log) if "loss" in line] == [
        line["loss"] for line in read_lines(plain.log) if "loss" in line
    ]
    at_ends = [line for line in evaluations(evaluated) if line["step"] % 6 == 0]
    assert at_ends == evaluations(plain)


def test_each_evaluation_is_logged_and_drawn(evaluated):
    lines = evaluations(evaluated)
    assert [(line["step"], line["epoch"]) for line in lines] == SCHEDULE
    assert curve(evaluated) == [(line["step"], pytest.approx(line["eval"]["val"], rel=1e-6)) for line in lines]
    # The line of the step comes first, and training rates exclude the time of evaluations.
    steps = [line["step"] for line in read_lines(evaluated.log)]
    assert steps == sorted(steps)
    assert all(line["samples_per_s"] > 0 for line in read_lines(evaluated.log) if "loss" in line)


@pytest.mark.parametrize("stop_at", [2, 3, 5, 9], ids="step {}".format)
def test_a_stopped_run_logs_each_evaluation_once(materials, evaluated, tmp_path, stop_at):
    made.train(recipe_of(materials), tmp_path / "run", stop_at=stop_at)
    run = made.train(recipe_of(materials), tmp_path / "run")
    assert evaluations(run) == evaluations(evaluated)
    assert curve(run) == curve(evaluated)


def test_a_killed_run_logs_each_evaluation_once(materials, evaluated, tmp_path):
    """As after a kill at step 4, with only the checkpoint of step 2."""
    run = made.train(recipe_of(materials), tmp_path / "run", stop_at=2)
    lines = [line for line in read_lines(evaluated.log) if line["step"] in (3, 4)]
    assert sum("eval" in line for line in lines) == 1
    with open(run.log, "a") as file:
        file.write("".join(f"{line}\n".replace("'", '"') for line in lines))
    made.train(recipe_of(materials), tmp_path / "run")
    assert evaluations(run) == evaluations(evaluated)


def test_best_checkpoint_is_at_the_end_of_an_epoch(materials, tmp_path):
    """Here each evaluation has a checkpoint; those within an epoch have no score."""
    run = made.train(recipe_of(materials, checkpoint_steps=3, keep_checkpoints=9, best_on="val"), tmp_path / "run")
    saved = {path: read_state(path) for path in run.checkpoints.glob("step-*")}
    assert {state.step: bool(state.top1) for state in saved.values()} == {3: False, 6: True, 9: False, 12: True}


def test_schedule_without_sets_or_with_step_0_is_refused(materials):
    recipe = recipe_of(materials)
    with pytest.raises(UserError, match="--eval-steps 3 would do nothing without --eval-sets"):
        dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, eval_sets=())).resolved()
    with pytest.raises(UserError, match="--eval-steps is 0; it must be at least 1"):
        recipe_of(materials, eval_steps=0)
