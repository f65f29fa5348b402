"""The evaluation worker: its counts equal those of a plain loop, on any number of ranks and after any interruption."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import made
import tools.evaluate
from cfmask.counting import Counts, Score, calibration_error
from cfmask.data import benchmarks, imagenet
from cfmask.data.label_space import LabelSpace, label_space_of
from cfmask.data.shards import Manifest, load_manifest
from cfmask.data.stream import eval_batches
from cfmask.errors import UserError
from cfmask.evaluation import counter
from cfmask.evaluation.checks import check_set
from cfmask.evaluation.soup import average, greedy_soup
from cfmask.evaluation.worker import run_evaluation
from cfmask.evaluation_spec import KINDS, Evaluation, UniformSoup, WiseFT
from cfmask.models.head import ModelInfo, load_model, read_info, save_model
from cfmask.models.tower import Classifier, Normalise
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.jsonl import read_lines
from cfmask.session import FINISHED, QUIT, REQUEUE
from towers import B32, TINY


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """root/shards with train and val (96 each), and models a, b, c: random weights, each perturbed."""
    root = made.make_materials(tmp_path_factory.mktemp("evaluated"))
    torch.manual_seed(0)
    for name in "abc":
        made.save_moved_model(root / "tiny.safetensors", root / f"{name}.safetensors", 0.05)
    return root


def evaluation(root: Path, **given) -> Evaluation:
    models = tuple(str(root / f"{name}.safetensors") for name in given.pop("models", "abc"))
    defaults = {"models": models, "shards": str(root / "shards"), "sets": ("val",), "batch_size": 7}
    return KINDS[given.pop("make", "nothing")](**{**defaults, "loader_workers": 0, **given}).checked()


def evaluate(what: Evaluation, folder: Path, stop=lambda: None) -> dict | str:
    """results.json, or the stop request that ended the evaluation."""
    run = RunFolder(folder)
    run.claim(what)
    outcome = run_evaluation(what, run, DistributedContext(), stop)
    return json.loads(run.results.read_text()) if outcome == FINISHED else outcome


def plain(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, C) and labels of all of val, in one loop."""
    model, info = load_model(root / f"{name}.safetensors")
    return logits_of(model, info, root / "shards/val")


def logits_of(model: Classifier, info: ModelInfo, shards: Path) -> tuple[torch.Tensor, torch.Tensor]:
    normalise = Normalise(info.mean, info.std)
    manifest = load_manifest(shards)
    batches = eval_batches(manifest, image_size=model.image_size, batch_size=7, rank=0, world_size=1, loader_workers=0)
    with torch.no_grad():
        pairs = [(model(normalise(b.images))[1], b.labels) for b in batches]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


# --- what is counted ------------------------------------------------------------------------------------------------


def test_counts_are_those_of_a_plain_loop(materials, tmp_path):
    found = evaluate(evaluation(materials), tmp_path / "out")
    assert found["sets"] == {"val": {"samples": 96, "classes": 3}}
    for name, row in zip("abc", found["models"], strict=True):
        logits, labels = plain(materials, name)
        score = row["sets"]["val"]
        right = logits.argmax(1) == labels
        assert (score["correct"], score["total"]) == (right.sum(), 96)
        classes = [wnid for wnid, _ in load_manifest(materials / "shards/val").classes]
        for i, wnid in enumerate(classes):
            assert score["per_class"][wnid] == [right[labels == i].sum(), (labels == i).sum()]
        # The calibration error as it is defined, sample by sample
        confidence = logits.double().softmax(1).max(1).values
        error = 0.0
        for k in range(15):
            here = (confidence * 15).long().clamp(max=14) == k
            if here.any():
                error += here.sum() / 96 * abs(right[here].double().mean() - confidence[here].mean())
        assert score["ece"] == pytest.approx(float(error), abs=1e-6)
        low, high = score["interval"]
        assert 0 <= low < score["top1"] < high <= 100


@given(st.integers(1, 2000), st.floats(0, 1))
def test_the_interval_is_wilsons(total, share):
    """The two p for which the observed share is 1.96 standard errors away: (p̂ - p)² = z² p (1-p) / n."""
    correct = round(share * total)
    low, high = (x / 100 for x in Score(correct, total).interval)
    observed = correct / total
    for p in (low, high):
        assert (observed - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / total, abs=1e-9)
    assert low <= observed + 1e-12 and observed <= high + 1e-12


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_counts_do_not_depend_on_the_partition(data):
    n, classes = data.draw(st.integers(1, 30)), data.draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = 5 * torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    label_space = LabelSpace(torch.arange(classes))
    whole, parts = Counts(1, classes, torch.device("cpu")), Counts(1, classes, torch.device("cpu"))
    whole.add(0, logits, labels, label_space)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    for low, high in reversed(list(zip(cuts, cuts[1:], strict=False))):
        part = Counts(1, classes, torch.device("cpu"))
        part.add(0, logits[low:high], labels[low:high], label_space)
        parts.take(part)
    for one, other in zip(whole.tensors().values(), parts.tensors().values(), strict=True):
        assert torch.equal(one, other)
    assert calibration_error(whole.result(0, list("abcdef"[:classes]))["calibration"]) <= 1


# --- which predictions are right --------------------------------------------------------------------------------------


def imagenet_set(split: str, counts: dict[str, int], **more) -> Manifest:
    per_class = tuple(counts.get(wnid, 0) for wnid in imagenet.wnids())
    return Manifest("x", split, "original", imagenet.classes(), per_class, (), **more)


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a"])
def test_predictions_on_subsets_are_among_their_200_classes(name):
    wnids = benchmarks.wnids(name)
    label_space = label_space_of(imagenet_set(name, dict.fromkeys(wnids, 1)))
    assert [imagenet.wnids()[i] for i in label_space.ids] == list(wnids) and label_space.right is None
    outside = next(i for i, wnid in enumerate(imagenet.wnids()) if wnid not in wnids)
    logits = torch.zeros(1, 1000)
    logits[0, outside], logits[0, label_space.ids[3]] = 9.0, 1.0
    counts = Counts(1, 1000, torch.device("cpu"))
    counts.add(0, logits, label_space.ids[3:4], label_space)
    assert counts.scores() == [Score(1, 1)]


def test_predictions_on_objectnet_are_among_its_ids_and_each_of_an_images_ids_is_right():
    wnids = imagenet.wnids()
    manifest = imagenet_set("objectnet", {wnids[3]: 2, wnids[8]: 1}, accepted={3: (3, 5)})
    label_space = label_space_of(manifest)
    assert label_space.ids.tolist() == [3, 5, 8]
    logits = torch.zeros(4, 1000)
    logits[:, 700] = 9.0  # not one of ObjectNet's
    for row, answer in enumerate((3, 5, 8, 5)):
        logits[row, answer] = 1.0
    counts = Counts(1, 1000, torch.device("cpu"))
    counts.add(0, logits, torch.tensor([3, 3, 3, 8]), label_space)
    assert counts.per_class[0, [3, 8]].tolist() == [[3, 2], [1, 0]]


@pytest.mark.parametrize("name", ["imagenet-v2", "imagenet-r", "imagenet-sketch", "imagenet-a", "objectnet", "val"])
def test_incomplete_copy_of_a_known_set_is_refused(name):
    whole = benchmarks.BENCHMARKS[name]
    wnids = benchmarks.wnids(name)[: whole.classes]
    counts = dict.fromkeys(wnids, whole.images // len(wnids))
    counts[wnids[0]] += whole.images - sum(counts.values())
    ids = [imagenet.wnids().index(wnid) for wnid in wnids]
    unused = [i for i in range(1000) if i not in ids]
    more = whole.class_ids - whole.classes
    accepted = {ids[k]: (ids[k], unused[k]) for k in range(more)}
    check_set(imagenet_set(name, counts, accepted=accepted))
    counts[wnids[1]] += 1
    short = imagenet_set(name, counts, accepted=accepted)
    with pytest.raises(UserError, match="is not a complete copy.*images instead of"):
        check_set(short)
    check_set(short, allow_count_mismatch=True)
    if name in ("imagenet-r", "imagenet-a"):
        counts[wnids[1]] -= 1
        foreign = next(wnid for wnid in imagenet.wnids() if wnid not in wnids)
        counts[foreign] = counts.pop(wnids[0])
        with pytest.raises(UserError, match=f"classes that are not its, such as {foreign}"):
            check_set(imagenet_set(name, counts, accepted=accepted))


# --- ranks and interruptions ------------------------------------------------------------------------------------------

RANK = """
import sys
from pathlib import Path
import torch
from cfmask.runtime.distributed import DistributedContext
from cfmask.evaluation.worker import run_evaluation
from cfmask.runs import RunFolder
torch.set_num_threads(1)
rank, world, folder, attempt, stop = sys.argv[1:]
run = RunFolder(Path(folder))
asked = iter(range(10**6))
context = DistributedContext(rank=int(rank), world_size=int(world), local_rank=int(rank), attempt=attempt)
ends = lambda: "requeue" if rank == stop.split(":")[0] and next(asked) == int(stop.split(":")[1]) else None
print(run_evaluation(run.work(), run, context, ends if stop else lambda: None))
"""


def on_ranks(folder: Path, world: int, attempt: str, stop: str = "") -> list[str]:
    """The result of each of ``world`` processes. stop: "RANK:BATCH" at which a requeue is requested."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANK), str(rank), str(world), str(folder), attempt, stop],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=made.REPO,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world)
    ]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), said
    return [out.strip().splitlines()[-1] for out, _ in said]


def test_results_do_not_depend_on_the_number_of_ranks_also_after_a_stop(materials, tmp_path):
    what = evaluation(materials, sets=("val", "train"))
    alone = evaluate(what, tmp_path / "alone")
    for folder in ("three", "stopped"):
        RunFolder(tmp_path / folder).claim(what)
    assert on_ranks(tmp_path / "three", 3, "a") == [FINISHED] * 3
    assert json.loads((tmp_path / "three/results.json").read_text()) == alone
    assert on_ranks(tmp_path / "stopped", 2, "a", stop="1:2") == [REQUEUE] * 2, "a request to one rank stops all ranks"
    assert not (tmp_path / "stopped/results.json").exists()
    assert evaluate(what, tmp_path / "stopped") == alone
    second = read_lines(tmp_path / "stopped/attempts.jsonl")[1]
    assert second["from_step"] > 0 and second["world_size"] == 1 and "stopped after" in second["why_last_ended"]


@pytest.fixture(scope="module")
def soup(materials, tmp_path_factory):
    """An evaluation of four passes of four batches, and its results without an interruption."""
    what = evaluation(materials, make="greedy-soup", sets=("val",), holdout="train", batch_size=25)
    return what, evaluate(what, tmp_path_factory.mktemp("soup") / "alone")


@pytest.mark.parametrize("at", [0, 2, 3, 7, 13])
def test_evaluation_stopped_at_any_batch_resumes_after_it(soup, tmp_path, at, monkeypatch):
    what, alone = soup
    asked = iter(range(10**6))
    assert evaluate(what, tmp_path / "out", lambda: QUIT if next(asked) >= at else None) == QUIT
    read = []
    real = counter.eval_batches
    monkeypatch.setattr(counter, "eval_batches", lambda *a, **k: read.append(k["start"]) or real(*a, **k))
    assert evaluate(what, tmp_path / "out") == alone
    first, second = read_lines(tmp_path / "out/attempts.jsonl")
    assert first["from_step"] == 0 and second["from_step"] > 0
    assert read[0] > 0 or len(read) < 4, "counted batches are not read again"
    assert not (tmp_path / "out/progress.safetensors").exists()


def test_killed_evaluation_resumes_from_saved_counts(materials, tmp_path, monkeypatch):
    monkeypatch.setattr(counter, "KEEP_S", 0.0)
    what = evaluation(materials)
    alone = evaluate(what, tmp_path / "alone")
    calls = iter(range(10**6))

    def die():
        if next(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(what, tmp_path / "out", die)
    assert evaluate(what, tmp_path / "out") == alone
    assert read_lines(tmp_path / "out/attempts.jsonl")[1]["from_step"] >= 14


def test_changed_model_is_counted_again(materials, tmp_path, capsys):
    moved = tmp_path / "model.safetensors"
    moved.write_bytes((materials / "a.safetensors").read_bytes())
    what = replace(evaluation(materials), models=(str(moved),))
    asked = iter(range(100))
    assert evaluate(what, tmp_path / "out", lambda: QUIT if next(asked) == 2 else None) == QUIT
    moved.write_bytes((materials / "b.safetensors").read_bytes())
    [row] = evaluate(what, tmp_path / "out")["models"]
    logits, labels = plain(materials, "b")
    assert row["sets"]["val"]["correct"] == (logits.argmax(1) == labels).sum() and row["sets"]["val"]["total"] == 96
    assert "counting starts again" in capsys.readouterr().out


def test_unreadable_model_counts_as_unchanged(materials, tmp_path, monkeypatch, capsys):
    what = evaluation(materials)
    alone = evaluate(what, tmp_path / "alone")
    asked = iter(range(100))
    assert evaluate(what, tmp_path / "out", lambda: QUIT if next(asked) == 3 else None) == QUIT
    kept = (tmp_path / "out/progress.safetensors").read_bytes()
    real, calls = os.stat, 0

    def failing(path, *rest, **more):
        nonlocal calls
        if str(path) == what.models[0]:
            calls += 1
            if calls <= times:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *rest, **more)

    times = 10**6
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        patch.setenv("CFMASK_READ_PATIENCE", "0.1")
        with pytest.raises(UserError, match="cannot be read .Input/output error"):
            evaluate(what, tmp_path / "out")
    assert (tmp_path / "out/progress.safetensors").read_bytes() == kept
    times = calls + 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        assert evaluate(what, tmp_path / "out") == alone
    assert calls > times and "counting starts again" not in capsys.readouterr().out


def test_a_log_on_a_full_disk_does_not_end_an_evaluation(materials, tmp_path, monkeypatch, capsys):
    def full(path, lines):
        if path.name == "log.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(counter, "LOG_S", 0.0)
    alone = evaluate(evaluation(materials), tmp_path / "alone")
    monkeypatch.setattr("cfmask.runtime.jsonl.append_lines", full)
    assert evaluate(evaluation(materials), tmp_path / "out") == alone
    log = tmp_path / "out/log.jsonl"
    assert f"{log} cannot be written (No space left on device)" in capsys.readouterr().err and not log.exists()


@pytest.mark.parametrize("tool", ["submit", "evaluate"])
def test_files_of_an_evaluation_killed_at_its_end_are_removed_by_the_next_command(
    materials, tmp_path, monkeypatch, tool
):
    def killed(run):
        assert run.results.exists() and run.progress.exists()
        raise KeyboardInterrupt

    out, what = tmp_path / "out", evaluation(materials)
    flags = [*what.models, "--shards", what.shards, "--sets", "val", "--batch-size", 7, "--loader-workers", 0]
    command = list(map(str, [*flags, "--out", out]))
    monkeypatch.setattr(counter, "KEEP_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "remove_progress", killed)
        assert tools.evaluate.main(command) == 130
    if tool == "evaluate":
        assert tools.evaluate.main(command) == 0
    else:
        made.submit("--resume", out, "--executor", "local")
    assert not list(out.glob("*.safetensors")) and not list(out.glob(".*.part"))


# --- models that are made -------------------------------------------------------------------------------------------


def mixed(zero: dict, fine: dict, alpha: float) -> dict:
    return {name: (1 - alpha) * zero[name] + alpha * fine[name] for name in zero}


def test_a_sweep_of_alphas_evaluates_and_saves_the_weights_that_interpolation_gives(materials, tmp_path):
    alphas = (0.0, 0.3, 1.0)
    what = evaluation(materials, make="wise-ft", models="ab", alphas=alphas, holdout="train")
    found = evaluate(what, tmp_path / "out")
    zero, fine = (load_model(materials / f"{n}.safetensors")[0].state_dict() for n in "ab")
    best = max(range(3), key=lambda i: found["holdout"][i])
    assert (found["chosen"], found["chosen_on"]) == (best, "train")
    saved = load_model(tmp_path / "out/model.safetensors")[0].state_dict()
    expected = mixed(zero, fine, alphas[best])
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    model, info = load_model(materials / "a.safetensors")
    for alpha, row in zip(alphas, found["models"], strict=True):
        model.load_state_dict(mixed(zero, fine, alpha))
        logits, labels = logits_of(model, info, materials / "shards/val")
        assert row["alpha"] == alpha and row["sets"]["val"]["correct"] == (logits.argmax(1) == labels).sum()
    ends = [found["models"][i]["sets"] for i in (0, 2)]
    alone = evaluate(evaluation(materials, models="ab"), tmp_path / "ends")
    assert ends == [row["sets"] for row in alone["models"]]


def test_a_single_alpha_is_saved_without_any_set(materials, tmp_path):
    found = evaluate(
        evaluation(materials, make="wise-ft", models="ab", alphas=(0.5,), sets=(), shards=""), tmp_path / "out"
    )
    assert found["chosen"] == 0 and found["models"] == [{"name": "α = 0.5", "alpha": 0.5, "sets": {}}]
    assert "α = 0.5" in read_info(tmp_path / "out/model.safetensors").provenance


def test_uniform_soup_is_the_mean_and_greedy_soup_follows_the_paper(materials, tmp_path):
    states = [load_model(materials / f"{n}.safetensors")[0].state_dict() for n in "abc"]
    found = evaluate(evaluation(materials, make="uniform-soup"), tmp_path / "uniform")
    saved = load_model(tmp_path / "uniform/model.safetensors")[0].state_dict()
    for name in saved:
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(saved[name], mean.float(), rtol=0, atol=1e-7)
    assert len(found["ingredients"]) == 3 and found["models"][0]["name"] == "uniform-soup"

    found = evaluate(evaluation(materials, make="greedy-soup", holdout="train"), tmp_path / "greedy")

    def right(state):
        model, info = load_model(materials / "a.safetensors")
        model.load_state_dict(state)
        logits, labels = logits_of(model, info, materials / "shards/train")
        return int((logits.argmax(1) == labels).sum())

    # The algorithm as the paper has it, beside it
    accuracy = {n: right(state) for n, state in zip("abc", states, strict=True)}
    order = sorted("abc", key=lambda n: -accuracy[n])
    kept = [order[0]]
    best = accuracy[order[0]]
    for name in order[1:]:
        tried = right(average([states["abc".index(n)] for n in [*kept, name]]))
        if tried >= best:
            kept, best = [*kept, name], tried
    assert [Path(path).stem for path in found["ingredients"]] == kept
    saved = load_model(tmp_path / "greedy/model.safetensors")[0].state_dict()
    expected = average([states["abc".index(n)] for n in kept])
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.randoms())
def test_greedy_soup_begins_with_the_best_model_and_never_gets_worse(accuracies, random):
    scores: dict[tuple, int] = {}

    def score(numbers):
        return scores.setdefault(tuple(numbers), random.randint(0, 25))

    chosen = greedy_soup(accuracies, score)
    assert chosen[0] == accuracies.index(max(accuracies))
    path = [accuracies[chosen[0]], *(scores[tuple(chosen[: i + 1])] for i in range(1, len(chosen)))]
    assert path == sorted(path) and len(set(chosen)) == len(chosen)
    assert len(scores) == len(accuracies) - 1, "each of the others is tried once"


def test_a_zero_shot_model_is_made_once_and_evaluated(materials, tmp_path):
    from towers import tiny_clip

    clip = tiny_clip()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    config = tmp_path / "clip.json"
    config.write_text(TINY.config())
    what = evaluation(
        materials, make="zero-shot", models="", architecture=str(config), pretrained=str(tmp_path / "clip.pt")
    )
    found = evaluate(what, tmp_path / "out")
    assert found["models"][0]["name"] == "zero-shot" and found["models"][0]["sets"]["val"]["total"] == 96
    info = read_info(tmp_path / "out/model.safetensors")
    assert info.classes == tuple(made.CLASSES) and "80 templates" in info.provenance


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"sets": ()}, "Nothing to do"),
        ({"models": ""}, "Nothing to do"),
        ({"make": "wise-ft", "models": "ab"}, "--alphas is missing"),
        ({"make": "wise-ft", "models": "ab", "alphas": (1.5,)}, "must lie in 0…1"),
        ({"make": "greedy-soup"}, "name it with --holdout"),
        ({"make": "greedy-soup", "holdout": "val"}, "cannot test it as well"),
        ({"sets": ("val", "val")}, "names one of them twice"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_contradictory_evaluation_is_refused(materials, given, reason):
    with pytest.raises(UserError, match=reason):
        evaluation(materials, **given)


# One flat object for every kind, as earlier versions wrote it: their folders must resume, and its digest names them.
WRITTEN = """{
  "make": "wise-ft",
  "models": [
    "/runs/zero/model.safetensors",
    "/runs/fine/model.safetensors"
  ],
  "alphas": [
    0.0,
    0.5
  ],
  "architecture": "",
  "pretrained": "",
  "mean": null,
  "std": null,
  "shards": "/shards",
  "sets": [
    "imagenet-r"
  ],
  "holdout": "holdout",
  "batch_size": 256,
  "precision": "bf16",
  "loader_workers": null,
  "allow_count_mismatch": false
}"""


def test_an_evaluation_json_of_earlier_versions_is_read_and_written_byte_for_byte(tmp_path):
    found = Evaluation.from_json(WRITTEN)
    assert isinstance(found, WiseFT) and (found.alphas, found.chooses_on) == ((0.0, 0.5), "holdout")
    assert found.to_json() == WRITTEN and found.digest() == "cb03521d"
    (tmp_path / "evaluation.json").write_text(WRITTEN)
    assert RunFolder(tmp_path).work() == found
    RunFolder(tmp_path).claim(found.checked())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_evaluation_is_read_as_it_was_written(kind):
    every = {"models": ("/a", "/b"), "shards": "/s", "sets": ("val",), "precision": "tf32", "loader_workers": 3}
    own = {"alphas": (0.0, 1.0), "holdout": "h", "architecture": "ViT-B-16", "pretrained": "openai", "mean": (0.5,) * 3}
    names = {field.name for field in fields(kind)}
    what = kind(**every, **{name: value for name, value in own.items() if name in names})
    assert Evaluation.from_json(what.to_json()) == what
    assert json.loads(what.to_json()).keys() == json.loads(WRITTEN).keys()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"make": "mixture"}', "unknown “make” 'mixture'; choose from nothing, zero-shot"),
        ('{"make": "nothing", "alphas": [0.5]}', "“alphas” has no meaning where “make” is 'nothing'"),
        ('{"make": "uniform-soup", "holdout": "val"}', "“holdout” has no meaning"),
        ('{"make": {}}', "not an evaluation as cfmask writes it"),
        ('{"colour": 1}', "not an evaluation as cfmask writes it"),
        ("[]", "not an evaluation as cfmask writes it"),
    ],
)
def test_an_evaluation_json_that_contradicts_itself_is_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        Evaluation.from_json(text)


def test_a_folder_belongs_to_one_kind_of_evaluation(tmp_path):
    what = WiseFT(models=("/a", "/b"), alphas=(0.5,))
    RunFolder(tmp_path).claim(what)
    with pytest.raises(UserError, match="belongs to another evaluation: make: wise-ft → uniform-soup; alphas: "):
        RunFolder(tmp_path).claim(what.as_kind(UniformSoup))


def test_models_that_do_not_fit_together_are_refused_with_the_reason(materials, tmp_path):
    tiny = materials / "a.safetensors"
    model, info = load_model(tiny)
    others = {
        "order": replace(info, classes=info.classes[::-1]),
        "mean": replace(info, mean=(0.1, 0.2, 0.3)),
    }
    for name, changed in others.items():
        save_model(tmp_path / f"{name}.safetensors", model, changed)
    made.save_tiny_model(tmp_path / "size.safetensors", B32)

    def refused(make: str, other: str, **more) -> str:
        models = (str(tiny), str(tmp_path / f"{other}.safetensors"))
        what = replace(evaluation(materials, make=make, **more), models=models)
        with pytest.raises(UserError) as caught:
            evaluate(what, tmp_path / f"{make}-{other}")
        return str(caught.value)

    assert "differ in classes" in refused("nothing", "order")
    assert "two commands" in refused("nothing", "size")
    makes: list[tuple[str, dict]]
    makes = [("wise-ft", {"alphas": (0.5,)}), ("uniform-soup", {}), ("greedy-soup", {"holdout": "train"})]
    for make, more in makes:
        assert "another class order" in refused(make, "order", **more)
        assert "must have the same preprocessing" in refused(make, "mean", **more)
        assert "differ in" in refused(make, "size", **more)


def test_a_set_with_another_class_order_than_the_models_is_refused(materials, tmp_path):
    model, info = load_model(materials / "a.safetensors")
    save_model(tmp_path / "turned.safetensors", model, replace(info, classes=info.classes[::-1]))
    what = replace(evaluation(materials), models=(str(tmp_path / "turned.safetensors"),))
    with pytest.raises(UserError, match="labels and predictions would not mean the same"):
        evaluate(what, tmp_path / "out")


def test_weights_that_are_not_finite_are_named(materials, tmp_path):
    model, info = load_model(materials / "a.safetensors")
    with torch.no_grad():
        model.head.weight[0, 0] = np.nan
    save_model(tmp_path / "broken.safetensors", model, info)
    what = replace(evaluation(materials), models=(str(tmp_path / "broken.safetensors"),))
    with pytest.raises(UserError, match=r"broken.safetensors gives logits that are not finite for 96 of 96"):
        evaluate(what, tmp_path / "out")
