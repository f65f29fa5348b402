"""The commands evaluate, wise_ft and soup, in this process and as jobs; tests/test_evaluator.py checks the numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import made
from cfmask.evaluation.worker import run_evaluation
from cfmask.evaluation_spec import UniformSoup
from cfmask.models.head import load_model
from cfmask.recipe import Data, Method, Model, Optim, Recipe, Run
from cfmask.report.results import read_results
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.jsonl import read_lines
from html_check import checked
from launch.allocation import resolve as allocation
from slurm_fixture import wait_until
from tools import evaluate, soup, wise_ft
from towers import TINY

TOOLS = made.REPO / "tools"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """root/shards with train and val, zero.safetensors, two perturbed models, and one of another backbone."""
    root = tmp_path_factory.mktemp("shown")
    made.draw_images(root / "images", per_class=5)
    made.convert(root / "images", root / "shards")
    made.save_tiny_model(root / "zero.safetensors")
    made.save_tiny_model(root / "deep.safetensors", dataclasses.replace(TINY, layers=4))
    torch.manual_seed(1)
    for name in ("fine", "other"):
        made.save_moved_model(root / "zero.safetensors", root / f"{name}.safetensors", 0.1)
    return root


def models(root: Path, *names: str) -> list[str]:
    return [str(root / f"{name}.safetensors") for name in names]


def sets(root: Path, *names: str) -> list[str]:
    return ["--shards", str(root / "shards"), "--sets", *(names or ("val",)), "--loader-workers", "0"]


def picture(path: Path) -> bool:
    return min(Image.open(path).size) > 300


def test_evaluate_prints_and_writes_tables_and_pictures(shown, capsys, tmp_path):
    out = tmp_path / "out"
    command = [*models(shown, "zero", "deep", "other"), *sets(shown, "val", "train"), "--out", str(out)]
    line = ["--fit-on", *models(shown, "zero", "deep")]
    assert evaluate.main([*command, "--names", "start", "A_1 & B", "C", *line]) == 0
    printed = capsys.readouterr().out
    for model in read_results(out).models:
        assert f"{model.sets['val'].top1:.1f}" in printed and model.sets["val"].total == 15
    assert "A_1 & B" in (out / "table.md").read_text() and r"A\_1 \& B" in (out / "table.tex").read_text()
    assert all(picture(out / f"{name}.png") for name in ("bars", "reliability", "effective-robustness"))
    page = checked((out / "index.html").read_bytes())
    assert "A_1 & B" in page.text and len(page.all("img")) == 3
    [row] = re.findall(r"(?m)^\| C +\| .*$", (out / "effective-robustness.md").read_text())
    assert row in printed and re.search(r"\| [+−]?\d+\.\d +\|$", row)
    # Again: nothing is counted, everything is shown
    before = (out / "results.json").stat().st_mtime_ns
    assert evaluate.main([*command, "--names", "X", "Y", "Z"]) == 0
    assert "| X " in capsys.readouterr().out and (out / "results.json").stat().st_mtime_ns == before


def test_a_line_through_one_backbone_is_refused_before_anything_is_evaluated(shown, capsys, tmp_path):
    command = [*models(shown, "zero", "fine"), *sets(shown, "val", "train"), "--out", str(tmp_path / "out")]
    for fit_on, words in (
        (models(shown, "zero", "fine"), "would give fine-tuning 0 by construction. --fit-on names 2 of 1 backbone"),
        (["published"], "--fit-on published needs ImageNet's validation set (val) and one of its five shifted sets"),
    ):
        assert evaluate.main([*command, "--fit-on", *fit_on]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_models_are_named_without_paths(shown, capsys, tmp_path):
    out = tmp_path / "out"
    assert evaluate.main([*models(shown, "zero", "fine"), *sets(shown), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| zero " in printed and "| fine " in printed
    assert str(shown) not in printed and str(shown) not in (out / "table.tex").read_text()


@pytest.mark.parametrize("tool", [evaluate, wise_ft, soup], ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("where", "precision"),
    [
        ((), "fp32"),  # this process, which has no GPU
        (("--nodes", "2"), "bf16"),
        (("--executor", "slurm"), "bf16"),
        (("--partition", "gpu"), "bf16"),
        (("--gpus-per-node", "a100:4"), "bf16"),
        (("--gpus-per-node", "0"), "fp32"),
        (("--nodes", "2", "--tasks-per-node", "4"), "fp32"),
        (("--nodes", "2", "--cluster", "cpus.toml"), "fp32"),
        (("--nodes", "2", "--precision", "tf32"), "tf32"),
    ],
)
def test_precision_follows_the_allocation_and_not_the_login_node(shown, monkeypatch, tmp_path, tool, where, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(allocation.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    monkeypatch.chdir(tmp_path)
    Path("cpus.toml").write_text("gpus_per_node = 0\ntasks_per_node = 4\n")
    asked = []
    monkeypatch.setattr(tool, "carry_out", lambda name, evaluation, *_: asked.append(evaluation) or (3, None))
    assert tool.main([*models(shown, "zero", "fine"), *sets(shown), *where]) == 3
    assert [evaluation.precision for evaluation in asked] == [precision]


def test_models_of_one_name_are_seeds_of_one_row(shown, capsys, tmp_path):
    command = [*models(shown, "zero", "fine", "other"), *sets(shown, "val", "train"), "--out", str(tmp_path / "out")]
    assert evaluate.main([*command, "--names", "start", "tuned", "tuned"]) == 0
    found = [model.sets["val"].top1 for model in read_results(tmp_path / "out").models[1:]]
    expected = f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"
    assert expected in capsys.readouterr().out and expected in (tmp_path / "out/table.md").read_text()


def test_replaced_model_is_evaluated_again(shown, capsys, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((shown / "zero.safetensors").read_bytes())
    command = [str(path), *sets(shown), "--out", str(tmp_path / "out")]
    assert evaluate.main(command) == 0
    first = read_results(tmp_path / "out").models[0].sets["val"].calibration
    path.write_bytes((shown / "fine.safetensors").read_bytes())
    assert evaluate.main(command) == 0
    assert "Models changed since" in capsys.readouterr().err
    assert read_results(tmp_path / "out").models[0].sets["val"].calibration != first


def test_wise_ft_sweep_is_chosen_on_the_holdout_and_drawn(shown, capsys, tmp_path):
    out = tmp_path / "out"
    alphas = ["--alphas", "0", "0.5", "1"]
    command = [*models(shown, "zero", "fine"), *alphas, *sets(shown), "--out", str(out), "--holdout", "train"]
    assert wise_ft.main(command) == 0
    chosen = json.loads((out / "results.json").read_text())["chosen"]
    assert f"α = {(0, 0.5, 1)[chosen]:g}, the best on train: {out / 'model.safetensors'}" in capsys.readouterr().out
    assert picture(out / "sweep.png") and "Top-1 over α" in checked((out / "index.html").read_bytes()).text
    assert wise_ft.main([*models(shown, "zero", "fine"), *alphas, *sets(shown), "--out", str(tmp_path / "none")]) == 0
    assert "No model was saved" in capsys.readouterr().out and not (tmp_path / "none/model.safetensors").exists()


def test_wise_ft_at_0_1_and_one_half(shown, tmp_path):
    zero, fine = (load_model(path)[0].state_dict() for path in models(shown, "zero", "fine"))
    for alpha in (0, 0.5, 1):
        out = tmp_path / f"{alpha}"
        assert wise_ft.main([*models(shown, "zero", "fine"), "--alphas", str(alpha), "--out", str(out)]) == 0
        mixed = load_model(out / "model.safetensors")[0].state_dict()
        for name in zero:
            torch.testing.assert_close(mixed[name], (1 - alpha) * zero[name] + alpha * fine[name])


def test_soups_print_their_ingredients(shown, capsys, tmp_path):
    ingredients = models(shown, "zero", "fine", "other")
    assert soup.main([*ingredients, "--out", str(tmp_path / "uniform")]) == 0
    assert "3 of 3 models" in capsys.readouterr().out
    command = [*ingredients, "--greedy", "--holdout", "train", *sets(shown), "--out", str(tmp_path / "greedy")]
    assert soup.main(command) == 0
    printed = capsys.readouterr().out
    assert "no. 1" in printed and "greedy-soup" in printed and (tmp_path / "greedy/model.safetensors").exists()


@pytest.fixture(scope="module")
def trained(shown):
    """A run of three epochs that was evaluated on val at the end of each."""
    recipe = Recipe(
        model=Model(name=str(shown / "zero.json"), pretrained=str(shown / "zero.safetensors")),
        method=Method(name="vanilla"),
        data=Data(shards=str(shown / "shards"), eval_sets=("val",), loader_workers=0),
        optim=Optim(epochs=3, batch_size=5, lanes=1, warmup_steps=1, lr=1e-2),
        run=Run(precision="fp32", best_on="val", keep_checkpoints=1),
    )
    return made.train(recipe.resolved(), shown / "run")


def test_results_and_tables_state_which_checkpoint_was_chosen(shown, trained, capsys, tmp_path):
    best = trained.best()
    given = {"last": trained.final, "best": best.model}
    for choice, file in given.items():
        out, plain = tmp_path / choice, tmp_path / f"{choice}-by-path"
        command = [str(trained.root), *sets(shown, "train"), "--out", str(out), "--checkpoint", choice]
        assert evaluate.main(command) == 0
        printed = capsys.readouterr()
        assert evaluate.main([str(file), *sets(shown, "train"), "--out", str(plain)]) == 0
        capsys.readouterr()
        [row], [same] = read_results(out).models, read_results(plain).models
        assert row.sets["train"] == same.sets["train"]
        [origin] = json.loads((out / "results.json").read_text())["checkpoints"]
        said = {"step": best.step, "chosen": "best on val"} if choice == "best" else {"step": 9, "chosen": "last"}
        assert {name: origin[name] for name in said} == said and origin["run"] == str(trained.root)
        for text in (printed.out, (out / "table.md").read_text(), (out / "table.tex").read_text()):
            assert f"step {said['step']}, {said['chosen']}" in " ".join(text.replace("%", "").split())
    assert f"the best checkpoint is that of step {best.step}" in printed.out


def test_wise_ft_and_soups_accept_the_best_checkpoint_also_before_it_exists(shown, trained, tmp_path):
    best = load_model(trained.best().model)[0].state_dict()
    zero = load_model(trained.initial)[0].state_dict()
    command = [str(trained.initial), str(trained.root), "--checkpoint", "best", "--out", str(tmp_path / "mixed")]
    assert wise_ft.main(command) == 0
    mixed = load_model(tmp_path / "mixed/model.safetensors")[0].state_dict()
    torch.testing.assert_close(mixed["head.weight"], 0.5 * zero["head.weight"] + 0.5 * best["head.weight"])
    assert soup.main([*command[:-1], str(tmp_path / "soup")]) == 0
    # As launch/reproduce.py names it, before there is a run.
    pointer = str(trained.checkpoints / "best.json")
    work = UniformSoup(models=(str(trained.initial), pointer))
    run = RunFolder(tmp_path / "later")
    run.claim(work)
    run_evaluation(work, run, DistributedContext())
    result = json.loads(run.results.read_text())
    assert pointer in result["of"] and str(trained.best().model) in result["of"]
    assert [each["chosen"] for each in result["checkpoints"]] == ["where training starts", "best on val"]
    assert load_model(run.final)[0].state_dict().keys() == best.keys()


def test_warning_for_a_set_that_chose_and_error_for_a_repeated_model(shown, trained, tmp_path, capsys):
    (tmp_path / "dev").symlink_to(shown / "shards/val")
    (tmp_path / "again").symlink_to("dev")
    command = [str(trained.root), "--shards", str(tmp_path), "--out", str(tmp_path / "o"), "--loader-workers", "0"]
    assert evaluate.main([*command, "--sets", "dev", "--checkpoint", "best", "--dry-run"]) == 0
    warned = f"warning: val has chosen the checkpoint of {trained.root}: its accuracy on dev is too high"
    assert warned in capsys.readouterr().err
    swept = [str(trained.initial), *command, "--alphas", "0", "1", "--sets", "dev", "--holdout", "again"]
    assert wise_ft.main(swept) == 2
    assert "--holdout again and the set dev of --sets have the same images" in capsys.readouterr().err
    assert soup.main([str(trained.checkpoints / "step-00000009"), *command]) == 2
    assert "are the same model (step 9 of " in capsys.readouterr().err
    assert soup.main([str(trained.root), *command]) == 2
    assert "MODEL names one of them twice" in capsys.readouterr().err


def test_missing_best_checkpoint_is_refused(shown, trained, tmp_path, capsys):
    def says(*words: object) -> str:
        assert (
            evaluate.main([*map(str, words), *sets(shown), "--checkpoint", "best", "--out", str(tmp_path / "o")]) == 2
        )
        return capsys.readouterr().err

    assert "--checkpoint best would do nothing" in says(shown / "zero.safetensors")
    best = trained.best().model.parent
    best.rename(tmp_path / "moved")
    try:
        assert f"The best checkpoint of {trained.root}, {best.name}, is missing" in says(trained.root)
    finally:
        (tmp_path / "moved").rename(best)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("tool", "more"), [(wise_ft, ["--alphas", "0", "1"]), (soup, ["--greedy"])], ids=["wise_ft", "soup"]
)
def test_choice_on_a_test_set_needs_a_flag(shown, tmp_path, capsys, tool, more):
    other = shown / "shards/objectnet"
    if not other.exists():
        other.symlink_to("train")
    command = [*models(shown, "zero", "fine"), *more, *sets(shown), "--out", str(tmp_path / "out")]
    assert tool.main([*command, "--holdout", "objectnet"]) == 2
    assert "--holdout objectnet chooses a model on objectnet, which is a test set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert tool.main([*command, "--holdout", "objectnet", "--select-on-test-set", "--dry-run"]) == 0
    assert "warning: --holdout objectnet chooses" in capsys.readouterr().err
    assert tool.main([*command, "--holdout", "train", "--select-on-test-set"]) == 2
    assert "--select-on-test-set would do nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "command", "reason"),
    [
        (evaluate, ["zero", "--sets", "nowhere"], "There is no folder of shards"),
        (evaluate, ["zero", "--sets", "imagenet-r"], "There is no folder of shards at .*imagenet-r"),
        (evaluate, ["zero", "two", "--sets", "val"], "differ in classes"),
        (evaluate, ["two", "--sets", "val"], "labels and predictions would not mean the same"),
        (evaluate, ["zero", "--sets", "val", "--names", "a", "b"], "2 names to 1 models"),
        (evaluate, ["zero", "--sets", "val", "--fit-on", "fine"], "is not one of the evaluated models"),
        (evaluate, ["zero", "--sets", "val", "--partition", "x", "--executor", "local"], "would do nothing"),
        (wise_ft, ["zero", "two"], "has 2 classes"),
        (wise_ft, ["zero", "fine", "--alphas", "2"], "must lie in 0…1"),
        (wise_ft, ["zero", "fine", "--alphas", "0", "1", "--holdout", "val", "--sets", "val"], "cannot test it"),
        (wise_ft, ["zero", "fine", "--alphas", "0.5", "--holdout", "val"], "there is one"),
        (soup, ["zero"], "two models or more"),
        (soup, ["zero", "fine", "--holdout", "val"], "would do nothing"),
        (soup, ["zero", "fine", "--greedy", "--sets", "val"], "name it with --holdout"),
    ],
)
def test_invalid_commands_are_refused_before_anything_is_written(shown, tmp_path, capsys, tool, command, reason):
    if not (shown / "two.safetensors").exists():
        made.save_tiny_model(shown / "two.safetensors", classes=made.CLASSES[:2])
    words = [
        str(shown / f"{word}.safetensors") if (shown / f"{word}.safetensors").exists() else word for word in command
    ]
    words += ["--shards", str(shown / "shards"), "--out", str(tmp_path / "out")]
    assert tool.main(words) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(shown, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate.main([*models(shown, "zero"), *sets(shown), "--dry-run", "--out", str(out)]) == 0
    assert "nothing was run" in capsys.readouterr().out and not out.exists()


def test_interrupted_evaluation_is_resumed_by_the_same_command(shown, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(TOOLS / "evaluate.py"), *models(shown, "zero", "fine"), *sets(shown, "val", "train")]
    command += ["--batch-size", "1", "--out", str(out)]
    # A slow disk, for the sake of the signal
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import lean, sys, time, importlib.abc\n"
        "class Find(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'cfmask.evaluation.worker':\n"
        "            import cfmask.data.stream as s\n"
        "            real = s.eval_batches\n"
        "            def slowly(*a, **k):\n"
        "                for batch in real(*a, **k):\n"
        "                    time.sleep(0.2)\n"
        "                    yield batch\n"
        f"                    open({str(slow / 'counted')!r}, 'a').write('x')\n"
        "            s.eval_batches = slowly\n"
        "sys.meta_path.insert(0, Find())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{slow}:{os.environ['PYTHONPATH']}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (slow / "counted").exists() and len((slow / "counted").read_text()) >= 4, "a few batches")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "Interrupted by SIGINT. The same command resumes" in error
    assert "Traceback" not in error and (out / "progress.safetensors").exists()
    assert evaluate.main([*command[2:]]) == 0
    assert read_lines(out / "attempts.jsonl")[1]["from_step"] > 0
    assert read_results(out).models[0].sets["train"].total == 15


def test_job_of_two_ranks_gives_the_same_results(shown, tmp_path, capfd):
    command = [*models(shown, "zero", "fine"), *sets(shown, "val", "train"), "--batch-size", "4", "--out"]
    assert evaluate.main([*command, str(tmp_path / "here")]) == 0
    capfd.readouterr()
    job = [*command, str(tmp_path / "job"), "--executor", "local", "--tasks-per-node", "2"]
    assert evaluate.main(job) == 0, made.logs(tmp_path / "job")
    assert "top-1 %" in capfd.readouterr().out
    here, there = (read_results(tmp_path / name) for name in ("here", "job"))
    for one, other in zip(here.models, there.models, strict=True):
        for name in ("val", "train"):
            a, b = one.sets[name], other.sets[name]
            assert (a.correct, a.total, a.per_class) == (b.correct, b.total, b.per_class)
            assert a.ece == pytest.approx(b.ece, abs=1e-4)  # a rank has one thread here, and adds in another order
    run = RunFolder(tmp_path / "job")
    assert read_lines(run.attempts)[0]["world_size"] == 2 and (run.root / "code").is_dir()
    made.assert_log_format(run.root)
    assert re.search(
        r" INFO rank 0 \S+ \| train: (\d+)/\1, \d+\.\d samples/s, ETA 0 s$", made.logs(run.root), re.MULTILINE
    )
