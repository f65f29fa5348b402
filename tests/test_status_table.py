"""The table of runs on terminals of any width, in a pipe and as JSON; filters, totals, the bar of --follow."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cfmask.evaluation_spec import Evaluation
from cfmask.recipe import Data, Optim, Recipe, Run
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import append_lines
from cfmask.runtime.output import cells, clean
from cfmask.runtime.times import duration
from launch import cancel, status
from launch.slurm.queue import SlurmJob
from launch.state import follow
from launch.state.bar import Progress, ProgressLine, progress_line
from launch.state.facts import SlurmAnswers, read_state
from launch.state.progress import progress_of
from launch.state.status import Status, newest_first, status_of
from launch.state.table import attempts_table, table, totals
from launch.state.terminal import Terminal, shorten, wrap

ERROR = (
    "failed: UserError: The step needs 92.1 GB of GPU memory, and the GPU has 79.2 GB. Use --micro-batches auto, or a "
    "larger number. The failure is reported at the end of the log of the rank that failed, together with its stack, in "
    " /scratch/robust/runs/object-mask-single-fill-ViT-B-32-s0/jobs/4711_0_log.out"
)


def a_status(run: str, state: str = "running", **more) -> Status:
    values = {
        "step": 12410,
        "total_steps": 24820,
        "samples_per_s": 912.3,
        "loss": 2.5312,
        "eta_s": 11523.0 if state == "running" else None,
        "job": "4711",
        "attempts": 3,
        "next_start": None,
        "last_end": None,
        "notes": (),
        "in_words": state,
        "best_on": "holdout",
        "best_top1": 76.314,
        "best_epoch": 4,
        "epochs": 10,
        "nodes": "gpu[017-018]",
    }
    return Status(run=run, state=state, **(values | more))


RUNS = [
    a_status("runs/object-mask-single-fill-ViT-B-32-s0"),
    a_status("runs/object-mask-single-fill-ViT-B-32-s1", eta_s=190_000.0),
    a_status("runs/ft-ViT-B-32-s0", "finished", step=24820, best_epoch=10),
    a_status("runs/fd-clean-ViT-B-32-s0", "failed", in_words=ERROR, last_end=ERROR, job=None),
    a_status("runs/wise-kd", "requeued", in_words="preempted, starts again in 2 min or later"),
    a_status(
        "runs/学習-ファインチューニング-第三回",
        "queued",
        in_words="waits in the queue: jobs of higher priority are first",
    ),
    a_status("runs/Prüfung-é-a\u0301", "never started", step=None, total_steps=None, best_top1=None, best_epoch=None),
]


def lines_at(width: int, statuses: list[Status] = RUNS, *, colour: bool = False) -> list[str]:
    return table(statuses, Terminal(width, colour)).splitlines()


# --- width --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 33, 40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(width):
    assert max(map(cells, lines_at(width))) <= width
    assert max(map(cells, lines_at(width, RUNS[:1]))) <= width
    assert max(map(cells, lines_at(width, [a_status("x" * 300, in_words="y " * 300)]))) <= width


def test_at_80_columns_are_name_step_accuracy_epoch_eta_and_state():
    lines = lines_at(80)
    assert lines[0].split() == "run step best at epoch ETA state".split()
    first = lines[1].split("  ")
    assert [each.strip() for each in first if each][1:] == [
        "12410/24820", "76.31 %", "4 of 10", "3 h 12 min", "running"
    ]  # fmt: skip
    assert re.match(r"object-\S*…\S*-s0 ", lines[1]), "the ends of names tell runs apart"
    assert "object" in lines[2] and "s1" in lines[2] and "2 d 5 h" in lines[2]


def test_a_long_name_leaves_room_for_the_columns():
    lines = lines_at(160, [*RUNS, a_status("runs/" + "x" * 200 + "-s7")])
    assert {"loss", "samples/s", "job"} <= set(lines[0].split()) and "xx-s7 " in "\n".join(lines)


def test_wider_terminals_show_more_and_narrow_ones_the_essential():
    assert "job" in lines_at(120)[0] and "samples/s" in lines_at(120)[0]
    assert "object-mask-single-fill-ViT-B-32-s0 " in lines_at(120)[1]
    assert "nodes" in lines_at(200)[0] and "gpu[017-018]" in lines_at(200)[1] and "loss" in lines_at(200)[0]
    narrow = lines_at(40, RUNS[:-1])
    assert narrow[0].split() == "run done best state".split()
    assert "50 %" in narrow[1] and "76.31 %" in narrow[1] and narrow[1].endswith("running")


def test_a_reason_that_does_not_fit_is_below_its_run():
    lines = lines_at(80)
    row = next(i for i, line in enumerate(lines) if line.startswith("fd-clean"))
    assert lines[row].endswith("failed") and lines[row + 1].startswith("    UserError: The step needs 92.1 GB")
    assert lines[row + 3].endswith("…") and not lines[row + 4].startswith(" "), "three lines of many runs"
    alone = " ".join(line.strip() for line in lines_at(80, [RUNS[3]])[1:])
    assert ERROR.removeprefix("failed: ")[:90] in alone and "…" not in alone, "one run has it in full"
    wide = next(line for line in lines_at(120) if line.startswith("wise-kd"))
    assert "preempted, starts again in 2 min or later" in "\n".join(lines_at(120)) and wide


def test_notes_remedies_and_stragglers_are_below_their_run():
    shown = a_status("a", remedy="scontrol release 12", straggler="rank 3 on n2", notes=("log.jsonl has\na torn line",))
    assert lines_at(80, [shown, RUNS[2]])[2:5] == [
        "    to do: scontrol release 12",
        "    slowest: rank 3 on n2",
        "    note: log.jsonl has a torn line",
    ]


def test_a_pipe_gets_everything_in_full_and_no_colour():
    text = table(RUNS)
    assert "\x1b" not in text and "…" not in text
    for each in RUNS:
        row = next(line for line in text.splitlines() if line.startswith(each.run))
        assert clean(each.in_words) in row
    assert text.splitlines()[0].split()[-4:] == ["starts", "job", "nodes", "state"]


def test_sets_that_differ_are_named_in_their_rows():
    text = table([RUNS[0], a_status("runs/b", best_on="val", best_top1=70.0)], Terminal(120))
    assert "76.31 % (holdout)" in text and "70.00 % (val)" in text
    assert "best:" not in totals([RUNS[0], a_status("runs/b", best_on="val")], 2)


def test_attempts_fit_the_terminal(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim(Recipe())
    for restart in range(3):
        run.begin_attempt(job=f"4711-{restart}", nodes=2, world_size=16, device="cuda:0", from_step=1000 * restart)
        run.end_attempt(ERROR)
    state, slurm = read_state(run), SlurmAnswers({})
    for width in (40, 80, 120):
        text = attempts_table(state, status_of(state, slurm), slurm, Terminal(width))
        assert max(map(cells, text.splitlines())) <= width
        assert text.count("UserError") == 3


# --- text ---------------------------------------------------------------------------------------------------------


def test_cells_of_wide_and_combining_characters():
    assert [cells(text) for text in ("abc", "学習", "a\u0301", "ｗ", "–")] == [3, 4, 1, 2, 1]


@pytest.mark.parametrize("width", range(0, 14))
def test_shortened_texts_fit_and_keep_both_ends(width):
    for text in ("object-mask-s0", "学習学習学習学習", "a\u0301" * 20):
        assert cells(shorten(text, width)) <= width
    if width >= 7:
        short = shorten("object-mask-s0", width)
        assert short.startswith("obj") and short.endswith("s0") and "…" in short
    assert shorten("abc", 3) == "abc"


def test_long_words_are_broken_and_the_number_of_lines_is_limited():
    text = "Nothing was written to /scratch/projects/robust/runs/with/a/long/path"
    lines = wrap(text, 30)
    assert max(map(len, lines)) <= 30 and "".join("".join(lines).split()) == "".join(text.split())
    assert wrap(text, 30, most=2)[-1].endswith("…") and len(wrap(text, 30, most=2)) == 2
    assert wrap(text, None) == ["    " + text]


def test_names_cannot_move_the_cursor():
    assert clean("a\x1b[31mb\rc\n d\x07") == r"a\x1b[31mb c d\x07"
    assert clean(os.fsdecode(b"run-\xff")) == r"run-\udcff"
    evil = table([a_status("runs/\x1b[2J")], Terminal(80))
    assert "\x1b" not in evil


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, None),
        (0.4, "0 s"),
        (45, "45 s"),
        (59.7, "1 min"),
        (720, "12 min"),
        (3599, "1 h"),
        (3723, "1 h 2 min"),
        (11523, "3 h 12 min"),
        (86400, "24 h"),
        (187_200, "2 d 4 h"),
        (172_800, "2 d"),
    ],
)
def test_durations_are_in_units_that_people_read(seconds, text):
    assert duration(seconds) == text


# --- colour -------------------------------------------------------------------------------------------------------


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "colour"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({}, False)],
)
def test_colour_is_for_terminals_that_want_it(monkeypatch, environment, colour):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "72")
    assert Terminal.of(Tty()) == Terminal(72, colour)
    assert Terminal.of(io.StringIO()) == Terminal(None, False)


def test_colour_changes_no_text():
    plain, coloured = lines_at(80), lines_at(80, colour=True)
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in coloured] == plain
    assert any("\x1b[31mfailed\x1b[0m" in line for line in coloured)


# --- totals and filters -------------------------------------------------------------------------------------------


def test_totals():
    counts = "2 running, 1 requeued, 1 queued, 1 failed, 1 never started, 1 finished"
    assert totals(RUNS, 7) == f"7 runs: {counts}; best: top-1 on holdout"
    assert totals(RUNS[:2], 7) == "2 of 7 runs: 2 running; best: top-1 on holdout"
    assert totals([a_status("a", best_on=None)], 1) == "1 run: 1 running"
    assert totals([], 7) == "0 of 7 runs"


def make_run(root: Path, *, ended: str = "", finished: bool = False, evals: tuple[float, ...] = ()) -> RunFolder:
    """A run of 2 steps an epoch, with an evaluation on holdout at the end of each and one between two ends."""
    run = RunFolder(root)
    run.claim(Recipe(data=Data(eval_sets=("val", "holdout")), optim=Optim(epochs=4)).resolved())
    run.begin_attempt(job="4000000-0", nodes=1, world_size=1, device="cpu", from_step=0)
    for epoch, top1 in enumerate(evals, 1):
        step = {"step": 2 * epoch, "total_steps": 8, "loss": 1.0, "samples_per_s": 64.0, "eta_s": 9.0}
        between = {"step": 2 * epoch, "epoch": epoch + 0.5, "eval": {"val": 99.0, "holdout": 99.0}}
        end = {"step": 2 * epoch, "epoch": epoch, "eval": {"val": top1 + 1, "holdout": top1}}
        append_lines(run.log, [step, end, between])
    if ended:
        run.end_attempt(ended)
    if finished:
        run.results.write_text(json.dumps({"step": 8, "sets": {name: RESULT for name in ("holdout", "val")}}))
    return run


RESULT = {"top1": 61.0, "correct": 61, "total": 100}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    root = tmp_path / "runs"
    make_run(root / "ft-s0", evals=(50.0, 60.0, 60.0), finished=True, ended="finished")
    make_run(root / "ft-s1", evals=(50.0,), ended="failed: UserError: no")
    make_run(root / "object-s0")
    return root


def shown(capsys, *flags: object) -> tuple[list[str], str]:
    """The runs and the line of totals that the command prints."""
    assert status.main([*map(str, flags)]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    return [Path(row.split()[0]).name for row in rows[1:]], last


def test_filters(runs, capsys):
    assert sorted(shown(capsys, runs)[0]) == ["ft-s0", "ft-s1", "object-s0"]
    assert sorted(shown(capsys, runs, "--failed")[0]) == ["ft-s1", "object-s0"], "a dead run has failed, too"
    assert shown(capsys, runs, "--match", "ft", "--failed") == (
        ["ft-s1"],
        "1 of 3 runs: 1 failed; best: top-1 on holdout",
    )
    assert sorted(shown(capsys, runs, "--match", "*-s0")[0]) == ["ft-s0", "object-s0"]
    assert shown(capsys, runs, "--running") == ([], "0 of 3 runs")
    with RunFolder(runs / "object-s0").locked():
        assert shown(capsys, runs, "--running") == (["object-s0"], "1 of 3 runs: 1 running")
        assert len(shown(capsys, runs, "--running", "--failed")[0]) == 2
    assert len(shown(capsys, runs, runs / "ft-s0")[0]) == 3, "each run once"
    assert status.main([str(runs), "--match", "kd"]) == 2
    assert "no run has such a name. There are ft-s0, ft-s1, object-s0." in capsys.readouterr().err


def test_follow_takes_the_run_that_the_filters_leave(runs, capsys, monkeypatch):
    followed = []
    monkeypatch.setattr(follow, "follow_run", lambda run: followed.append(run.root.name) or 0)
    assert status.main([str(runs), "--match", "object", "--follow"]) == 0
    assert status.main([str(runs), "--failed", "--match", "ft", "--follow"]) == 0
    assert followed == ["object-s0", "ft-s1"]
    assert status.main([str(runs), "--failed", "--follow"]) == 2


def test_a_run_has_a_name_in_its_own_folder(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs / "ft-s1")
    assert shown(capsys, ".")[0] == ["ft-s1"]


def test_the_table_keeps_its_columns_in_ascii(runs):
    command = [sys.executable, Path(status.__file__), runs, "--match", "s1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    head, row = done.stdout.decode("ascii").splitlines()[:2]
    assert "\\u" not in row and row.index("failed") == head.index("state"), done.stdout


def test_json_has_null_where_the_log_has_nan(runs, capsys):
    line = {"step": 4, "total_steps": 8, "loss": float("nan"), "samples_per_s": float("inf"), "eta_s": 1.0}
    append_lines(runs / "ft-s1/log.jsonl", [line])
    assert status.main([str(runs / "ft-s1"), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (found["loss"], found["samples_per_s"], found["step"]) == (None, None, 4)


def test_json_has_what_the_table_shows(runs, capsys):
    assert status.main([str(runs), "--json", "--match", "ft"]) == 0
    found = {Path(line["run"]).name: line for line in json.loads(capsys.readouterr().out)}
    assert found.keys() == {"ft-s0", "ft-s1"}
    finished = found["ft-s0"]
    assert (finished["best_on"], finished["best_top1"], finished["best_epoch"], finished["epochs"]) == (
        "holdout", 60.0, 2, 4
    )  # fmt: skip
    assert finished["top1"] == {"val": 61.0, "holdout": 60.0} and finished["state"] == "finished"
    assert found["ft-s1"]["in_words"] == found["ft-s1"]["last_end"] == "failed: UserError: no"
    datetime.fromisoformat(finished["submitted"])


def test_the_run_that_was_last_submitted_is_first(runs):
    for name, ago_s in (("ft-s0", 30), ("ft-s1", 10), ("object-s0", 20)):
        (runs / name / "jobs").mkdir()
        (runs / name / "jobs/4000000_submitted.pkl").touch()
        moment = datetime.now().timestamp() - ago_s
        os.utime(runs / name / "jobs/4000000_submitted.pkl", (moment, moment))
    states = [read_state(RunFolder(path)) for path in runs.iterdir()]
    assert [each.run.root.name for each in newest_first(states)] == ["ft-s1", "object-s0", "ft-s0"]


def test_runs_of_a_sweep_are_in_the_order_of_their_numbers(tmp_path):
    states = []
    for seed in (10, 2, 1):
        run = RunFolder(tmp_path / f"ft-s{seed}")
        run.claim(Recipe())
        os.utime(run.root / "recipe.json", (1e9, 1e9))
        states.append(read_state(run))
    assert [each.run.root.name for each in newest_first(states)] == ["ft-s1", "ft-s2", "ft-s10"]


# --- the best epoch -----------------------------------------------------------------------------------------------


def best_of(run: RunFolder) -> tuple[float | None, int | None]:
    found = status_of(read_state(run), SlurmAnswers({}))
    return found.best_top1, found.best_epoch


def test_the_best_epoch_is_the_first_of_equal_ends_of_epochs(tmp_path):
    assert best_of(make_run(tmp_path / "a", evals=(50.0, 60.0, 60.0))) == (60.0, 2)
    assert best_of(make_run(tmp_path / "b")) == (None, None)


def test_epochs_of_the_head_alone_are_not_the_best(tmp_path):
    run = make_run(tmp_path / "a", evals=(70.0, 60.0, 50.0))
    recipe = Recipe(
        data=Data(eval_sets=("holdout",)), optim=Optim(epochs=4, probe_epochs=1), run=Run(best_on="holdout")
    )
    run.record_recipe(recipe)
    assert best_of(run) == (60.0, 2)


def test_a_torn_or_lost_log_leaves_what_is_known(tmp_path):
    run = make_run(tmp_path / "a", evals=(50.0, 60.0), finished=True)
    with open(run.log, "ab") as log:
        log.write(b'{"step": 6, "epoch": 3, "eval": {"val": 99')
    assert best_of(run) == (60.0, 2)
    run.log.unlink()
    assert best_of(run) == (61.0, 4), "the results are of the last epoch"
    run.results.write_text('{"sets": {"holdout": ')
    assert best_of(run) == (None, None)


def test_an_evaluation_has_the_accuracy_of_its_model(tmp_path):
    def evaluated(name: str, *top1: float, **choice: int) -> float | None:
        run = RunFolder(tmp_path / name)
        run.claim(Evaluation(models=("/m",), sets=("imagenet-r", "val")))
        models = [{"name": "m", "sets": {"val": {"top1": each}, "imagenet-r": {"top1": 1.0}}} for each in top1]
        run.results.write_text(json.dumps({"models": models, **choice}))
        found = status_of(read_state(run), SlurmAnswers({}))
        assert found.best_epoch is None and found.epochs is None
        return found.best_top1

    assert evaluated("one", 70.0) == 70.0
    assert evaluated("wise-ft", 70.0, 75.0, chosen=1) == 75.0
    assert evaluated("side-by-side", 70.0, 75.0) is None
    assert evaluated("torn", 70.0, chosen=3) is None


def test_a_folder_that_cannot_be_read_is_a_row(runs, capsys, monkeypatch):
    real = os.stat

    def denied(path, *more, **named):
        if "ft-s1/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *more, **named)

    monkeypatch.setattr(os, "stat", denied)
    assert status.main([str(runs)]) == 0
    out = capsys.readouterr().out
    assert "unknown: the folder cannot be read" in out and out.count("Permission denied") == 1
    assert "3 runs: 1 dead, 1 unknown, 1 finished" in out
    page = runs.parent / "runs.html"
    assert status.main([str(runs), "--html", str(page)]) == 0
    assert "unknown: the folder cannot be read" in page.read_text()


# --- states in words ----------------------------------------------------------------------------------------------


def in_words(
    run: RunFolder, reason: str, *, restarts: int, eligible_in_s: int = -60, start: str = "N/A", state: str = "PENDING"
) -> Status:
    (run.root / "jobs").mkdir(exist_ok=True)
    for name in ("12_submitted.pkl", "12_submission.sh"):
        (run.root / "jobs" / name).touch()
    eligible = (datetime.now() + timedelta(seconds=eligible_in_s)).isoformat(timespec="seconds")
    return status_of(
        read_state(run), SlurmAnswers({"12": SlurmJob("12", state, start, eligible, restarts, reason, "")})
    )


@pytest.mark.parametrize(
    ("ended", "cause"),
    [
        ("stopped at step 70 (requeue)", "preempted"),
        ("stopped at step 70 (requeue), at the time limit", "time limit"),
        ("lost a rank without a report: rank 1 was cut off", "lost a rank"),
        ("", "killed"),
    ],
)
def test_a_requeued_run_says_why_it_ended_and_when_it_starts(tmp_path, ended, cause):
    run = make_run(tmp_path / "run", ended=ended)
    waits = in_words(run, "BeginTime", restarts=1, eligible_in_s=119)
    assert waits.in_words == f"{cause}, starts again in 2 min or later" and waits.state == "requeued"
    assert in_words(run, "Priority", restarts=1).in_words == (
        f"{cause}, waits in the queue: jobs of higher priority are first"
    )


def test_a_queued_run_says_what_it_waits_for_and_what_to_do(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim(Recipe())
    soon = (datetime.now() + timedelta(minutes=30, seconds=5)).isoformat(timespec="seconds")
    found = in_words(run, "Resources", restarts=0, start=soon)
    assert found.in_words == "waits in the queue: its nodes are in use by other jobs; starts in about 30 min"
    assert found.remedy is None and found.next_start.endswith("(Resources)")
    held = in_words(run, "JobHeldUser", restarts=0)
    assert held.in_words == "waits in the queue: its user holds it" and held.remedy == "scontrol release 12"
    # After a requeue there is also a time from which it could start.
    requeued = in_words(run, "job requeued in held state", restarts=1, eligible_in_s=119)
    assert requeued.in_words.endswith("waits in the queue: Slurm or an administrator has put it on hold")
    assert requeued.remedy == "scontrol release 12"
    special = in_words(run, "None", restarts=0, state="SPECIAL_EXIT")
    assert "has put it on hold" in special.in_words and special.remedy == "scontrol release 12"


# --- --follow -----------------------------------------------------------------------------------------------------

PROGRESS = Progress("object-mask-single-fill-ViT-B-32-s0", "", 12410, 24820, 2.5312, 912.3, 11523.0)


@pytest.mark.parametrize("width", [10, 24, 40, 60, 80, 120])
def test_the_bar_fits(width):
    waits = "preempted, waits in the queue: its nodes are in use by other jobs; starts in about 12 min"
    for each in (PROGRESS, Progress("a", "starting"), Progress("学習" * 20, waits, 1, 2), Progress("a" * 99, "", 2, 2)):
        assert 0 < cells(progress_line(each, width)) <= width


def test_at_80_columns_the_line_has_a_bar_and_one_eta():
    line = progress_line(PROGRESS, 80)
    assert line.count("ETA") == 1 and "ETA 3 h 12 min" in line and "50 %" in line and "loss 2.531" in line
    assert "█" in line and "░" in line
    assert "ETA 3 h 12 min" in progress_line(PROGRESS, 40), "rather than the bar"
    assert "ETA" not in progress_line(Progress("a", "", 24820, 24820, 1.0, 900.0, 0.0), 80)
    assert progress_line(PROGRESS, None).startswith(PROGRESS.name + "   50 %")


def test_the_eta_is_of_the_steps_of_this_start(tmp_path):
    run = make_run(tmp_path / "run")

    def log(*steps: int, rate: float) -> None:
        lines = [
            {"step": step, "total_steps": 1000, "samples_per_s": rate, "eta_s": (1000 - step) * 100 / rate}
            for step in steps
        ]
        append_lines(run.log, lines)

    log(100, 200, rate=1000.0)
    assert progress_of(run)[1] == pytest.approx(80)
    os.utime(run.log, (1e9, 1e9))
    run.begin_attempt(job="4000000-1", nodes=1, world_size=1, device="cpu", from_step=200)
    last, eta_s = progress_of(run)
    assert last["step"] == 200 and eta_s is None, "no step of this start yet"
    log(300, rate=50.0)
    log(400, rate=100.0)
    assert progress_of(run)[1] == pytest.approx(600 * 100 / (2 / (1 / 50 + 1 / 100)))


def test_a_file_gets_few_lines_and_a_terminal_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file, terminal = io.StringIO(), Tty()
    for stream in (file, terminal):
        line = ProgressLine(stream)
        for step in (12410, 12411, 24820):
            line.show(Progress("a", "", step, 24820), final=step == 24820)
    assert file.getvalue().splitlines() == ["a   50 %  12410/24820", "a  100 %  24820/24820"]
    drawn = terminal.getvalue()
    assert drawn.count("\n") == 1 and drawn.count("\r") == 3 and "\x1b" not in drawn


def test_a_finished_run_is_said_to_be_finished_first(runs, capsys):
    assert status.main([str(runs / "ft-s0"), "--follow"]) == 0
    found = capsys.readouterr()
    assert found.out.startswith(f"finished: {runs / 'ft-s0'}") and found.err == "", "no bar"
    assert cancel.main([str(runs / "ft-s0")]) == 0
    assert capsys.readouterr().out == f"{runs / 'ft-s0'} is finished: there is nothing to cancel.\n"


def test_the_example_in_the_documents_is_what_the_table_prints():
    limit = "waits in the queue: your limit on GPUs is reached until other jobs end"
    examples = [
        a_status("runs/ft-s0", "finished", step=24820, best_epoch=8, job=None, nodes=None),
        a_status("runs/object-s0", best_top1=74.92, job="4713"),
        a_status("runs/object-s1", "requeued", step=9920, best_top1=74.8, best_epoch=3, in_words=RUNS[4].in_words),
        a_status("runs/context-s0", "queued", step=None, best_top1=None, best_epoch=None, in_words=limit),
    ]
    text = "\n".join([*lines_at(80, examples), totals(examples, 4)])
    document = (Path(__file__).resolve().parents[1] / "docs/clusters.md").read_text()
    assert "\n".join("    " + line for line in text.splitlines()) in document, text
