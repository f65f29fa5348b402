"""Every method from recipe to trained model: which parameters it trains, and what it logs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import cfmask.training.train
import made
from cfmask.errors import UserError
from cfmask.presets import PRESETS
from cfmask.recipe import Data, Model, Recipe, Run
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from tools import wise_ft

STEPS = 6  # an epoch of 96 samples in batches of 16


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def recipe_of(materials, preset: str, **optim) -> Recipe:
    base = PRESETS[preset]
    settings = {"epochs": 2, "batch_size": 16, "lanes": 4, "micro_batches": 2, "lr": 1e-3, **optim}
    if preset != "released-code":
        settings["warmup_steps"] = 2
    return dataclasses.replace(
        base,
        model=Model(name=str(materials / "tiny.json"), pretrained=str(materials / "tiny.safetensors")),
        data=Data(shards=str(materials / "shards"), loader_workers=0),
        optim=dataclasses.replace(base.optim, **settings),
        run=Run(precision="fp32", checkpoint_steps=4, keep_checkpoints=99, log_steps=1),
    )


def train(recipe: Recipe, folder, stop_at: int | None = None) -> RunFolder:
    return made.train(recipe.resolved(), folder, stop_at)


def steps_of(run: RunFolder) -> list[dict]:
    return [line for line in read_lines(run.log) if "loss" in line]


def changed(run: RunFolder, since: str = "initial.safetensors", until: str = "model.safetensors") -> set[str]:
    """Which of tower and head differ between two model files of a run."""
    before, after = load_file(run.root / since), load_file(run.root / until)
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {name for name in before if name.startswith("visual.")}
    assert not differ & tower or tower <= differ, "all of the tower is trained, or nothing"
    return {name.partition(".")[0] for name in differ}


TERMS = {"ft": set(), "linear-probe": set(), "kd-clean": {"kd"}, "kd-masked": {"kd"}}


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("wise-kd", "lp-ft")])
def test_a_preset_trains_its_parameters_with_the_terms_of_its_loss(materials, tmp_path, preset):
    run = train(recipe_of(materials, preset), tmp_path / "run")
    assert changed(run) == ({"head"} if preset == "linear-probe" else {"visual", "head"})
    logged = steps_of(run)
    assert len(logged) == 2 * STEPS
    terms = TERMS.get(preset, {"mse"})
    method = run.recipe().method
    weights = {"kd": method.gamma, "mse": method.beta}
    # The student starts as the teacher, so the term begins at 0 and grows.
    assert all(any(line[term] > 0 for line in logged) == (term in terms) for term in ("kd", "mse"))
    for line in logged:
        expected = line["ce"] + sum(weights[term] * line[term] for term in terms)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert (line["masked"] > 0) == method.masked
    first, last = (sum(line["ce"] for line in part) for part in (logged[:STEPS], logged[STEPS:]))
    # 30 times the KL to its teacher's logits holds a student that has twelve steps where it starts.
    assert last < first or method.gamma == 30, "the labels were not learned"


def test_lp_ft_trains_the_head_and_then_everything_each_with_its_own_schedule(materials, tmp_path):
    run = train(recipe_of(materials, "lp-ft", probe_epochs=1, probe_lr=1e-2), tmp_path / "run")
    probe = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert changed(run, until=probe) == {"head"}
    assert changed(run, since=probe) == {"visual", "head"}
    rates = [line["lr"] for line in steps_of(run)]
    assert len(rates) == 3 * STEPS
    assert max(rates[:STEPS]) == 1e-2 and max(rates[STEPS:]) == 1e-3
    assert rates[0] == 5e-3 and rates[STEPS] == 5e-4, "both begin with a warm-up"
    moments = load_file(run.root / f"checkpoints/step-{STEPS:08d}/optimizer.safetensors")
    assert {name.partition(".")[2].partition(".")[0] for name in moments} == {"head"}


@pytest.mark.parametrize("stop_at", [3, STEPS - 1, STEPS + 2], ids=["in the probe", "where phases meet", "after it"])
def test_lp_ft_resumed_in_any_phase_ends_bitwise_identical(materials, tmp_path, stop_at):
    recipe = recipe_of(materials, "lp-ft", probe_epochs=1)
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "run", stop_at=stop_at)
    run = train(recipe, tmp_path / "run")
    # asked at a step, heard at the next, or at once where a checkpoint is due
    assert read_lines(run.attempts)[1]["from_step"] in (stop_at, stop_at + 1)
    assert_same_end(run, whole, 3 * STEPS)


def assert_same_end(run: RunFolder, other: RunFolder, step: int) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(r.checkpoints / f"step-{step:08d}" / file) for r in (run, other))
        assert ours.keys() == theirs.keys() and ours
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{name} of {file} differs"


def test_wise_kd_learns_from_an_ensemble_that_wise_ft_made_and_keeps_a_copy_of_it(materials, tmp_path):
    fine = train(recipe_of(materials, "ft", lr=1e-2), tmp_path / "ft")
    ensemble = tmp_path / "wise/model.safetensors"
    wise_ft.main([str(fine.initial), str(fine.root), "--alphas", "0.5", "--out", str(ensemble.parent)])
    recipe = recipe_of(materials, "wise-kd")
    recipe = dataclasses.replace(recipe, method=dataclasses.replace(recipe.method, ensemble=str(ensemble)))
    train(recipe, tmp_path / "run", stop_at=4)
    ensemble.unlink()  # a run folder says everything
    run = train(recipe, tmp_path / "run")
    for line in steps_of(run):
        assert line["kd"] > 0
        assert line["loss"] == pytest.approx(line["ce"] + line["kd"] + 30 * line["mse"], rel=1e-5)
    assert steps_of(run)[-1]["mse"] > 0
    model_of_two = made.save_tiny_model(tmp_path / "two.safetensors", classes=made.CLASSES[:2])
    other = dataclasses.replace(recipe, method=dataclasses.replace(recipe.method, ensemble=str(model_of_two)))
    with pytest.raises(UserError, match="has 2 classes, the shards 3|has 2 classes"):
        train(other, tmp_path / "other")


# --- losses and gradients that are not finite -------------------------------------------------------------------------


@pytest.fixture
def corrupt(monkeypatch):
    """Makes pixels of one sample infinite in the micro-batches of the steps named; returns their keys as they go by."""

    def arrange(steps: set[int], first_step: int = 1) -> list[str]:
        keys: list[str] = []
        real = cfmask.training.train.inputs_of
        count = iter(range(2 * (first_step - 1), 10**6))

        def corrupting(batch):
            step, part = divmod(next(count), 2)
            if step + 1 in steps and part == 1:
                images = batch.images.float() / 255
                images[3] = torch.inf
                batch = dataclasses.replace(batch, images=images)
                keys.append(batch.keys[3])
            return real(batch)

        monkeypatch.setattr(cfmask.training.train, "inputs_of", corrupting)
        return keys

    yield arrange


def test_a_step_that_is_not_finite_is_skipped_counted_and_its_sample_named(materials, tmp_path, corrupt):
    recipe = recipe_of(materials, "object-mask-single-fill")
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, checkpoint_steps=1))
    keys = corrupt({4})
    run = train(recipe, tmp_path / "run")
    (line,) = read_lines(run.skipped_steps)
    assert line["step"] == 4 and keys[0] in line["keys"] and line["why"] == "outputs not finite"
    # samples that have its patches are not finite either, and no others
    assert len(line["keys"]) <= 2
    for file in ("model.safetensors", "optimizer.safetensors"):
        before, after = (load_file(run.checkpoints / f"step-{step:08d}" / file) for step in (3, 4))
        assert all(torch.equal(before[name], after[name]) for name in before), "it changed a weight or a moment"
    states = {s: json.loads((run.checkpoints / f"step-{s:08d}/state.json").read_text()) for s in (3, 4, 5)}
    assert [states[s]["updates"] for s in (3, 4, 5)] == [3, 3, 4]
    assert states[4]["skips"] == {"total": 1, "in_a_row": 1} and states[5]["skips"] == {"total": 1, "in_a_row": 0}
    assert json.loads(run.results.read_text())["skipped_steps"] == 1
    assert [x["step"] for x in steps_of(run)] == [n for n in range(1, 2 * STEPS + 1) if n != 4]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(run.final).values())


def test_a_run_resumed_after_a_skipped_step_ends_bitwise_identical(materials, tmp_path, corrupt):
    recipe = recipe_of(materials, "object-mask-single-fill")
    corrupt({4})
    whole = train(recipe, tmp_path / "whole")
    corrupt({4})
    train(recipe, tmp_path / "run", stop_at=6)
    run = train(recipe, tmp_path / "run")
    assert_same_end(run, whole, 2 * STEPS)
    assert read_lines(run.skipped_steps) == read_lines(whole.skipped_steps)


def test_too_many_successive_skips_end_the_run_and_keep_the_last_good_checkpoint(materials, tmp_path, corrupt):
    recipe = recipe_of(materials, "ft", max_skipped_steps=2)
    corrupt(set(range(6, 99)))
    with pytest.raises(FloatingPointError, match="3 steps in a row.*--max-skipped-steps allows 2.*skipped_steps.jsonl"):
        train(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert [line["step"] for line in read_lines(run.skipped_steps)] == [6, 7, 8]
    assert json.loads((run.root / "ended.json").read_text())["why"].startswith("failed: FloatingPointError")
    newest = max(run.checkpoints.glob("step-*"))
    assert all(torch.isfinite(tensor).all() for tensor in load_file(newest / "model.safetensors").values())
    assert not run.results.exists()


@pytest.mark.parametrize(
    ("row", "steps", "at"),
    [
        ("ft", range(1, 99), 2 * STEPS),
        ("ft", range(STEPS + 1, 99), 2 * STEPS),
        ("lp-ft", range(1, STEPS + 1), STEPS),
        ("lp-ft", range(STEPS + 1, 99), 3 * STEPS),
    ],
    ids=["all", "the last epoch", "linear probing", "all behind linear probing"],
)
def test_a_phase_whose_last_epoch_took_no_step_is_not_finished(materials, tmp_path, corrupt, row, steps, at):
    """Fewer than --max-skipped-steps allows: a short run would end before it has as many."""
    recipe = recipe_of(materials, row, max_skipped_steps=99, epochs=2)
    if row == "lp-ft":
        recipe = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, probe_epochs=1))
    corrupt(set(steps))
    with pytest.raises(FloatingPointError, match=f"last of them step {at}; an epoch has {STEPS}.* trained nothing"):
        train(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert not run.results.exists() and run.ended()["why"].startswith("failed: FloatingPointError")


def test_a_resumed_run_counts_skipped_steps_over_its_starts(materials, tmp_path, corrupt):
    """Two steps of the last epoch were taken before the stop, so not all of its steps were skipped."""
    recipe = recipe_of(materials, "ft", max_skipped_steps=99)
    train(recipe, tmp_path / "run", stop_at=STEPS + 2)
    corrupt(set(range(STEPS + 3, 99)), first_step=STEPS + 3)
    run = train(recipe, tmp_path / "run")
    assert json.loads(run.results.read_text())["skipped_steps"] == STEPS - 2

    train(recipe, tmp_path / "other", stop_at=STEPS - 1)
    corrupt(set(range(STEPS + 1, 99)), first_step=STEPS + 1)
    with pytest.raises(FloatingPointError, match="trained nothing"):
        train(recipe, tmp_path / "other")


def test_steps_skipped_at_the_very_end_are_reported(materials, tmp_path, corrupt, capsys):
    corrupt({2 * STEPS - 1, 2 * STEPS})
    train(recipe_of(materials, "ft"), tmp_path / "run")
    assert "warning: the last 2 steps were skipped" in capsys.readouterr().err
