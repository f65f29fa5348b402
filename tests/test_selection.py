"""Which sets may choose a model, and which checkpoint is best: by the records of a run, not by the remaining files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cfmask.checkpoint.state import MODEL, OPTIMIZER, STATE, CheckpointState, encode
from cfmask.data import imagenet
from cfmask.data.benchmarks import wnids
from cfmask.data.receipts import DataProgress
from cfmask.data.shard_index import Index, index_name, write_index
from cfmask.data.shards import Manifest, Shard, write_manifest
from cfmask.errors import UserError
from cfmask.evaluation.model_origin import ModelOrigin, checkpoint_note, origin_of, settled
from cfmask.evaluation.selection import check_selection, known_test_set, refuse_idle_flag
from cfmask.presets import PRESETS, preset_of
from cfmask.recipe import Data, Method, Optim, Recipe
from cfmask.run_search import find_model
from cfmask.runs import RunFolder
from launch.paper import holdout
from launch.submission.training import check_best_on

# --- the best checkpoint ----------------------------------------------------------------------------------------------


def a_run(folder: Path, top1: dict[int, float], recipe: Recipe | None = None, *, finished: bool = True) -> RunFolder:
    """A run of 10 steps an epoch, evaluated on holdout at the end of each, with all checkpoints."""
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    recipe = recipe or Recipe(data=Data(eval_sets=("holdout",))).resolved()
    (run.root / "recipe.json").write_text(recipe.to_json())
    with open(run.log, "w") as log:
        for step, value in top1.items():
            epoch = step // 10 if step % 10 == 0 else step / 10
            log.write(json.dumps({"step": step, "epoch": epoch, "eval": {"holdout": value, "val": 100 - value}}) + "\n")
    for step, value in top1.items():
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir()
        weights = f"weights of step {step}".encode()
        (folder / MODEL).write_bytes(weights)
        sha256 = {MODEL: hashlib.sha256(weights).hexdigest(), OPTIMIZER: "0" * 64}
        scores = {"holdout": value} if step % 10 == 0 else {}
        (folder / STATE).write_bytes(encode(CheckpointState(step, "0" * 16, DataProgress(), top1=scores), step, sha256))
    if finished:
        run.results.write_text(json.dumps({"step": max(top1), "sets": {}}))
        run.final.write_bytes(b"weights of the last step")
    return run


def test_the_best_is_the_first_of_equal_ends_of_epochs(tmp_path):
    run = a_run(tmp_path / "run", {10: 70.0, 15: 99.0, 20: 80.0, 30: 80.0, 40: 75.0})
    best = run.best()
    assert (best.step, best.on, best.top1) == (20, "holdout", 80.0), "step 15 is not the end of an epoch"
    assert find_model(run.checkpoints / "best.json") == best.model == run.checkpoints / "step-00000020" / MODEL


def test_invalid_lines_of_a_log_are_ignored(tmp_path):
    run = a_run(tmp_path / "run", {10: 70.0, 20: 80.0, 30: 75.0})
    lines = run.log.read_text().splitlines()
    for step, value in ((40, float("nan")), (50, None), (60, "99"), (70, 1e9), (None, 99.0)):
        lines.append(json.dumps({"step": step, "epoch": 9, "eval": {"holdout": value}}))
    repeated = json.dumps({"step": 20, "epoch": 2, "eval": {"holdout": 10.0}})  # of a start that was cut off
    run.log.write_text("\n".join([repeated, *lines, '{"step": 80, "eval"']))
    assert run.best().step == 20


def test_best_json_is_found_from_any_folder_and_only_in_checkpoints(tmp_path, monkeypatch):
    run = a_run(tmp_path / "run", {10: 70.0, 20: 60.0})
    best = run.best().model
    monkeypatch.chdir(run.checkpoints)
    assert find_model("best.json") == find_model("../checkpoints/best.json") == best
    (run.checkpoints / "step-00000020.bak").mkdir()
    (run.checkpoints / "step-00000020.bak" / MODEL).touch()
    run.final.unlink()
    assert find_model(run.root) == run.checkpoints / "step-00000020" / MODEL, "a backup is not a checkpoint"
    assert origin_of(run.checkpoints / "step-00000020" / MODEL).chosen == "last"
    (run.root / "archive").mkdir()
    with pytest.raises(UserError, match="archive/best.json is not in the folder checkpoints of a run"):
        find_model(run.root / "archive/best.json")


def test_checkpoints_on_another_disk_belong_to_the_run(tmp_path):
    run = a_run(tmp_path / "run", {10: 70.0, 20: 60.0})
    run.checkpoints.rename(tmp_path / "elsewhere")
    run.checkpoints.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("run")
    file = settled(find_model(tmp_path / "link/checkpoints/best.json"))
    assert file == run.checkpoints / "step-00000010" / MODEL and origin_of(file).chosen_on == "holdout"
    assert settled(tmp_path / "link/model.safetensors") == run.final


def test_score_missing_from_the_log_is_read_from_the_checkpoint(tmp_path):
    run = a_run(tmp_path / "run", {10: 70.0, 20: 80.0})
    run.log.write_text(run.log.read_text().splitlines()[0] + "\n")
    assert run.best().step == 20


def test_missing_best_checkpoint_is_not_replaced_by_the_second_best(tmp_path):
    run = a_run(tmp_path / "run", {10: 70.0, 20: 80.0, 30: 75.0})
    (run.checkpoints / "step-00000020").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"step-00000020, is missing.*best on holdout \(80.00 %\).*--checkpoint last"):
        run.best()


def test_torn_best_checkpoint_is_not_selected(tmp_path):
    run = a_run(tmp_path / "run", {10: 70.0, 20: 80.0})
    (run.checkpoints / "step-00000020" / MODEL).write_bytes(b"torn")
    with pytest.raises(UserError, match="model.safetensors is not what was written. It was the best on holdout"):
        run.best()
    (run.checkpoints / "step-00000020" / STATE).write_text("{")
    with pytest.raises(UserError, match="state.json is not what was written"):
        run.best()


def test_a_checkpoint_of_another_run_is_not_the_best(tmp_path):
    run = a_run(tmp_path / "run", {10: 70.0, 20: 80.0})
    other = a_run(tmp_path / "other", {10: 60.0, 20: 65.0})
    (run.checkpoints / "step-00000020").rename(tmp_path / "kept")
    (other.checkpoints / "step-00000020").rename(run.checkpoints / "step-00000020")
    with pytest.raises(UserError, match=r"disagree on the accuracy on holdout after step 20 \(65.0 % and 80.0 %\)"):
        run.best()


def test_a_run_that_chose_nothing_has_no_best_checkpoint(tmp_path):
    run = a_run(tmp_path / "run", {10: 70.0}, Recipe().resolved())
    with pytest.raises(UserError, match="trained without a set to choose on.*--eval-sets holdout"):
        run.best()
    early = a_run(tmp_path / "early", {5: 70.0}, finished=False)
    with pytest.raises(UserError, match="no best checkpoint yet"):
        early.best()


def test_epochs_that_train_the_head_alone_are_no_candidates(tmp_path):
    recipe = Recipe(
        method=Method(name="lp-ft"), data=Data(eval_sets=("holdout",)), optim=Optim(probe_epochs=2)
    ).resolved()
    run = a_run(tmp_path / "run", {10: 90.0, 20: 95.0, 30: 60.0, 40: 55.0}, recipe)
    assert run.best().step == 30


def test_results_state_the_step_of_a_model_and_what_chose_it(tmp_path):
    run = a_run(tmp_path / "run", {10: 70.0, 20: 80.0, 30: 75.0})
    running = a_run(tmp_path / "running", {10: 70.0, 20: 60.0}, finished=False)
    (run.root / "initial.safetensors").touch()
    (tmp_path / "foreign.safetensors").touch()

    def said(path: Path) -> tuple:
        origin = origin_of(path)
        assert ModelOrigin.from_json(json.loads(json.dumps(origin.to_json()))) == origin
        return origin.step, origin.chosen, origin.top1

    assert said(run.final) == (30, "last", None)
    assert said(run.best().model) == (20, "best on holdout", 80.0)
    assert said(run.checkpoints / "step-00000010" / MODEL) == (10, "named by its path", None)
    assert said(run.initial) == (0, "where training starts", None)
    assert said(running.best().model) == (10, "best on holdout so far", 70.0)
    assert said(find_model(running.root)) == (20, "last so far", None)
    assert said(tmp_path / "foreign.safetensors") == (None, "a file of no run", None)
    origins = [origin_of(run.final), origin_of(tmp_path / "foreign.safetensors"), origin_of(run.best().model)]
    note = checkpoint_note({"FT": origins[::2], "foreign": origins[1:2], "zero-shot": []})
    assert note == "Checkpoints: FT: step 30, last / step 20, best on holdout (80.00 %)."
    assert checkpoint_note({"foreign": origins[1:2]}) == ""
    assert checkpoint_note({"FT": [origins[0]] * 3}) == "Checkpoints: FT: step 30, last."
    alike = {"FT": [origins[0]] * 3, "x": [origins[0]]}
    assert checkpoint_note(alike) == "Checkpoints of all trained models: step 30, last."


# --- which sets may choose --------------------------------------------------------------------------------------------


def manifest(split: str, counts: dict[str, int], **more) -> Manifest:
    classes = imagenet.classes()
    by_class = tuple(counts.get(wnid, 0) for wnid, _ in classes)
    shard = Shard(f"{split}-000000.tar", sum(by_class), 0, "0" * 64, "0" * 64)
    return Manifest(Path("/s") / split, split, "original", classes, by_class, (shard,), **more)


ALL = imagenet.wnids()
EVEN = dict.fromkeys(ALL, 50)
RENDITIONS = dict.fromkeys(wnids("imagenet-r"), 150)


@pytest.mark.parametrize(
    ("name", "of_set", "known"),
    [
        ("objectnet", None, "objectnet"),
        ("imagenet-v2", None, "imagenet-v2"),
        ("imagenetv2-matched-frequency", None, "imagenetv2-matched-frequency"),
        ("wds_imagenet-r", None, "wds_imagenet-r"),
        ("ImageNet_Sketch", None, "ImageNet_Sketch"),
        ("test", None, "test"),
        ("holdout", None, None),
        ("val", None, None),
        ("imagenet-augmented", None, None),
        ("./objectnet/", None, "objectnet"),
        ("my-object_net", None, "my-object_net"),
        ("in1k-val", None, "in1k-val"),
        ("ILSVRC2012_img_val", None, "ILSVRC2012_img_val"),
        ("cifar10_test", None, "cifar10_test"),
        ("inv2", None, "inv2"),
        ("latest", None, None),
        ("in-house", None, None),
        ("imagenet-r50-features", None, None),
        ("v2", None, None),
        ("v2", manifest("v2", dict.fromkeys(ALL, 10)), "imagenet-v2"),
        ("a", replace(manifest("a", {}), classes=(("a", "a"),), class_counts=(1,)), None),
        ("dev", manifest("dev", EVEN | {ALL[3]: 49}, bad_samples=1), "ImageNet's validation set"),
        ("dev", manifest("dev", EVEN, made={"holdout": 10_240}), "ImageNet's validation set"),
        ("val", manifest("val", EVEN), "ImageNet's validation set"),
        ("imagenet", manifest("val", EVEN), "ImageNet's validation set"),
        ("dev", manifest("dev", EVEN), "ImageNet's validation set"),
        ("dev", manifest("objectnet", {}), "objectnet"),
        ("dev", manifest("dev", RENDITIONS), "imagenet-r"),
        ("dev", manifest("dev", RENDITIONS | {ALL[0]: 1}), None),
        ("holdout", manifest("holdout", EVEN, made={"holdout": 50_000}), None),
        ("holdout", manifest("holdout", dict.fromkeys(ALL, 10)), None),
    ],
)
def test_test_sets_are_recognised_by_name_and_content(name, of_set, known):
    assert known_test_set(name, of_set) == known


def test_test_set_chooses_only_with_the_flag(capsys):
    with pytest.raises(UserError, match="--holdout objectnet chooses a model on objectnet, which is a test set.*--sel"):
        check_selection("--holdout objectnet", "objectnet", None, allowed=False)
    assert check_selection("--holdout objectnet", "objectnet", None, allowed=True)
    assert "warning: --holdout objectnet chooses a model on objectnet" in capsys.readouterr().err
    assert not check_selection("--holdout holdout", "holdout", None, allowed=False)
    refuse_idle_flag(True, True)
    with pytest.raises(UserError, match="--select-on-test-set would do nothing"):
        refuse_idle_flag(True, False)


# --- the held-out set of a reproduction -------------------------------------------------------------------------------


NO_FLAGS = {"trains": True, "without": False, "allow_count_mismatch": False, "select_on_test_set": False}


def put_sets(shards: Path, **images: int) -> Recipe:
    """Manifests of ImageNet's classes with these numbers of images, without the images."""
    for name, number in images.items():
        root = shards / name
        root.mkdir(parents=True)
        per_class, more = divmod(number, 1000)
        split = {} if number == 50_000 else {"source": "ILSVRC", "seed": 0, "holdout": 10_240}
        made = manifest(name, {wnid: per_class + (i < more) for i, wnid in enumerate(ALL)}, made=split)
        write_manifest(replace(made, root=root))
        (root / made.shards[0].name).touch()
        (root / index_name(made.shards[0].name)).touch()
    return Recipe(data=Data(shards=str(shards), eval_sets=("holdout",))).resolved()


@pytest.mark.parametrize(
    ("images", "flags", "outcome"),
    [
        ({"train": 1_270_927, "holdout": 10_240}, {}, "Trains on 1,270,927 images; 10,240 are held out (holdout)."),
        ({"train": 1_281_167}, {}, UserError("There is no held-out set at .*1,270,927.*has 1,281,167.*--without-hold")),
        ({"train": 1_281_167, "holdout": 10_240}, {}, UserError("1,281,167 images to train on instead of 1,270,927")),
        ({"train": 1_276_167, "holdout": 5_000}, {}, UserError("1,276,167 .* and 5,000 images held out instead")),
        ({"train": 1_276_167, "holdout": 5_000}, {"allow_count_mismatch": True}, "Trains on 1,276,167 images; 5,000"),
        ({"train": 1_281_167}, {"without": True}, "Trains on 1,281,167 images; none are held out."),
        ({"train": 1_270_927, "holdout": 10_240}, {"without": True}, UserError("--without-holdout would do nothing")),
        (
            {"train": 1_270_927, "holdout": 50_000},
            {},
            UserError("The set holdout chooses a model on holdout .*ImageNet's"),
        ),
        ({"train": 10_240, "holdout": 10_240}, {}, UserError("have the same images: none is held out")),
        ({"train": 1_270_927, "holdout": 10_240}, {"sets": ("holdout",)}, UserError("is one of the --sets")),
        ({"train": 1_270_927, "holdout": 10_240}, {"select_on_test_set": True}, UserError("would do nothing")),
    ],
)
def test_reproduction_trains_on_the_images_that_are_not_held_out(tmp_path, images, flags, outcome):
    recipe = put_sets(tmp_path, **images)
    given = {**NO_FLAGS, "sets": (), **flags}
    sets = given.pop("sets")
    if isinstance(outcome, UserError):
        with pytest.raises(UserError, match=str(outcome)):
            holdout.check_holdout(recipe, sets, **given)
    else:
        assert holdout.check_holdout(recipe, sets, **given).startswith(outcome)


def put_samples(root: Path, names: list[str], pixels: list[int], **made) -> None:
    """A set of one class, of images with these names and CRCs."""
    root.mkdir(parents=True)
    n = len(names)
    index = Index(
        keys=np.array(names, np.bytes_),
        labels=np.zeros(n, np.int32),
        first=np.arange(n + 1),
        extensions=("jpg",),
        extension=np.zeros(n, np.uint8),
        offset=np.arange(n) * 1024,
        size=np.full(n, 100),
        crc32=np.array(pixels, np.uint32),
        about={},
    )
    write_index(root / index_name("a.tar"), index)
    sha256 = hashlib.sha256((root / index_name("a.tar")).read_bytes()).hexdigest()
    (root / "a.tar").touch()
    shard = Shard("a.tar", n, 0, root.name, sha256)
    write_manifest(Manifest(root, root.name, "original", (("n00000001", "a"),), (n,), (shard,), made=made))


def test_held_out_images_that_are_trained_on_are_refused(tmp_path, capsys):
    def check(holdout_made: dict, train_made: dict, folder: str, shared: list[int]) -> str:
        shards = tmp_path / folder
        put_samples(shards / "train", ["1", "2", "3"], [11, 12, 13], **train_made)
        put_samples(shards / "holdout", ["2", "3", "4"], shared, **holdout_made)
        return holdout.check_holdout(Recipe(data=Data(shards=str(shards))).resolved(), (), **NO_FLAGS)

    seeds = [{"source": "x", "seed": seed, "holdout": 3} for seed in (0, 1)]
    with pytest.raises(
        UserError, match="1 of the 3 images of .*holdout are in .*train as well, for example 3.*another seed"
    ):
        check(seeds[1], seeds[0], "other-seed", [112, 13, 14])
    with pytest.raises(UserError, match="2 of the 3 images"):
        check({}, {}, "indexed", [12, 13, 14])
    assert check({}, {}, "same-names", [112, 113, 14]).startswith("Trains on 3 images; 3 are held out")
    assert check(seeds[0], seeds[0], "one-conversion", [112, 113, 14])
    recipe = Recipe(data=Data(shards=str(tmp_path / "indexed"), eval_sets=("holdout",))).resolved()
    assert not check_best_on(recipe, allowed=False)
    assert "warning: --best-on holdout: 2 of the 3 images" in capsys.readouterr().err


def test_no_held_out_set_is_needed_without_training(tmp_path):
    recipe = Recipe(data=Data(shards=str(tmp_path))).resolved()
    assert holdout.check_holdout(recipe, ("val",), **{**NO_FLAGS, "trains": False}) == "Nothing is trained."


def test_damaged_holdout_is_not_reported_as_missing(tmp_path):
    recipe = put_sets(tmp_path, train=1_270_927, holdout=10_240)
    (tmp_path / "holdout/manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json cannot be read as a manifest"):
        holdout.check_holdout(recipe, (), **NO_FLAGS)


# --- the authors' numbers ---------------------------------------------------------------------------------------------


def test_the_distillation_of_logits_has_the_authors_weights():
    for preset in ("kd-clean", "kd-masked"):
        assert PRESETS[preset].resolved().method.gamma == 30.0, "their --w_distill"
    wise_kd = replace(PRESETS["wise-kd"], method=replace(PRESETS["wise-kd"].method, ensemble="file"))
    assert wise_kd.resolved().method.gamma == 1.0, "appendix A.3"


def test_recipe_of_an_earlier_version_keeps_its_weight_and_is_no_row_of_the_paper():
    text = PRESETS["kd-clean"].resolved().to_json().replace('"gamma": 30.0', '"gamma": 1.0')
    recipe = Recipe.from_json(text)
    assert recipe.method.gamma == recipe.resolved().method.gamma == 1.0
    assert preset_of(recipe) is None and preset_of(PRESETS["kd-clean"].resolved()) == "kd-clean"


def test_released_code_is_complete_for_every_method():
    base = PRESETS["released-code"]
    for name in ("feature-distillation", "linear-probe", "vanilla", "kd"):
        recipe = replace(base, method=replace(base.method, name=name)).resolved()
        assert (recipe.run.precision, recipe.optim.schedule, recipe.optim.lr) == ("fp32", "one-cycle", 3e-5)
    assert base.resolved().method == PRESETS["object-mask-single-fill"].resolved().method
    assert Recipe(method=Method(name="linear-probe")).resolved().optim.lr == 1e-3, "without the preset"
