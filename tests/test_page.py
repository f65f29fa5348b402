"""Reports as HTML: escaping, tables, pictures, the pages of evaluations and runs, and how Chromium shows them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import made
from browser import assert_fits_and_prints, needs_chromium
from cfmask.evaluation.model_origin import ModelOrigin
from cfmask.evaluation_spec import Evaluation
from cfmask.presets import PRESETS
from cfmask.report import evaluation_page, page, run_blocks, summary, tables
from cfmask.report.page import Section
from cfmask.report.results import ModelResult, ResultRow, SetResult
from cfmask.runs import RunFolder
from cfmask.runtime.attempts import Start, starts_of
from html_check import Page, checked
from launch import status
from launch.state import page as runs_page

NASTY = "run <b>&amp;\"'</td>\x1b[31m\udc80\u202e\x00 é"
SHOWN = "run <b>&amp;\"'</td>\\u001b[31m\\udc80\\u202e\\u0000 é"

# --- building blocks --------------------------------------------------------------------------------------------------


@given(st.text())
def test_any_text_comes_back_as_it_was_or_as_an_escape(text):
    found = Page(f"<body>{page.escape(text)}</body>")
    assert found.wrong == [] and [each.tag for each in found.elements] == ["body"]
    clean = "".join(c for c in text if c.isprintable() or c in "\n\t")
    if clean == text and "://" not in text and "pipe:" not in text:
        assert found.text == text
    found.text.encode()


def test_text_is_escaped_wherever_it_enters():
    blocks = [
        page.paragraph(NASTY),
        page.subsection(NASTY),
        page.folded(NASTY, page.command(NASTY)),
        page.facts([(NASTY, NASTY)]),
        page.table(NASTY, [NASTY, NASTY], [[NASTY, NASTY]]),
        page.figure(made.PIXEL, NASTY, NASTY),
    ]
    found = checked(page.page(NASTY, [Section(NASTY, blocks)], lead=[page.paragraph(NASTY)]))
    assert found.text.count(SHOWN) == 16 and found.all("title")[0].text == SHOWN
    assert not found.all("b")
    assert found.all("img")[0].attributes["alt"] == SHOWN


def test_secrets_are_masked():
    assert "TOKEN" not in page.escape("https://user:TOKEN@host/shards?sig=TOKEN") + page.escape(
        "pipe:curl -H 'Authorization: TOKEN' x"
    )


def test_a_table_has_headings_and_aligns_numbers():
    rows = [["a", 1, "+1.0", "x", None], ["b", 2_000, "−0.5", "a long text " * 5, None]]
    found = checked(page.page("t", [Section("s", [page.table("c", ["", "n", "d", "why", "none"], rows)])]))
    heads = [each for each in found.all("th") if each.attributes["scope"] == "col"]
    assert [each.attributes.get("class") for each in heads] == [None, "number", "number", "text long", "number"]
    assert [each.text for each in found.all("td")][3] == "–"
    assert [each.text for each in found.all("th") if each.attributes["scope"] == "row"] == ["a", "b"]
    long = Page(page.table("c", ["", "a_set_" * 9], [["a", 1]])).all("th")
    assert long[1].attributes["class"] == "number wide", "its heading is broken"
    grouped = page.table("c", ["", "n"], [[str(i), i] for i in range(6)], together=[3, 1, 2])
    assert [body.count("<tr>") for body in grouped.split("<tbody>")[1:]] == [3, 1, 2]


def test_pictures_are_embedded_as_the_smaller_of_two_formats():
    def png(pixels: np.ndarray) -> bytes:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "png")
        return data.getvalue()

    photograph = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    chart = np.full((64, 96, 4), 255, np.uint8)
    chart[10:20, 5:90] = (200, 0, 0, 255)
    chart[40:, :, 3] = 0  # transparent parts are white, also in dark mode
    for pixels, kind in ((photograph, "jpeg"), (chart, "png")):
        data = png(pixels)
        found = checked(page.page("t", [Section("s", [page.figure(data, "c", "a")])]))
        assert f"data:image/{kind};base64," in str(found.all("img")[0].attributes["src"])
        assert found.all("img")[0].attributes["width"] == "96"
    with pytest.raises(OSError, match="identify"):
        page.figure(b"no picture", "c", "a")


# --- tables of results ------------------------------------------------------------------------------------------------


def model(name: str, right: int) -> ModelResult:
    sets = {
        each: SetResult(n, 1000, n / 10, (n / 10 - 2, n / 10 + 2), 0.1, ((1000, n, 500.0),), {"a": (n, 1000)})
        for each, n in {"val": right, "imagenet-v2": right - 90, "imagenet-r": right - 200}.items()
    }
    return ModelResult(name, sets)


def test_the_table_has_the_numbers_of_the_markdown_table():
    rows = [ResultRow("FT <1>", (model("a", 700), model("b", 720))), ResultRow("zero-shot", (model("z", 683),))]
    found = checked(page.page("t", [Section("s", [tables.html_table(rows, note="A note.")])]))
    markdown = tables.markdown_table(rows, note="A note.")
    cells = [cell.strip().replace("**", "") for cell in markdown.splitlines()[2].split("|")[2:-1]]
    assert [each.text for each in found.all("td")][: len(cells)] == cells
    assert markdown.splitlines()[-1] in found.text, "the same note"
    assert len(found.all("b")) == 4, "the best of each column"


def test_differences_to_published_numbers_have_signs():
    rows = [ResultRow(name, (model(name, right),)) for name, right in (("zero-shot", 700), ("FT", 500), ("x", 300))]
    published = {"zero-shot": {"IN": 70.3}, "FT": {"IN": 81.3, "V2": 10.0}}
    table = tables.html_table(rows, published=published)
    found = checked(page.page("t", [Section("s", [table])]))
    assert [body.count("<tr>") for body in table.split("<tbody>")[1:]] == [3, 3, 1], "x is not published"
    text = found.text
    assert "≈ −0.3" in text and "▼ −31.3" in text and "▲ +31.0" in text and "The unknown noise of the published" in text


# --- runs -------------------------------------------------------------------------------------------------------------


def finished_run(root: Path, preset: str = "object-mask-single-fill", steps: int = 4) -> RunFolder:
    """A run folder with everything but weights."""
    run = RunFolder(root)
    recipe = PRESETS[preset]
    run.claim(replace(recipe, data=replace(recipe.data, eval_sets=("val", "holdout"))).resolved())
    run.begin_attempt(job="7-0", nodes=2, world_size=16, device="cuda:0", from_step=0)
    run.end_attempt("preempted at step 2: <requeued>")
    run.begin_attempt(job="7-1", nodes=1, world_size=8, device="cuda:0", from_step=2)
    run.end_attempt("finished")
    lines = [
        {"step": i, "total_steps": steps, "loss": 1 / i, "ce": 1 / i, "mse": 0.1, "accuracy": 20.0 * i}
        | {"samples_per_s": 10.0, "eta_s": 1.0}
        for i in range(1, steps + 1)
    ]
    lines.append({"step": steps, "epoch": 1, "eval": {"val": 61.0, "holdout": 62.5}})
    run.log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.results.write_text('{"step": 4, "sets": {"val": {}}}')
    snapshot = run.root / "code/0123456789ab/snapshot.json"
    snapshot.parent.mkdir(parents=True)
    info = {"digest": "0123456789ab", "commit": "c" * 40, "uncommitted": ["a.py"], "python": "3.11.7"}
    snapshot.write_text(json.dumps(info | {"taken": "2026-01-31T12:00:59+0000", "packages": {"torch": "2.9.0"}}))
    return run


def test_starts_say_how_each_one_ended():
    lines = [{"attempt": 1}, {"attempt": 2, "last_reached": 7, "why_last_ended": "preempted"}]
    assert starts_of(lines, {"why": "finished"}) == [Start(lines[0], 7, "preempted"), Start(lines[1], None, "finished")]
    assert starts_of(lines, None)[1] == Start(lines[1], None, None)
    assert starts_of([], None) == []


def test_recipes_are_compared_and_listed(tmp_path):
    block = run_blocks.recipes({name: PRESETS[name].resolved() for name in ("ft", "object-mask-single-fill")})
    found = checked(page.page("t", [Section("s", [block])]))
    heads = [each.text for each in found.all("th") if each.attributes["scope"] == "col"]
    assert heads[0] == "run" and "method.mask" in heads and "optim.lr" not in heads and "run.seed" not in heads
    assert "optim.lr" in [each.text for each in found.all("dt")]
    alone = checked(page.page("t", [Section("s", [run_blocks.recipes({"ft": PRESETS["ft"].resolved()})])]))
    assert not alone.all("table") and "method.name" in alone.text
    assert "None of these runs has started." in run_blocks.starts({})
    assert "have no copy of the code" in run_blocks.versions([RunFolder(tmp_path)])


def test_status_writes_a_page(tmp_path, capsys):
    finished_run(tmp_path / "runs" / "a <i>&\"'")
    failed = finished_run(tmp_path / "runs" / "failed", "ft")
    failed.results.unlink()
    failed.end_attempt("failed: ValueError: <class 'x'> & \x1b[1m")
    RunFolder(tmp_path / "runs" / "new").claim(PRESETS["ft"].resolved())
    out = tmp_path / "pages/runs.html"
    assert status.main([str(tmp_path / "runs"), "--html", str(out)]) == 0
    assert f"written: {out}" in capsys.readouterr().out
    found = checked(out.read_bytes())
    text = found.text
    assert "3 runs: 1 failed, 1 never started, 1 finished" in text and "a <i>&\"'" in text
    assert "failed: ValueError: <class 'x'> & \\u001b[1m" in text
    assert "preempted at step 2: <requeued>" in text and "62.50 (holdout)" in text and "cccccccccccc" in text
    assert len(found.all("img")) == 1 and len(list(out.parent.iterdir())) == 1
    failed.log.unlink()
    failed.log.mkdir()
    assert status.main([str(tmp_path / "runs"), "--html", str(out)]) == 0
    assert "Is a directory" in checked(out.read_bytes()).text
    out.unlink()
    out.mkdir()
    for path in (str(out), ""):
        assert status.main([str(tmp_path / "runs"), "--html", path]) == 2
        assert "(Is a directory). Choose another path with --html" in capsys.readouterr().err


def test_the_plain_table_needs_neither_torch_nor_matplotlib(tmp_path):
    finished_run(tmp_path / "runs/a")
    code = (
        f"import sys; from launch import status; status.main([{str(tmp_path / 'runs')!r}]); "
        "print({'torch', 'matplotlib', 'PIL', 'scipy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=made.REPO, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_many_recipes_are_not_all_drawn(tmp_path, monkeypatch):
    for preset in ("ft", "fd-clean", "random-mask-no-fill"):
        finished_run(tmp_path / "runs" / preset, preset)
    drawn = []
    monkeypatch.setattr(runs_page, "MOST_CURVES", 2)
    monkeypatch.setattr(run_blocks, "curves", lambda out, runs: drawn.extend(runs) or [])
    assert status.main([str(tmp_path / "runs"), "--html", str(tmp_path / "runs.html")]) == 0
    text = checked((tmp_path / "runs.html").read_bytes()).text
    assert len(drawn) == 2 and "The first 2 of 3 recipes are drawn." in text


def test_masks_of_a_run_are_drawn_once_for_each_model(tmp_path):
    materials = made.make_materials(tmp_path / "materials", per_class=4)
    run = finished_run(tmp_path / "object-s0")
    shutil.copyfile(materials / "tiny.safetensors", run.final)
    out, shards = tmp_path / "masks.png", str(materials / "shards")
    found = checked(page.page("t", [Section("s", run_blocks.masks(out, run, run.final, shards, "val"))]))
    assert "Images of val, with the masks of object-s0" in found.text and len(found.all("img")) == 1
    drawn = out.stat().st_mtime_ns
    run_blocks.masks(out, run, run.final, shards, "val")
    assert out.stat().st_mtime_ns == drawn
    os.utime(out, ns=(0, 0))
    run_blocks.masks(out, run, run.final, shards, "val")
    assert out.stat().st_mtime_ns >= drawn, "the model is newer"
    out.unlink()
    [block] = run_blocks.masks(out, run, run.final, shards, "gone")
    assert "No contact sheet of object-s0: There is no folder of shards" in Page(block).elements[0].text
    assert run_blocks.masks(out, finished_run(tmp_path / "ft-s0", "ft"), run.final, shards, "val") == []


def test_training_runs_of_one_name_are_all_shown(tmp_path):
    runs = [finished_run(tmp_path / folder / "ft-s0", "ft") for folder in ("a", "b")]
    origins = [ModelOrigin(str(run.final), str(run.root)) for run in (*runs, runs[0])]
    origins += [ModelOrigin("file.safetensors"), ModelOrigin("gone", str(tmp_path / "gone"))]
    assert {name: run.root for name, run in run_blocks.training_runs(origins).items()} == {
        "a": runs[0].root,
        "b": runs[1].root,
    }
    assert list(run_blocks.training_runs(origins[:1])) == ["ft-s0"]


# --- evaluations ------------------------------------------------------------------------------------------------------


def finished_evaluation(root: Path, trained: RunFolder) -> RunFolder:
    """The folder of an evaluation of a file and of a run's best checkpoint."""
    files = (str(root / "zero.safetensors"), str(trained.checkpoints / "step-00000004/model.safetensors"))
    work = Evaluation(models=files, shards="https://user:TOKEN@host/shards", sets=("val", "imagenet-v2", "imagenet-r"))
    run = RunFolder(root)
    run.claim(work)
    of_val = {"correct": 70, "total": 100, "top1": 70.0, "interval": [60.0, 78.0], "ece": 0.05}
    of_val |= {"calibration": [[100, 70, 75.0]], "per_class": {"n": [70, 100]}}
    content = {
        "evaluation": json.loads(work.to_json()),
        "sets": {name: {"samples": 100, "classes": 10} for name in work.sets},
        "models": [{"name": name, "sets": dict.fromkeys(work.sets, of_val)} for name in ("z <1>", "ft")],
        "checkpoints": [
            {"file": files[0], "chosen": "a file of no run"},
            {"file": files[1], "run": str(trained.root), "step": 4, "chosen": "best on holdout", "top1": 62.5}
            | {"chosen_on": "holdout"},
        ],
    }
    run.results.write_text(json.dumps(content))
    return run


def test_an_evaluation_has_a_page(tmp_path, capsys):
    run = finished_evaluation(tmp_path / "eval", finished_run(tmp_path / "ft-s0"))
    pictures = summary.show(run, "Evaluation", ["zero <&> shot", "FT"])
    evaluation_page.write_page(run, "Evaluation", ["zero <&> shot", "FT"], pictures)
    found = checked((run.root / "index.html").read_bytes())
    text = found.text
    assert "zero <&> shot" in text and "best on holdout" in text and "62.50" in text and "TOKEN" not in text
    assert "preempted at step 2: <requeued>" in text, "why the starts of the training run ended"
    assert len(found.all("img")) == 3, "bars, reliability, curves of the run"
    assert str(run.root / "index.html") in capsys.readouterr().out
    # Without the run's folder, which may be gone, the page has the rest.
    shutil.rmtree(tmp_path / "ft-s0")
    evaluation_page.write_page(run, "Evaluation", ["FT", "FT"], pictures)
    found = checked((run.root / "index.html").read_bytes())
    assert "FT, no. 1" in found.text and "Training runs" not in found.text and len(found.all("img")) == 2


# --- in a browser -----------------------------------------------------------------------------------------------------


@needs_chromium
def test_pages_fit_a_phone_and_print(tmp_path):
    names = ["a" * 120, "zero-shot"]
    run = finished_evaluation(tmp_path / "eval", finished_run(tmp_path / f"ft-{'s' * 90}"))
    evaluation_page.write_page(run, "Evaluation", names, summary.show(run, "Evaluation", names))
    status.main([str(tmp_path), "--html", str(tmp_path / "runs.html")])
    for file in (run.root / "index.html", tmp_path / "runs.html"):
        assert_fits_and_prints(file, tmp_path)
