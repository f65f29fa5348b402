"""launch/reproduce.py --dry-run before any shard exists: the cost of the paper's plan, and what is still to do."""

from __future__ import annotations

import dataclasses
import importlib
import shlex

import pytest

from cfmask.data.benchmarks import TRAIN, VAL
from cfmask.errors import UserError
from cfmask.presets import PRESETS
from cfmask.recipe import Model, Recipe
from cfmask.runtime.command import CommandParser
from launch import reproduce
from launch.paper import cost, materials
from launch.paper.estimate import hours_text
from launch.paper.materials import look_for, weights_to_do
from launch.paper.plan import LABELS, PlanNode
from test_documents import words_of

GPUS = ("--executor", "slurm", "--gpus-per-node", "8", "--nodes", "2")


@pytest.fixture(autouse=True)
def nothing_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    monkeypatch.setattr(materials, "in_cache", lambda name, pretrained: False)
    monkeypatch.chdir(tmp_path)


def dry_run(*words: object) -> int:
    return reproduce.main([*map(str, words), "--dry-run"])


def table_of(said: str) -> dict[str, list[str]]:
    """The cells of the table of costs by row."""
    lines = said[said.index("\nrow ") : said.index("\n\nAbout")].strip().splitlines()
    ends = [lines[0].index(name) + len(name) for name in ("jobs", "GPU-hours", "left", "memory", "disk")]
    starts = [lines[0].index("jobs") - 1, *ends[:-1]]
    return {
        line[: starts[0]].strip(): [line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines[1:]
    }


def test_the_whole_plan_is_costed_with_nothing_but_the_architecture(capsys, tmp_path):
    assert dry_run("--arch", "ViT-B-32", *GPUS, "--tflops", 100) == reproduce.INCOMPLETE
    said = capsys.readouterr().out
    assert "0 of 83 jobs done" in said
    assert "Will train on 1,270,927 images; 10,240 will be held out." in said
    table = table_of(said)
    assert list(table) == [*LABELS.values(), "all rows"]
    # 10 epochs of whole batches, 2.8 F a step of FT; evaluations of 10,240 images an epoch, and three of six sets
    f = 8.818e9
    trained = 10 * (1_270_927 // 512) * 512 * 2.8 + 10 * 10_240
    hours = 3 * (trained + 166_963) * f / 1e14 / 3600
    assert float(table["FT"][1]) == pytest.approx(hours, rel=0.05)
    assert table["FT"][0] == "6" and table["zero-shot"][3] == "–"
    assert table["all rows"][0] == "83"
    # 88.4 million parameters; of each of three runs, ten checkpoints with moments, one more, start and end
    assert table["FT"][4] == f"{3 * 88_362_216 * (11 * 12 + 8) / 1e9:.0f} GB"
    assert "1,448,130 images in 8 sets" in said and "218 GB with --store crop-raw" in said
    assert list(tmp_path.iterdir()) == []


def test_every_line_to_do_is_a_command_that_is_accepted(capsys, monkeypatch):
    assert dry_run("--arch", "ViT-L-14", *GPUS, "--shards", "my shards") == reproduce.INCOMPLETE
    to_do = capsys.readouterr().out.partition("To do before 83 jobs")[2]
    commands = [line.strip() for line in to_do.splitlines() if line.startswith("    python ")]
    assert len(commands) == 7 and commands[0].startswith("python tools/build_head.py --model ViT-L-14-quickgelu ")
    assert "# weights: a download of 1.7 GB" in to_do and "# val, train, holdout: a download of 155 GB" in to_do
    parsed = []

    class _Parsed(Exception):
        pass

    def parse(self, args=None, namespace=None):
        parsed.append(real(self, args, namespace))
        raise _Parsed

    real = CommandParser.parse_args
    monkeypatch.setattr(CommandParser, "parse_args", parse)
    for command in commands:
        program, arguments = words_of(command)
        main = importlib.import_module(program.removesuffix(".py").replace("/", ".")).main
        with pytest.raises(_Parsed):
            main(arguments)
    assert all(str(each.out).endswith("my shards") for each in parsed[1:])
    assert [each.holdout for each in parsed[1:2]] == [10_240]


def test_a_row_that_trains_nothing_needs_no_training_set(capsys):
    assert dry_run("--arch", "ViT-B-16", *GPUS, "--rows", "zero-shot", "--sets", "val", "imagenet-r") == 3
    said = capsys.readouterr().out
    assert "Nothing is trained." in said and "# val: a download" in said and "imagenet-sketch" not in said
    assert "80,000 images in 2 sets" in said


def test_only_a_dry_run_accepts_missing_sets_and_only_known_ones(capsys):
    assert reproduce.main(["--arch", "ViT-B-32", *GPUS, "--shards", "shards"]) == 2
    assert "There is no folder of shards at" in capsys.readouterr().err
    assert reproduce.main(["--arch", "ViT-B-32", *GPUS]) == 2
    assert "--shards is missing" in capsys.readouterr().err
    assert dry_run("--arch", "ViT-B-32", *GPUS, "--sets", "val", "my-own-set") == 2
    assert "my-own-set" in capsys.readouterr().err
    assert dry_run("--arch", "ViT-B-32", "--executor", "slurm", "--gpus-per-node", 3) == 2
    assert "3 ranks cannot share 16 lanes" in capsys.readouterr().err


def test_hours_are_numbers_that_people_read():
    assert list(map(hours_text, (0, 4e-7, 0.25, 3.14, 2634.2))) == ["0", "<0.01", "0.25", "3.1", "2,634"]


def test_without_gpus_the_hours_of_gpus_are_named_as_well(capsys):
    assert dry_run("--arch", "ViT-B-32", "--executor", "local", "--tasks-per-node", 2, "--rows", "ft") == 3
    said = capsys.readouterr().out
    assert "hours of a rank" in said and "GPUs of 100 TFLOP/s would take 2.6 GPU-hours" in said


def test_counts_are_those_of_the_paper_with_and_without_a_held_out_set(tmp_path):
    found = look_for(str(tmp_path), ["val", "train"], "holdout", may_be_missing=True)
    assert found.images == {"val": 50_000, "train": 1_270_927, "holdout": 10_240}
    assert len(found.classes) == 1000 and not found.there
    without = look_for(str(tmp_path), ["val", "train"], None, may_be_missing=True)
    assert without.images == {"val": VAL.images, "train": TRAIN.images}
    assert not any("--holdout" in line for line in without.to_do())
    assert without.selection("train") == "Will train on 1,281,167 images; none will be held out."
    with pytest.raises(UserError, match="There is no folder of shards"):
        look_for(str(tmp_path), ["val"], None, may_be_missing=False)


def test_weights_are_to_do_unless_they_are_there(monkeypatch):
    tagged = Model("ViT-B-16-quickgelu", "openai")
    comment, command = weights_to_do(tagged, "ViT-B-16")
    assert "599 MB" in comment and shlex.split(command)[:2] == ["python", "tools/build_head.py"]
    [missing] = weights_to_do(Model("ViT-B-16-quickgelu", "/no/such/weights.pt"), None)
    assert "/no/such/weights.pt does not exist" in missing
    monkeypatch.setattr(materials, "in_cache", lambda name, pretrained: True)
    assert weights_to_do(tagged, "ViT-B-16") == []


# --- memory and disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_parameters_are_those_of_the_model(name):
    import open_clip
    import torch

    from cfmask.models.head import ModelInfo, build_tower

    config = open_clip.get_model_config(f"{name}-quickgelu")
    with torch.device("meta"):
        tower = build_tower(ModelInfo(name, config, (0.0,) * 3, (1.0,) * 3))
    own = sum(parameter.numel() for parameter in tower.parameters())
    assert cost.parameters(config, 0) == own
    assert cost.parameters(config, 1000) == own + (config["embed_dim"] + 1) * 1000


# docs/benchmarks.md: peak memory of a step on an H100, in GB.
MEASURED = [
    ("ViT-B-16", "object-mask-single-fill", "bf16", False, 128, 9.50),
    ("ViT-B-16", "ft", "bf16", False, 128, 9.15),
    ("ViT-B-16", "object-mask-single-fill", "tf32", False, 128, 17.02),
    ("ViT-B-16", "object-mask-single-fill", "bf16", True, 128, 3.69),
    ("ViT-B-32", "object-mask-single-fill", "bf16", False, 32, 2.45),
    ("ViT-B-32", "ft", "bf16", False, 32, 2.32),
]


@pytest.mark.parametrize(("model", "row", "precision", "recomputed", "images", "gigabytes"), MEASURED)
def test_memory_is_what_was_measured(model, row, precision, recomputed, images, gigabytes):
    import open_clip

    recipe = PRESETS[row].resolved()
    run = dataclasses.replace(recipe.run, precision=precision, activation_checkpointing=recomputed)
    config = open_clip.get_model_config(f"{model}-quickgelu")
    needs = cost.gpu_memory(dataclasses.replace(recipe, run=run), config, 1000, images) / 1e9
    assert needs == pytest.approx(gigabytes, rel=0.1)


def test_images_at_a_time():
    recipe = Recipe().resolved()
    assert cost.images_at_a_time(recipe, 8) == (64, 64)
    auto = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, micro_batches="auto"))
    assert cost.images_at_a_time(auto, 8) == (32, 64)
    two = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, micro_batches=2))
    assert cost.images_at_a_time(two, 8) == (32, 32)


def test_disk_counts_the_checkpoints_that_are_kept():
    recipe = PRESETS["ft"].resolved()
    few = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, keep_epochs=False))
    assert cost.disk(PlanNode("ft", 0, recipe), 1) == 12 * (10 + 2 - 1) + 8
    assert cost.disk(PlanNode("ft", 0, few), 1) == 12 * 2 + 8
