"""The training loop waits for the device only where it says so.

One run, on the CPU and on a GPU alike: steps, logging, checkpoints beside training, evaluations and a mask study. From
its ``WARM``-th step on a mode is on in which an operation that waits for the device is an error. Off it is

    where an evaluation reads the counts of a set (``Counts.scores``), for the length of this call
    from the last ``wait_for_checkpoint`` on, with which a run ends

What waits and is no error in this mode: for the event behind the copy of a step's metrics, which lies a step back, or
in the step itself where a checkpoint or an evaluation is due. What is not in this run: steps that are skipped, bad
samples and stops, whose reports are exceptional and wait.

On a GPU the mode is torch's own (``torch.cuda.set_sync_debug_mode``). On the CPU it finds what reads a number out of a
tensor (``item``, ``float``, ``bool``), which on a GPU would wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import cfmask.training.train
from cfmask.checkpoint.state import list_checkpoints, read_state
from cfmask.checkpoint.writer import CheckpointWriter
from cfmask.counting import Counts
from cfmask.recipe import Recipe, Run
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.jsonl import read_lines
from cfmask.session import FINISHED
from cfmask.training.mask_study import MaskStudyLog
from test_overlap import materials, recipe_of  # noqa: F401

WARM = 4  # the first checkpoint and the first evaluation have been
STEPS = 12  # 4 epochs of 3

SetMode = Callable[[bool], None]


def recipe_for(materials: Path, precision: str) -> Recipe:  # noqa: F811
    recipe = recipe_of(materials)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, eval_sets=("train",)),
        optim=dataclasses.replace(recipe.optim, epochs=STEPS // 3),
        run=Run(precision=precision, checkpoint_steps=2, eval_steps=3, log_steps=1, keep_checkpoints=99),
    ).resolved()


def train_watched(
    monkeypatch, recipe: Recipe, folder: Path, context: DistributedContext, set_mode: SetMode
) -> dict[str, int]:
    """Train with the mode on as described above. Returns how often what happened while it was on."""
    on = False
    happened = {"step": 0, "checkpoint": 0, "evaluation": 0, "all steps": 0}

    def switch(to: bool) -> None:
        nonlocal on
        on = to
        set_mode(to)

    def counted(what: str, real: Callable) -> Callable:
        def call(*arguments, **named):
            happened[what] += on
            return real(*arguments, **named)

        return call

    def take_step(*arguments):
        happened["all steps"] += 1
        if happened["all steps"] == WARM:
            switch(True)
        happened["step"] += on
        return real_take_step(*arguments)

    def scores(self):
        was_on = on
        switch(False)
        try:
            return real_scores(self)
        finally:
            switch(was_on)

    def wait_for_checkpoint(writer):
        switch(False)
        return real_wait(writer)

    real_take_step, real_scores, real_wait = (
        cfmask.training.train.take_step,
        Counts.scores,
        cfmask.training.train.wait_for_checkpoint,
    )
    monkeypatch.setattr(cfmask.training.train, "take_step", take_step)
    monkeypatch.setattr(cfmask.training.train, "wait_for_checkpoint", wait_for_checkpoint)
    monkeypatch.setattr(cfmask.training.train, "top1", counted("evaluation", cfmask.training.train.top1))
    monkeypatch.setattr(Counts, "scores", scores)
    monkeypatch.setattr(CheckpointWriter, "start", counted("checkpoint", CheckpointWriter.start))
    run = RunFolder(folder)
    run.claim(recipe)
    try:
        assert cfmask.training.train.train(recipe, run, context) == FINISHED
    finally:
        set_mode(False)
    assert len([line for line in read_lines(run.log) if "loss" in line]) == STEPS
    assert len([line for line in read_lines(run.log) if "overlap" in line]) == 4
    saved = [read_state(path) for path in list_checkpoints(run.checkpoints)]
    assert [(one.step, one.updates) for one in saved] == [(n, n) for n in (12, 10, 9, 8, 6, 4, 3, 2)]
    return happened


EXPECTED = {"step": 9, "checkpoint": 6, "evaluation": 3, "all steps": STEPS}


class NothingIsRead(TorchDispatchMode):
    """Raises where a number is read out of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{function} would wait for a GPU")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def nothing_is_read(monkeypatch) -> Iterator[SetMode]:
    """The CPU's mode. Off too where the mask study's log reads its sums, which are on the host with a GPU as well."""
    with contextlib.ExitStack() as stack:

        def set_mode(to: bool) -> None:
            stack.close()
            if to:
                stack.enter_context(NothingIsRead())

        def end_epoch(*arguments, **named):
            was_on = isinstance(_get_current_dispatch_mode(), NothingIsRead)
            set_mode(False)
            real_end_epoch(*arguments, **named)
            set_mode(was_on)

        real_end_epoch = MaskStudyLog.end_epoch
        monkeypatch.setattr(MaskStudyLog, "end_epoch", end_epoch)
        yield set_mode


def test_steps_checkpoints_and_evaluations_of_a_run_read_no_tensor(
    materials,  # noqa: F811
    tmp_path,
    monkeypatch,
    nothing_is_read,
):
    recipe = recipe_for(materials, "fp32")
    assert train_watched(monkeypatch, recipe, tmp_path / "run", DistributedContext(), nothing_is_read) == EXPECTED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", ["on", "off"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_checkpoints_and_evaluations_of_a_run_never_wait_for_the_device(
    materials,  # noqa: F811
    tmp_path,
    monkeypatch,
    precision,
    graphs,
):
    def set_mode(to: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if to else "default")

    recipe = recipe_for(materials, precision)
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, cuda_graphs=graphs))
    assert train_watched(monkeypatch, recipe, tmp_path / "run", DistributedContext(gpu=True), set_mode) == EXPECTED
