"""Submission refuses impossible settings with cause and remedy, before it starts a rank."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import made
from cfmask.data.shards import load_manifest
from cfmask.data.stream import eval_batches
from cfmask.models.head import load_model
from cfmask.models.tower import Normalise
from cfmask.runtime.jsonl import read_lines
from towers import B32


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"), per_class=16)


def flags(materials: Path, run: Path, *more: object) -> list[object]:
    return [*made.recipe_flags(materials, run), "--executor", "local", "--tasks-per-node", 2, "--epochs", 1, *more]


def refused(*command: object, **popen) -> str:
    """The one paragraph that a refused command prints; nothing may have been started."""
    done = made.submit(*command, check=False, **popen)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def test_shards_without_a_manifest_are_refused(materials, tmp_path):
    shutil.copytree(materials / "shards", tmp_path / "shards")
    (tmp_path / "shards/train/manifest.json").unlink()
    error = refused(*flags(materials, tmp_path / "run", "--shards", tmp_path / "shards"))
    assert "manifest" in error and "make_shards.py" in error and str(tmp_path / "shards/train") in error
    assert not (tmp_path / "run").exists()


def test_head_with_another_number_of_classes_is_refused(materials, tmp_path):
    head = made.save_tiny_model(tmp_path / "two.safetensors", classes=made.CLASSES[:2])
    error = refused(*flags(materials, tmp_path / "run", "--head", head))
    assert "has 2 classes, the shards 3" in error


def test_weights_of_another_architecture_are_refused(materials, tmp_path):
    made.save_tiny_model(tmp_path / "b32.safetensors", geometry=B32)
    error = refused(*flags(materials, tmp_path / "run", "--model", tmp_path / "b32.json"))
    assert "differ in embed_dim" in error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--lanes", 3), "not a multiple of --lanes 3"),
        (("--tasks-per-node", 3), "3 ranks cannot share 4 lanes"),
        (("--micro-batches", 3), "--micro-batches 3 does not divide the 2 lanes"),
        (("--batch-size", 512, "--lanes", 16), "do not fill one global batch of 512"),
        (("--method", "vanilla", "--beta", 30), "--beta would do nothing"),
        (("--preset", "object-mask-no-fill", "--rate", 0.5), "--rate would do nothing"),
        (("--nodes", 2), "--nodes 2 needs Slurm"),
        (("--gpus-per-node", 4), "contradicts"),
        (("--pretrained", "/no/such.pt"), "no such file"),
        (("--model", "ViT-B-32", "--pretrained", "openai"), "ViT-B-32-quickgelu"),
        (("--eval-sets", "nope"), "nope"),
        (("--eval-sets", "val", "--best-on", "vla"), "not one of the --eval-sets (val). Did you mean val?"),
        (("--shards", "s3://bucket/shards"), "s3:// URLs are read by a command that prints a file"),
        (("--executor", "debug"), "one rank"),
        (("--cluster", "/no/such.toml"), "The cluster file /no/such.toml, named by --cluster, does not exist"),
        (("--qos", "high", "--time", 60), "--time, --qos would do nothing: it is for Slurm, and --executor is local"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_impossible_settings_are_refused_before_anything_starts(materials, tmp_path, more, said):
    assert said in refused(*flags(materials, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_misspelt_paths_get_a_suggestion(materials, tmp_path):
    misspelt = {
        "--shards": "shrads",
        "--model": "tinny.json",
        "--pretrained": "tiny.safetensor",
        "--head": "tiny.sfetensors",
    }
    for flag, name in misspelt.items():
        right = {"--shards": "shards", "--model": "tiny.json"}.get(flag, "tiny.safetensors")
        error = refused(*flags(materials, tmp_path / "run", flag, materials / name))
        assert f"Did you mean {right}?" in error, error
    (tmp_path / "ft-s0").mkdir()
    assert "Did you mean ft-s0?" in refused("--resume", tmp_path / "ft-so")


def test_a_set_in_place_of_the_folder_of_sets_is_recognised(materials, tmp_path):
    error = refused(*flags(materials, tmp_path / "run", "--shards", materials / "shards/train"))
    assert f"is a set itself: give the folder of the sets, {materials / 'shards'}." in error


def test_flags_that_resume_does_not_take_are_named_as_they_were_given(materials, tmp_path):
    error = refused("--resume", tmp_path, "--lr", 1, "--adam-beta2", 0.9, "--preset", "ft")
    assert "would do nothing: --lr, --adam-beta2, --preset." in error


def test_an_unknown_flag_is_refused(materials, tmp_path):
    done = made.submit(*flags(materials, tmp_path / "run", "--learning-rate", 1), check=False)
    assert done.returncode == 2 and "There is no flag --learning-rate." in done.stderr


def test_executor_slurm_without_sbatch_is_refused(materials, tmp_path):
    without = {"PATH": os.path.dirname(shutil.which("env") or "/usr/bin") if not shutil.which("sbatch") else "/nowhere"}
    assert "no sbatch" in refused(*flags(materials, tmp_path / "run", "--executor", "slurm"), env=without)


def test_missing_weights_error_names_the_file_and_the_flag(materials, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "empty")}
    error = refused(
        *flags(materials, tmp_path / "run", "--model", "ViT-B-32-quickgelu", "--pretrained", "openai"), env=offline
    )
    assert "timm/vit_base_patch32_clip_224.openai" in error and "--pretrained open_clip_model.safetensors" in error


def test_missing_weights_are_reported_before_seconds_of_imports(materials, tmp_path):
    command = flags(materials, tmp_path / "run", "--model", "ViT-B-32-quickgelu", "--pretrained", "openai")
    code = (
        "import sys; from launch.submit import main; code = main(sys.argv[1:])\n"
        "print(code, [name for name in ('torch', 'open_clip', 'transformers') if name in sys.modules])"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "empty")}
    words = [sys.executable, "-c", code, *map(str, command)]
    done = subprocess.run(words, cwd=made.REPO, env=offline, capture_output=True, text=True)
    assert done.stdout == "2 []\n" and "are not in the cache" in done.stderr


def test_folder_of_another_recipe_or_with_foreign_files_is_refused(materials, tmp_path):
    run = tmp_path / "run"
    made.submit(*flags(materials, run, "--epochs", 1))
    assert "optim.epochs: 1 → 2" in refused(*flags(materials, run, "--epochs", 2))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    for more in ((), ("--dry-run",)):
        assert "thesis.tex" in refused(*flags(materials, foreign, *more))
    assert os.listdir(foreign) == ["thesis.tex"]


def test_a_dry_run_prints_the_whole_recipe_and_starts_nothing(materials, tmp_path):
    done = made.submit(*flags(materials, tmp_path / "run", "--dry-run"))
    recipe = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert recipe["method"]["beta"] == 30.0 and recipe["optim"]["lr"] == 1e-3
    assert not (tmp_path / "run").exists()


def test_resume_takes_no_settings(materials, tmp_path):
    assert "would do nothing" in refused("--resume", tmp_path, "--lr", 1)
    assert "not a run folder" in refused("--resume", tmp_path)


def test_evaluation_counts_each_sample_once(materials, tmp_path):
    """48 samples over 2 ranks in batches that do not divide them, compared with a loop over the whole set."""
    run = tmp_path / "run"
    made.submit(*flags(materials, run, "--eval-sets", "val", "--preset", "ft", "--batch-size", 20))
    counted = json.loads((run / "results.json").read_text())["sets"]["val"]
    model, info = load_model(run / "model.safetensors")
    normalise = Normalise(info.mean, info.std)
    manifest = load_manifest(materials / "shards/val")
    whole = eval_batches(manifest, image_size=16, batch_size=7, rank=0, world_size=1, loader_workers=0)
    with torch.no_grad():
        right = sum((model(normalise(b.images))[1].argmax(1) == b.labels).sum().item() for b in whole)
    assert (counted["correct"], counted["total"]) == (right, 48)


def test_nonfinite_loss_stops_all_ranks(materials, tmp_path):
    run = tmp_path / "run"
    done = made.submit(*flags(materials, run, "--lr", 1e30, "--epochs", 4, "--checkpoint-steps", 1), check=False)
    assert done.returncode == 1
    assert "FloatingPointError" in done.stdout and "--lr" in done.stdout


def test_exception_in_one_rank_ends_the_job(materials, tmp_path):
    """A damaged image of an evaluation, which must not be replaced, reaches one rank only: the job ends, says
    which sample, and hangs nobody."""
    shutil.copytree(materials / "shards", tmp_path / "shards")
    tar = tmp_path / "shards/val/val-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600:900] = bytes(300)
    tar.write_bytes(data)
    run = ("--run", tmp_path / "run", "--shards", tmp_path / "shards", "--eval-sets", "val")
    done = made.submit(*flags(materials, tmp_path / "run", *run), check=False)
    assert done.returncode == 1
    assert "val-000000.tar" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_full_disk_fails_the_job_and_keeps_earlier_checkpoints(materials, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    model = made.save_tiny_model(tmp_path / "m.safetensors", geometry=B32)
    # Room for the initial model and one checkpoint of three times that, for logs and the code (in pages), but not for a
    # second one.
    files = [path for folder in ("cfmask", "launch") for path in (made.REPO / folder).rglob("*.*")]
    code = sum(-(-path.stat().st_size // 4096) * 4096 for path in files if "__pycache__" not in path.parts)
    room = f"size={int(5.8 * model.stat().st_size) + code + (20 << 10)}"
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", disk]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        run = disk / "run"
        done = made.submit(
            *flags(materials, run, "--model", tmp_path / "m.json", "--pretrained", model, "--checkpoint-steps", 1),
            check=False,
        )
        assert done.returncode == 1
        assert "No space left on device" in done.stdout and "Earlier checkpoints are intact" in done.stdout
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000001"]
        assert [line["step"] for line in read_lines(run / "log.jsonl")] == [1, 2, 3], "training went on"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
