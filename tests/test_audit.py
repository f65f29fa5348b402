"""Receipts prove which samples a run was trained on. The audit finds repeated and skipped samples."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cfmask.audit
import made
from cfmask.checkpoint.state import digest_of
from cfmask.data import plan, receipts
from cfmask.evaluation_spec import Evaluation
from cfmask.recipe import Data, Method, Model, Optim, Recipe, Run
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from tools import audit

STEPS = 6  # an epoch of 96 samples in batches of 16


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def train(materials, folder, stop_at=None):
    """A run of two epochs in this process. At ``stop_at`` it is asked to stop, as by a preemption."""
    recipe = Recipe(
        model=Model(name=str(materials / "tiny.json"), pretrained=str(materials / "tiny.safetensors")),
        method=Method(name="vanilla"),
        data=Data(shards=str(materials / "shards"), loader_workers=0),
        optim=Optim(epochs=2, batch_size=16, lanes=4, warmup_steps=2, lr=1e-3, micro_batches=2),
        run=Run(precision="fp32", checkpoint_steps=4, keep_checkpoints=9, log_steps=2),
    ).resolved()
    return made.train(recipe, folder, stop_at)


def run_audit(run, capsys):
    capsys.readouterr()
    code = audit.main([str(run.root)])
    return code, capsys.readouterr().out


def test_an_uninterrupted_run_is_proven(materials, tmp_path, capsys):
    run = train(materials, tmp_path / "run")
    code, out = run_audit(run, capsys)
    assert code == 0 and "Proven" in out
    assert out.count("each planned sample once") == 2
    states = [json.loads(path.read_text()) for path in sorted(run.checkpoints.glob("*/state.json"))]
    assert [(s["step"], s["consumed"]["samples"]) for s in states] == [(n, 16 * n) for n in (4, 6, 8, 12)]


def test_a_resumed_run_is_proven_and_has_the_same_receipts(materials, tmp_path, capsys):
    whole = train(materials, tmp_path / "whole")
    run = train(materials, tmp_path / "run", stop_at=5)
    code, out = run_audit(run, capsys)
    assert code == 0 and "each of its first 6 of 6" not in out
    assert "each planned sample once" in out  # the request of step 5 takes effect after step 6
    run = train(materials, tmp_path / "run")
    assert run.receipts.read_text() == whole.receipts.read_text()
    code, out = run_audit(run, capsys)
    assert code == 0 and "attempt 2: from step 6" in out


def tampered(monkeypatch, change):
    """Change the plan that the stream follows in the second epoch."""
    real = plan.lane_order

    def other(counts, *, lane, epoch, **rest):
        order = real(counts, lane=lane, epoch=epoch, **rest)
        if epoch == 1 and lane == 2:
            change(order)
        return order

    monkeypatch.setattr(plan, "lane_order", other)


def test_a_repeated_sample_is_found_with_its_step(materials, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        tampered(patch, lambda order: order.__setitem__((3, 1), order[2, 0]))
        run = train(materials, tmp_path / "run")
    code, out = run_audit(run, capsys)
    assert code == 1 and "NOT PROVEN" in out
    planned = cfmask.audit.load_plan(run)[0]
    repeated, missing = planned.keys[planned.ids(STEPS + 3)[8]], planned.keys[planned.ids(STEPS + 4)[9]]
    assert f"Step 10 (epoch 2, step 4 in it) consumed {repeated} where {missing} was planned" in out
    assert out.count("consumed") == 1
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ")]
    assert [row[-2].strip() for row in rows[1:]] == ["each planned sample once", "WRONG"]


def test_a_skipped_step_is_found(materials, tmp_path, capsys, monkeypatch):
    def skip_step_3(order):
        order[2:-1] = order[3:].copy()

    with monkeypatch.context() as patch:
        for_all_lanes = plan.lane_order

        def other(counts, *, epoch, **rest):
            order = for_all_lanes(counts, epoch=epoch, **rest)
            if epoch == 1:
                skip_step_3(order)
            return order

        patch.setattr(plan, "lane_order", other)
        run = train(materials, tmp_path / "run")
    code, out = run_audit(run, capsys)
    assert code == 1
    for step in (9, 10, 11):
        assert f"Step {step} (epoch 2, step {step - 6} in it) consumed the samples of step {step + 1}" in out
    assert "Step 12" not in out and "Step 8" not in out


def test_a_checkpoint_with_a_damaged_state_proves_nothing(materials, tmp_path, capsys):
    run = train(materials, tmp_path / "run")
    state = run.checkpoints / "step-00000012/state.json"
    state.write_bytes(state.read_bytes().replace(b'"updates": 12', b'"updates": 13'))
    code, out = run_audit(run, capsys)
    assert code == 1 and "NOT PROVEN" in out and "step-00000012 is damaged: state.json" in out


def test_a_checkpoint_with_other_samples_than_the_receipts_is_found(materials, tmp_path, capsys):
    run = train(materials, tmp_path / "run")
    state = run.checkpoints / "step-00000008/state.json"
    raw = json.loads(state.read_text())
    raw["consumed"]["receipt"] = f"{int(raw['consumed']['receipt'], 16) ^ 1:032x}"
    del raw["digest"]
    state.write_text(json.dumps({**raw, "digest": digest_of(raw)}))
    code, out = run_audit(run, capsys)
    assert code == 1 and "checkpoint of step 8 was trained on other samples" in out
    lines = run.receipts.read_text().splitlines(keepends=True)
    run.receipts.write_text("".join(lines[:4] + lines[5:]))
    code, out = run_audit(run, capsys)
    assert code == 1 and "receipts.jsonl has step 6 where step 5 belongs" in out


def test_a_missing_run_or_set_is_named(materials, tmp_path, capsys):
    assert audit.main([str(tmp_path)]) == 2
    assert "is neither a run folder nor a folder of runs" in capsys.readouterr().err
    run = train(materials, tmp_path / "run", stop_at=2)
    moved = dataclasses.replace(run.recipe(), data=dataclasses.replace(run.recipe().data, shards="/nowhere"))
    (run.root / "recipe.json").write_text(moved.to_json())
    assert audit.main([str(run.root)]) == 2
    assert "no folder of shards at /nowhere/train" in capsys.readouterr().err


def test_a_folder_of_runs_has_a_line_for_each_and_one_exit_code(materials, tmp_path, capsys):
    def said():
        capsys.readouterr()
        code = audit.main([str(tmp_path)])
        out = capsys.readouterr().out
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
        return code, {line[0]: line[1:] for line in lines}, out

    whole = train(materials, tmp_path / "whole")
    part = train(materials, tmp_path / "part", stop_at=2)
    RunFolder(tmp_path / "evaluated").claim(Evaluation(models=("/m",), shards="/s", sets=("val",)))
    code, rows, out = said()
    assert code == 0 and "Evaluations, which train on nothing: 1." in out and "2 proven" in out
    assert rows["whole"] == ["proven", "finished, 12 steps"]
    assert rows["part"] == ["proven", "not finished, step 3 of 12"]
    RunFolder(tmp_path / "waits").claim(whole.recipe())
    code, rows, out = said()
    assert code == 2 and rows["waits"] == ["unknown", "never started"] and "1 unknown" in out
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/recipe.json").write_text("[1, 2")
    code, rows, out = said()
    assert code == 2 and rows["torn"][0] == "unknown" and f"torn: {tmp_path}/torn/recipe.json: This is not a rec" in out
    shutil.rmtree(tmp_path / "torn")
    lines = part.receipts.read_text().splitlines(keepends=True)
    part.receipts.write_text(lines[0] + lines[2])
    code, rows, out = said()
    assert code == 1 and rows["part"][0] == "NOT PROVEN" and "part: receipts.jsonl has step 3 where step 2" in out
    assert "1 NOT PROVEN" in out and "1 proven" in out and "1 unknown" in out
    assert audit.main([str(tmp_path / "waits")]) == 2
    assert "has never started: there is nothing to prove" in capsys.readouterr().err
    assert audit.main([str(tmp_path / "evaluated")]) == 2
    assert "evaluations train on nothing" in capsys.readouterr().err


def test_a_finished_run_needs_the_receipts_of_all_steps(materials, tmp_path, capsys):
    run = train(materials, tmp_path / "run")
    for path in (run.receipts, run.log):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    for state in list(run.checkpoints.glob("step-*"))[:]:
        if int(state.name.partition("-")[2]) > 6:
            shutil.rmtree(state)
    code, out = run_audit(run, capsys)
    assert code == 1 and "has finished, but its receipts end at step 6 of 12" in out


# --- receipts -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, receipts.MODULUS - 1), min_size=1, max_size=40))
def test_digits_of_parts_add_up_to_the_receipt_of_the_whole(values):
    sums = np.sum([np.float32(receipts.to_digits(value)) for value in values], axis=0, dtype=np.float32)
    assert receipts.from_digits(sums.tolist()) == sum(values) % receipts.MODULUS


def test_the_largest_number_of_parts_adds_up_without_rounding():
    worst = np.float32(receipts.to_digits(receipts.MODULUS - 1))
    total = np.zeros(receipts.DIGITS, np.float32)
    for _ in range(receipts.MOST_PARTS):
        total += worst
    assert receipts.from_digits(total.tolist()) == receipts.MOST_PARTS * (receipts.MODULUS - 1) % receipts.MODULUS


@given(st.lists(st.text(max_size=12), max_size=20), st.integers(0, 9), st.randoms(use_true_random=False))
def test_a_receipt_depends_on_the_epoch_and_not_on_the_order(keys, epoch, random):
    shuffled = list(keys)
    random.shuffle(shuffled)
    assert receipts.receipt(shuffled, epoch) == receipts.receipt(keys, epoch)
    if keys:
        assert receipts.receipt(keys, epoch) != receipts.receipt(keys, epoch + 1)
        assert (
            receipts.receipt(keys[1:], epoch) != receipts.receipt(keys, epoch) != receipts.receipt([*keys, "x"], epoch)
        )


def test_each_step_writes_one_receipt(materials, tmp_path):
    run = train(materials, tmp_path / "run")
    assert [line["step"] for line in read_lines(run.receipts)] == list(range(1, 2 * STEPS + 1))


@pytest.mark.parametrize("name", ["receipts.jsonl", "bad_samples.jsonl", "attempts.jsonl"])
def test_unreadable_records_are_an_error_and_no_verdict(materials, tmp_path, monkeypatch, capsys, name):
    run = train(materials, tmp_path / "run", stop_at=2)
    real = cfmask.audit.read_lines

    def failing(path):
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setenv("CFMASK_READ_PATIENCE", "0")
    monkeypatch.setattr(cfmask.audit, "read_lines", failing)
    code, out = run_audit(run, capsys)
    assert code == 2 and "PROVEN" not in out.upper()
