"""launch/reproduce.py: the graph of jobs, its cost, which jobs are submitted, and the table."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import made
from browser import CHROMIUM, assert_fits_and_prints
from cfmask.data.shard_index import index_name
from cfmask.data.shards import load_manifest, write_manifest
from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from cfmask.presets import PRESETS
from cfmask.recipe import Model, Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from html_check import checked
from launch import reproduce
from launch.allocation.cluster_file import ClusterFile
from launch.allocation.resolve import resolve_allocation
from launch.paper import cost, execution, progress
from launch.paper.estimate import estimate, measured
from launch.paper.plan import (
    DONE,
    HEADLINE,
    LABELS,
    MASKED,
    MISSING,
    QUEUED,
    WAITING,
    PaperRow,
    PlanNode,
    ReproductionPlan,
    Setup,
    arrays,
    awaited,
    choose_rows,
    paper_plan,
    still_needed,
    to_submit,
    with_needed,
)
from launch.paper.progress import node_state, read_statuses
from launch.paper.reproduction import Reproduction
from launch.paper.table import published_rows
from launch.slurm.queue import SlurmJob
from launch.state.status import Status
from launch.submission import training
from launch.submit import main as submit_main
from launch.submit import parser as submit_parser
from slurm_fixture import Cluster, wait_until

STATES = (DONE, QUEUED, WAITING, MISSING)
IMAGENET = {"train": 1_281_167, "val": 50_000, "imagenet-v2": 10_000, "imagenet-r": 30_000}
IMAGENET |= {"imagenet-sketch": 50_889, "objectnet": 18_574, "imagenet-a": 7_500}

# --- the graph --------------------------------------------------------------------------------------------------------


@st.composite
def plans(draw) -> tuple[ReproductionPlan, dict[str, str]]:
    """Any graph without cycles, and any states."""
    names = draw(st.permutations([f"n{i}" for i in range(draw(st.integers(1, 12)))]))
    nodes = []
    for i, name in enumerate(names):
        after = draw(st.lists(st.sampled_from(names[:i]), unique=True, max_size=3)) if i else []
        nodes.append(PlanNode(name, None, Recipe(), tuple(after)))
    rows = draw(st.lists(st.lists(st.sampled_from(names), min_size=1, unique=True), min_size=1, max_size=4))
    plan = ReproductionPlan({node.name: node for node in nodes}, tuple(PaperRow("ft", tuple(found)) for found in rows))
    return plan, {name: draw(st.sampled_from(STATES)) for name in names}


def is_needed(plan: ReproductionPlan, states: dict[str, str], name: str) -> bool:
    """A row needs the node, or a node that is needed and not done reads its model."""
    if name in plan.wanted:
        return True
    return any(
        name in other.after and states[other.name] != DONE and is_needed(plan, states, other.name)
        for other in plan.nodes.values()
    )


@given(plans())
def test_nodes_come_after_the_nodes_whose_models_they_read(drawn):
    plan, _ = drawn
    place = {name: i for i, name in enumerate(plan.nodes)}
    assert all(place[before] < place[node.name] for node in plan.nodes.values() for before in node.after)
    for name in plan.nodes:
        needed = with_needed(plan.nodes, [name])
        assert name in needed and all(set(plan.nodes[each].after) <= needed for each in needed)


@settings(max_examples=300)
@given(plans())
def test_exactly_the_missing_nodes_are_submitted(drawn):
    plan, states = drawn
    left = [node.name for node in still_needed(plan, states)]
    assert left == [n for n in plan.nodes if states[n] != DONE and is_needed(plan, states, n)], "in order, once each"
    chosen = [node.name for node in to_submit(plan, states)]
    for name in left:
        missing = states[name] == MISSING
        waits_for_missing = states[name] == WAITING and any(each in chosen for each in plan.nodes[name].after)
        assert (name in chosen) == (missing or waits_for_missing)
    assert set(chosen) <= set(left)
    for i, name in enumerate(chosen):
        for before in plan.nodes[name].after:
            assert states[before] in (DONE, QUEUED, WAITING) or before in chosen[:i], (
                "the nodes that it waits for have jobs"
            )


@given(plans())
def test_nothing_is_submitted_twice_or_after_all_is_done(drawn):
    plan, states = drawn
    after = states | {node.name: QUEUED for node in to_submit(plan, states)}
    assert to_submit(plan, after) == []
    assert still_needed(plan, dict.fromkeys(states, DONE)) == []


@given(plans())
def test_members_of_an_array_wait_for_the_same_jobs_and_come_after_them(drawn):
    plan, states = drawn
    chosen = to_submit(plan, states)
    groups = arrays(chosen, states)
    assert sorted(node.name for group in groups for node in group) == sorted(node.name for node in chosen)
    submitted: set[str] = set()
    for group in groups:
        [waits] = {frozenset(awaited(node, states)) for node in group}
        assert waits == {name for name in group[0].after if states[name] != DONE}
        assert all(states[name] in (QUEUED, WAITING) or name in submitted for name in waits), "it has a job to wait for"
        assert len({type(node.work) for node in group}) == 1, "their allocations differ"
        submitted |= {node.name for node in group}
    keys = [(type(group[0].work), frozenset(awaited(group[0], states))) for group in groups]
    assert len(set(keys)) == len(keys), "nodes that can form an array do"


def test_the_arrays_of_the_paper():
    nodes = paper_plan(choose_rows(None, setup()), setup()).nodes
    sizes = {group[0].kind: len(group) for group in arrays(nodes.values(), dict.fromkeys(nodes, MISSING))}
    many = {kind: size for kind, size in sizes.items() if size > 1}
    assert many == {"ft": 3 * (1 + 1 + 9), f"soup-of-0-1-2-{HEADLINE}": 3}, (
        "trainings from zero-shot, and from the soup"
    )


# --- the paper's rows -------------------------------------------------------------------------------------------------


def setup(seeds: tuple[int, ...] = (0, 1, 2), soup: Path | None = None) -> Setup:
    def recipe_of(preset: str, seed: int, start: Path, ensemble: Path | None) -> Recipe:
        recipe = PRESETS[preset]
        method = dataclasses.replace(recipe.method, ensemble=str(ensemble) if ensemble else None)
        model = dataclasses.replace(recipe.model, pretrained=str(start))
        run = dataclasses.replace(recipe.run, seed=seed)
        return dataclasses.replace(recipe, model=model, method=method, run=run).resolved()

    sets = tuple(name for name in IMAGENET if name != "train")
    return Setup(Path("/out"), recipe_of, Evaluation(shards="/s", sets=sets), Model("M", "openai"), seeds, soup)


def test_all_rows_of_the_paper_from_one_start():
    s = setup()
    rows = choose_rows(None, s)
    assert list(rows) == list(LABELS) and len(rows) == 16
    plan = paper_plan(rows, s)
    assert len(plan.nodes) == 83
    trained = {name: node for name, node in plan.nodes.items() if isinstance(node.work, Recipe)}
    # FT, FT + FD, nine masks, WiSE-KD, the method from the soup
    assert len(trained) == 3 * (1 + 1 + 9 + 1 + 1)
    for name, node in trained.items():
        start = "soup-of-0-1-2" if name.startswith("soup") else "zero-shot"
        assert node.work.model.pretrained == f"/out/{start}/model.safetensors" and start in node.after
        assert node.work.run.seed == node.seed and name.endswith(f"-s{node.seed}")
        evaluated = plan.nodes[f"{node.kind}-eval-s{node.seed}"]
        assert evaluated.work.models == (f"/out/{name}/model.safetensors",) and evaluated.after == (name,)
    assert plan.nodes["wise-kd-s1"].work.method.ensemble == "/out/wise-ft-s1/model.safetensors"
    assert plan.nodes["wise-kd-s1"].after == ("zero-shot", "wise-ft-s1")
    mixed = plan.nodes["wise-ft-s2"]
    assert mixed.work.models == ("/out/zero-shot/model.safetensors", "/out/ft-s2/model.safetensors")
    assert mixed.work.alphas == (0.5,) and mixed.after == ("zero-shot", "ft-s2")
    soup = plan.nodes["soup-of-0-1-2"]
    assert soup.work.make == "uniform-soup" and soup.after == ("ft-s0", "ft-s1", "ft-s2")
    zero = plan.nodes["zero-shot"]
    assert (zero.work.make, zero.work.architecture, zero.work.pretrained, zero.after) == (
        "zero-shot",
        "M",
        "openai",
        (),
    )
    assert {node.work.sets for node in plan.nodes.values() if isinstance(node.work, Evaluation)} == {zero.work.sets}
    for node in plan.nodes.values():
        node.work.checked()
    found = {row.word: row.found_in for row in plan.rows}
    assert found["zero-shot"] == ("zero-shot",) and found["soup"] == ("soup-of-0-1-2",)
    assert found["wise-ft"] == ("wise-ft-s0", "wise-ft-s1", "wise-ft-s2")
    assert all(found[row] == tuple(f"{row}-eval-s{seed}" for seed in (0, 1, 2)) for row in MASKED)


def test_all_needs_of_a_kind_are_drawn_above_it():
    """overview() draws each kind below the last one that it needs, which has to depend on the others."""
    for soup in (None, Path("/soup.safetensors")):
        s = setup(soup=soup)
        nodes = paper_plan(choose_rows(None, s), s).nodes
        for node in nodes.values():
            if node.after and not node.name.startswith("soup-of"):
                assert set(node.after) <= with_needed(nodes, [node.after[-1]])


def test_a_row_brings_what_it_depends_on_and_nothing_else():
    s = setup((7,))
    plan = paper_plan(choose_rows(["wise-kd"], s), s)
    assert list(plan.nodes) == ["zero-shot", "ft-s7", "wise-ft-s7", "wise-kd-s7", "wise-kd-eval-s7"]
    assert plan.wanted == {"wise-kd-eval-s7"}


def test_rows_do_not_depend_on_other_rows_or_seeds():
    """So rows and seeds can be added to a folder. The soup is an exception: its name has its seeds."""
    everything = paper_plan(choose_rows(None, setup()), setup()).nodes
    for word in LABELS:
        few = setup((0, 2))
        for name, node in paper_plan((word,), few).nodes.items():
            assert name not in everything or everything[name] == node
            assert name in everything or name.startswith("soup-of-0-2")


def test_a_soup_is_given_or_made_or_refused():
    s = setup((0,))
    assert not [row for row in choose_rows(None, s) if row.startswith("soup")]
    with pytest.raises(UserError, match="at least two --seeds"):
        choose_rows(["soup"], s)
    s = setup((0,), Path("/soup.safetensors"))
    plan = paper_plan(choose_rows(["soup", f"soup-{HEADLINE}"], s), s)
    assert list(plan.nodes) == ["soup", f"soup-{HEADLINE}-s0", f"soup-{HEADLINE}-eval-s0"]
    assert plan.nodes["soup"].work.models == ("/soup.safetensors",)
    run = plan.nodes[f"soup-{HEADLINE}-s0"]
    assert run.work.model.pretrained == "/soup.safetensors" and run.after == ()


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_a_forward_costs_what_was_counted():
    import open_clip

    counted = {"ViT-B-32": 8.8, "ViT-B-16": 35.1, "ViT-L-14": 162}  # GFLOP
    for name, gflop in counted.items():
        config = open_clip.get_model_config(f"{name}-quickgelu")
        assert cost.forward_flops(config) / 1e9 == pytest.approx(gflop, rel=0.003)


# By torch's counter over the steps of tools/bench.py, on ViT-B/16 with four images; of a CAM mask without fill, the
# most that it may be.
COUNTED = {"linear-probe": 0.931, "ft": 2.805, "kd-clean": 3.735, "fd-clean": 3.735, "random-mask-no-fill": 3.737}
COUNTED |= {"random-mask-single-fill": 6.540, "object-mask-single-fill": 7.529, "wise-kd": 8.460, "grad-cam": 6.554}
COUNTED |= {"kd-masked": 7.529, "object-mask-no-fill": 7.529}


@pytest.mark.parametrize("row", COUNTED)
def test_a_step_costs_what_was_counted(row):
    method = PRESETS[row].method
    if row == "wise-kd":
        method = dataclasses.replace(method, ensemble="x")
    resolved = Recipe(method=method).resolved().method
    assert cost.step_forwards(resolved) == pytest.approx(COUNTED[row], abs=0.05)


def test_hours_by_hand():
    s = setup()
    nodes = paper_plan(choose_rows(None, s), s).nodes
    steps = 10 * (1_281_167 // 512)
    forwards = steps * 512 * 2.8
    assert cost.image_forwards(nodes["ft-s0"], IMAGENET) == pytest.approx(forwards)
    evaluated = 50_000 + 10_000 + 30_000 + 50_889 + 18_574 + 7_500
    for name in ("ft-eval-s0", "wise-ft-s0", "zero-shot", "soup-of-0-1-2"):
        assert cost.image_forwards(nodes[name], IMAGENET) == evaluated
    assert evaluated / forwards < 0.005, "why each run has an evaluation of its own"
    # 12.8 million images × 2.8 × 35.1 GFLOP at 100 TFLOP/s
    assert cost.hours(forwards * 35.1e9, 100) == pytest.approx(12.8e6 * 2.8 * 35.1e9 / 1e14 / 3600, rel=0.002)
    two = Evaluation(models=("/a", "/b"), shards="/s", sets=("val",))
    assert cost.image_forwards(PlanNode("x", None, two), IMAGENET) == 100_000
    probed = dataclasses.replace(PRESETS["lp-ft"], data=dataclasses.replace(Recipe().data, eval_sets=("val",)))
    both = cost.image_forwards(PlanNode("x", 0, probed.resolved()), IMAGENET)
    assert both == pytest.approx(forwards + steps * 512 * 0.93 + 20 * 50_000)
    # A run on 8 GPUs that takes 1000 samples a second: 1000 × 2.8 × 35.1 GFLOP / 8
    assert cost.rate_of(nodes["ft-s0"].work, 1000, 8, 35.1e9) == pytest.approx(2.8 * 35.1 / 8)


def test_the_longest_chain_leaves_out_what_is_done():
    s = setup((0, 1))
    nodes = paper_plan(choose_rows(["wise-kd", "fd-clean"], s), s).nodes
    spent = {"zero-shot": 1.0, "ft-s0": 10.0, "ft-s1": 30.0, "wise-ft-s1": 2.0, "wise-kd-s1": 50.0, "fd-clean-s0": 60.0}
    assert cost.longest_chain(nodes, spent) == 1 + 30 + 2 + 50
    assert cost.longest_chain(nodes, {"wise-kd-s1": 50.0, "fd-clean-s0": 60.0}) == 60
    assert cost.longest_chain(nodes, {}) == 0


# --- what a status means ----------------------------------------------------------------------------------------------


def status(state: str, **more) -> Status:
    values = dict.fromkeys(field.name for field in dataclasses.fields(Status))
    return Status(**(values | {"run": "r", "state": state, "attempts": 1, "notes": ()} | more))


@pytest.mark.parametrize(
    ("state", "reason", "means"),
    [
        ("finished", None, DONE),
        ("never started", None, MISSING),
        ("failed", None, MISSING),
        ("cancelled", None, MISSING),
        ("stopped", None, MISSING),
        ("dead", None, MISSING),
        ("running", "None", QUEUED),
        ("requeued", "BeginTime", QUEUED),
        ("ending", "None", QUEUED),
        ("queued", "Priority", QUEUED),
        ("queued", "Dependency", WAITING),
        ("queued", "DependencyNeverSatisfied", MISSING),
        ("requeued", "Dependency", QUEUED),
    ],
)
def test_node_state(state, reason, means):
    job = SlurmJob("1", "PENDING", "", "", 0, reason, "") if reason else None
    assert node_state(status(state), job) == means


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nobodys_cluster_file(monkeypatch):
    monkeypatch.setenv("CFMASK_CLUSTER", "")


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = made.make_materials(tmp_path_factory.mktemp("materials"), per_class=16)
    (root / "shards/shifted").symlink_to("val")
    put_part(root / "shards/val", root / "shards/holdout")
    return root


def put_part(whole: Path, part: Path) -> None:
    """The first shard of a set as a set of its own."""
    part.mkdir()
    manifest = load_manifest(whole)
    counts = np.bincount(manifest.open_index(manifest.shards[0]).labels, minlength=manifest.num_classes)
    for name in (manifest.shards[0].name, index_name(manifest.shards[0].name)):
        (part / name).symlink_to(whole / name)
    write_manifest(replace(manifest, root=part, shards=manifest.shards[:1], class_counts=tuple(counts.tolist())))


HERE = ("--executor", "local", "--tasks-per-node", 2)


def flags(materials: Path, out: Path, *more: object) -> list[str]:
    """3 steps an epoch."""
    recipe = made.recipe_flags(materials, Path("unused"))
    cut = recipe.index("--run")
    return [str(x) for x in [*recipe[:cut], *recipe[cut + 2 :], "--sets", "val", "shifted", "--out", out, *more]]


def call(words: list[str], *, check: bool = True, **popen) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(made.REPO / "launch/reproduce.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, **popen)
    assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


PACE_S = 0.1
START_PACED = """
import functools, sys
pace_s = float(sys.argv.pop(1))
from launch import reproduce
from launch.paper import execution
for name in ("enqueue_all", "run_one_here"):
    setattr(execution, name, functools.partial(getattr(execution, name), pace_s=pace_s))
sys.exit(reproduce.main())
"""


def start(words: list[str]) -> subprocess.Popen:
    """The command in a process group of its own, not waited for. Its runs wait ``PACE_S`` at each step, so that they
    are interrupted before they finish."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START_PACED, str(PACE_S), *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=made.REPO, start_new_session=True, env=environment, **quiet)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--beta", 3), "--beta cannot be given here"),
        (("--seed", 3), "--seed cannot be given here"),
        (("--preset", "ft"), "--preset would do nothing"),
        (("--arch", "ViT-B-32"), "--arch and --model both name a model"),
        (("--seeds", 0, 0), "--seeds has a value twice"),
        (("--sets", "val", "nope"), "nope"),
        (("--rows", "soup", "--seeds", 0), "at least two --seeds"),
        (("--soup", "/no/such"), "/no/such"),
        (("--follow",), "--follow would do nothing"),
        (("--tflops", 0), "--tflops is 0.0"),
        (("--batch-size", 512, "--lanes", 16), "do not fill one global batch of 512"),
        (("--tasks-per-node", 3), "3 ranks cannot share 4 lanes"),
        (("--array-parallelism", 2), "--array-parallelism would do nothing"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_invalid_flags_are_refused_and_leave_no_folder(materials, tmp_path, capsys, more, said):
    assert reproduce.main(flags(materials, tmp_path / "out", *HERE, *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_model_is_refused_with_the_choices(capsys):
    assert reproduce.main(["--executor", "local"]) == 2
    assert "--arch is missing: ViT-B-32, ViT-B-16, ViT-L-14" in capsys.readouterr().err


def test_dry_run_shows_the_graph_and_its_cost_and_leaves_no_folder(materials, tmp_path, capsys):
    out = tmp_path / "out"
    words = flags(materials, out, *HERE, "--dry-run", "--epochs", 2, "--rows", "wise-kd", "fd-clean", "--tflops", 5e-10)
    assert reproduce.main(words) == 0
    said = capsys.readouterr().out
    assert (
        said.splitlines()[:7]
        == """\
zero-shot                     build the head, evaluate  –
├─ fd-clean × 3               train, 2 epochs           –
│  └─ fd-clean-eval × 3       evaluate                  –
└─ ft × 3                     train, 2 epochs           –
   └─ wise-ft × 3             mix, evaluate             –
      └─ wise-kd × 3          train, 2 epochs           –
         └─ wise-kd-eval × 3  evaluate                  –""".splitlines()
    )
    assert f"0 of 19 jobs done, in {out}" in said and "Would submit 19 jobs" in said
    assert "Trains on 48 images; 9 are held out (holdout). Rows are of each run's checkpoint that is best on" in said
    # 48 images; an epoch is 3 steps of 16, and an evaluation of the 9 that are held out. 3 runs each of FT, FT + FD
    # and WiSE-KD; 10 evaluations of 2 × 48 images.
    flops = cost.forward_flops(json.loads((materials / "tiny.json").read_text()))
    training = 3 * (96 * (2.8 + 3.73 + 8.45) + 3 * 18) * flops / 500 / 3600
    total = training + 10 * 96 * flops / 500 / 3600
    assert f"About {total:,.0f} hours of a rank, of which {total:,.0f} are left ({training:,.0f} of them train" in said
    assert "5e-10 TFLOP/s per rank (--tflops)" in said
    assert not out.exists()


def test_estimate_states_its_assumptions(materials, tmp_path, capsys):
    words = flags(materials, tmp_path / "out", *HERE, "--dry-run", "--rows", "ft", "--seeds", 0)
    assert reproduce.main(words) == 0
    assert "0.1 TFLOP/s per rank (a guess" in capsys.readouterr().out
    run = tmp_path / "out/ft-s0"
    run.mkdir(parents=True)
    (run / "attempts.jsonl").write_text('{"attempt": 1, "device": "cpu", "world_size": 4, "job": "1-0"}\n')
    lines = [{"step": i, "total_steps": 30, "samples_per_s": rate, "eta_s": 9} for i, rate in ((1, 5), (15, 80))]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "recipe.json").write_text("{}")
    args = reproduce.parser().parse_args(words)
    file = ClusterFile()
    reproduction = Reproduction.of(args, file, resolve_allocation(args, file))
    flops = cost.forward_flops(reproduction.start.config)
    assert measured(reproduction, flops) == {"ft-s0": pytest.approx(42.5 * 2.8 * flops / 4 / 1e12)}
    found = estimate(reproduction, read_statuses(reproduction), None)
    assert "measured in ft-s0" in found.note and "of which <0.01 are left" in found.note
    spent, left = sum(row.hours for row in found.rows), sum(row.left for row in found.rows)
    evaluations = 2 * 96 / 2.8  # in images of a step
    assert left / spent == pytest.approx((240 + evaluations) / (480 + evaluations), rel=0.1), "half of the run is done"


@pytest.fixture
def fake_jobs(materials, monkeypatch):
    """Replaces jobs on this machine. ``done`` lists their names; a job whose name is in ``fails`` fails."""
    jobs = SimpleNamespace(done=[], fails=set())

    def run_one_here(planned, allocation, *, follow):
        name = planned.run.root.name
        jobs.done.append(name)
        if name in jobs.fails:
            planned.run.begin_attempt(job="1-0", from_step=0)
            planned.run.end_attempt("failed: for the test")
            return 1
        work = planned.work
        shutil.copyfile(materials / "tiny.safetensors", planned.run.final)
        results = {"step": 1, "sets": {}}
        if isinstance(work, Recipe):
            planned.run.checkpoints.mkdir(exist_ok=True)
            (planned.run.checkpoints / "best.json").write_text(f'{{"of": "{name}"}}')
        if isinstance(work, Evaluation):
            score = {"correct": 3, "total": 4, "top1": 75.0, "interval": [30.0, 95.0], "ece": 0.1}
            score |= {"calibration": [[4, 3, 3.0]], "per_class": {"n": [3, 4]}}
            results = {
                "evaluation": json.loads(work.to_json()),
                "of": {p: [os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in work.models},
                "sets": {each: {"samples": 4, "classes": 1} for each in work.sets},
                "models": [{"name": name, "sets": dict.fromkeys(work.sets, score)}],
                "checkpoints": [
                    {"file": p, "run": str(Path(p).parents[1]), "step": 7, "chosen": "best on holdout"}
                    for p in work.models
                    if p.endswith("best.json")
                ],
            }
        planned.run.results.write_text(json.dumps(results))
        return 0

    monkeypatch.setattr(execution, "run_one_here", run_one_here)
    for chart in ("bar_chart", "reliability_chart"):
        monkeypatch.setattr(f"cfmask.report.charts.{chart}", lambda rows, path, split: path.write_bytes(made.PIXEL))
    return jobs


def test_failed_job_blocks_only_its_dependents_and_is_resumed(materials, tmp_path, capsys, fake_jobs):
    words = flags(materials, tmp_path / "out", *HERE, "--rows", "ft", "wise-ft", "fd-clean", "--seeds", 0, 1)
    fake_jobs.fails = {"ft-s1"}
    assert reproduce.main(words) == 1
    said = capsys.readouterr().out
    assert "ft-eval-s1 is skipped: it needs ft-s1" in said and "wise-ft-s1 is skipped: it needs ft-s1" in said
    assert "3 of 11 jobs are not done: ft-s1, ft-eval-s1, wise-ft-s1" in said
    assert len(fake_jobs.done) == 9
    missing = r"Missing: FT \(1 of 2 seeds done\); WiSE-FT, α = 0.5 \(1 of 2 seeds done\)\."
    assert re.search(missing, said)
    page = checked((tmp_path / "out/index.html").read_bytes()).text
    assert re.search(missing, page) and "8 of 11 jobs done, 2 never started, 1 failed" in page
    assert "failed: for the test" in page and "1 of 3 rows of the table are complete" in page
    assert "1 done, 1 not started" in page
    shutil.copyfile(tmp_path / "out/index.html", tmp_path / "failed.html")
    fake_jobs.done, fake_jobs.fails = [], set()
    assert reproduce.main(words) == 0
    assert fake_jobs.done == ["ft-s1", "ft-eval-s1", "wise-ft-s1"]
    assert "ft-s1 (is failed (failed: for the test): resumed)" in capsys.readouterr().out
    fake_jobs.done = []
    assert reproduce.main(words) == 0 and fake_jobs.done == []
    assert "11 of 11 jobs done" in capsys.readouterr().out
    if CHROMIUM is not None:
        for file in (tmp_path / "failed.html", tmp_path / "out/index.html"):
            assert_fits_and_prints(file, tmp_path)


def test_effective_robustness_has_the_published_line_or_none(materials, tmp_path, capsys, fake_jobs):
    words = flags(materials, tmp_path / "out", *HERE, "--rows", "zero-shot", "ft", "--seeds", 0)
    assert reproduce.main([*words, "--fit-on", "published"]) == 2
    assert "--fit-on published needs ImageNet's validation set (val)" in capsys.readouterr().err and not fake_jobs.done
    assert reproduce.main(words) == 0
    said = capsys.readouterr().out
    assert "Effective robustness is not drawn: a line needs zero-shot models of two backbones" in said
    assert "effective robustness |" not in said and not list((tmp_path / "out").glob("effective*"))

    shutil.copytree(materials / "shards", tmp_path / "shards")
    (tmp_path / "shards/shifted").rename(tmp_path / "shards/imagenet-r")
    of_imagenet = ["--shards", str(tmp_path / "shards"), "--sets", "val", "imagenet-r", "--allow-count-mismatch"]
    words = flags(materials, tmp_path / "line", *HERE, "--rows", "zero-shot", "ft", "--seeds", 0, *of_imagenet)
    assert reproduce.main([*words, "--fit-on", "published"]) == 0
    said = capsys.readouterr().out
    assert "zero-shot ViT-L-14 (published)" in said and "is not drawn" not in said
    # 75 % on both sets, where the published models' line has 87 % on ImageNet-R.
    assert re.search(r"(?m)^\| FT +\| −1[12]\.\d \|$", said)
    assert (tmp_path / "line/effective-robustness.png").exists() and (tmp_path / "line/index.html").exists()


def test_second_command_on_a_plan_is_refused(materials, tmp_path, capsys, fake_jobs, monkeypatch):
    monkeypatch.setattr(RunFolder, "locked", functools.partialmethod(RunFolder.locked, patience_s=0.1))
    out = tmp_path / "out"
    out.mkdir()
    words = flags(materials, out, *HERE, "--rows", "ft", "--seeds", 0)
    with RunFolder(out).locked("reproduce.py"):
        assert reproduce.main(words) == 2
    said = capsys.readouterr().err
    assert f"Another reproduce.py is running in {out} (job reproduce.py, process {os.getpid()}" in said
    assert fake_jobs.done == []
    assert reproduce.main(words) == 0 and len(fake_jobs.done) == 3


def test_rows_and_seeds_may_be_added_and_nothing_else(materials, tmp_path, capsys, fake_jobs):
    words = flags(materials, tmp_path / "out", *HERE)
    assert reproduce.main([*words, "--rows", "ft", "--seeds", "0"]) == 0
    fake_jobs.done = []
    assert reproduce.main([*words, "--rows", "ft", "soup", "--seeds", "0", "1"]) == 0
    assert fake_jobs.done == ["ft-s1", "ft-eval-s1", "soup-of-0-1"]
    capsys.readouterr()
    for more, said in (
        (("--epochs", "3"), "optim.epochs: 10 → 3"),
        (("--sets", "val"), "sets: ['val', 'shifted'] → ['val']"),
    ):
        assert reproduce.main([*words, "--rows", "ft", *more]) == 2
        assert f"holds another plan: {said}" in capsys.readouterr().err
    kept = (tmp_path / "out/plan.json").read_text()
    for torn in ("", kept[:100], "[]"):  # a plan that cannot be compared is not taken for none
        (tmp_path / "out/plan.json").write_text(torn)
        for more in ((), ("--dry-run",)):
            assert reproduce.main([*words, "--rows", "ft", *more]) == 2
            assert "out/plan.json is damaged" in capsys.readouterr().err


def test_run_of_a_finished_row_is_not_needed_and_a_new_one_is_evaluated_again(materials, tmp_path, fake_jobs):
    out = tmp_path / "out"
    words = flags(materials, out, *HERE, "--rows", "ft", "--seeds", 0)
    assert reproduce.main(words) == 0
    (out / "ft-s0").rename(tmp_path / "moved")
    fake_jobs.done = []
    assert reproduce.main(words) == 0 and fake_jobs.done == []
    assert reproduce.main([*words[: words.index("--rows")], "--rows", "ft", "wise-ft", "--seeds", "0"]) == 0
    assert fake_jobs.done == ["ft-s0", "wise-ft-s0"]
    fake_jobs.done = []
    assert reproduce.main(words) == 0 and fake_jobs.done == ["ft-eval-s0"], "it used the model that is gone"


def test_rows_are_of_the_best_checkpoints_unless_the_last_are_asked_for():
    last = setup()
    best = dataclasses.replace(last, checkpoint="best")
    for s, name in ((last, "model.safetensors"), (best, "checkpoints/best.json")):
        nodes = paper_plan(choose_rows(None, s), s).nodes
        assert nodes["ft-eval-s0"].work.models == (f"/out/ft-s0/{name}",)
        assert nodes["wise-ft-s0"].work.models == ("/out/zero-shot/model.safetensors", f"/out/ft-s0/{name}")
        assert nodes["soup-of-0-1-2"].work.models == tuple(f"/out/ft-s{seed}/{name}" for seed in (0, 1, 2))
        assert nodes["wise-kd-s0"].work.method.ensemble == "/out/wise-ft-s0/model.safetensors"


def test_choice_of_checkpoints_is_recorded_and_plans_without_one_use_the_last(materials, tmp_path, capsys, fake_jobs):
    rows = ("--rows", "ft", "wise-ft", "--seeds", 0)
    best = flags(materials, tmp_path / "best", *HERE, *rows)
    assert reproduce.main(best) == 0
    table = (tmp_path / "best/table.md").read_text()
    assert "Checkpoints of all trained models: step 7, best on holdout." in table
    written = json.loads((tmp_path / "best/results.json").read_text())
    assert written["plan"]["checkpoint"] == "best" and written["rows"][0]["checkpoints"][0]["step"] == 7
    assert RunFolder(tmp_path / "best/ft-s0").recipe().data.eval_sets == ("holdout",)
    assert reproduce.main([*best, "--checkpoint", "last"]) == 2
    assert "holds another plan: checkpoint: best → last" in capsys.readouterr().err
    # A plan of a version without the choice, which did not evaluate during training.
    out = tmp_path / "before"
    words = flags(materials, out, *HERE, *rows)
    assert reproduce.main([*words, "--checkpoint", "last"]) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan.pop("checkpoint") == "last" and plan["recipe"]["data"]["eval_sets"] == []
    (out / "plan.json").write_text(json.dumps(plan))
    fake_jobs.done = []
    assert reproduce.main(words) == 0 and fake_jobs.done == []
    assert "each run's checkpoint that is last" in capsys.readouterr().out


def test_the_zero_shot_row_needs_no_training_set(materials, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "val").symlink_to(materials / "shards/val")
    words = flags(materials, tmp_path / "out", *HERE, "--rows", "zero-shot", "--shards", shards, "--dry-run")
    words.remove("shifted")
    assert reproduce.main(words) == 0
    assert "Nothing is trained." in capsys.readouterr().out
    assert reproduce.main([*words, "--select-on-test-set"]) == 2
    assert reproduce.main([*words, "--rows", "ft"]) == 2
    assert f"There is no folder of shards at {shards / 'train'}" in capsys.readouterr().err


def test_missing_holdout_is_refused_without_its_flag(materials, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("train", "val", "shifted"):
        (shards / name).symlink_to(materials / "shards" / name)
    words = flags(materials, tmp_path / "out", *HERE, "--rows", "ft", "--shards", shards, "--dry-run")
    assert reproduce.main(words) == 2
    assert f"There is no held-out set at {shards / 'holdout'}" in capsys.readouterr().err
    assert reproduce.main([*words, "--without-holdout"]) == 0
    said = capsys.readouterr()
    assert "Trains on 48 images; none are held out. Rows are of each run's checkpoint that is last." in said.out
    assert "warning: No set is held out" in said.err
    assert reproduce.main([*words, "--without-holdout", "--checkpoint", "best"]) == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out/plan.json").write_text(json.dumps({"checkpoint": "best"}))
    assert reproduce.main([*words, "--without-holdout"]) == 2
    assert "The plan's --checkpoint best and --without-holdout contradict" in capsys.readouterr().err
    (tmp_path / "out/plan.json").unlink()
    (shards / "objectnet").symlink_to(materials / "shards/val")
    chosen = ["--eval-sets", "objectnet", "--best-on", "objectnet"]
    assert reproduce.main([*words, *chosen]) == 2
    assert "The set objectnet chooses a model on objectnet, which is a test set" in capsys.readouterr().err
    assert reproduce.main([*words, *chosen, "--select-on-test-set"]) == 0


def test_choosing_checkpoints_on_a_test_set_needs_a_flag(materials, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, target in (("train", "train"), ("objectnet", "val")):
        (shards / name).symlink_to(materials / "shards" / target)
    run = tmp_path / "run"
    words = [*made.recipe_flags(materials, run), "--shards", shards, *HERE, "--method", "vanilla", "--eval-sets"]
    words = [*map(str, words), "objectnet", "--best-on", "objectnet", "--dry-run"]
    assert submit_main(words) == 2
    assert "--best-on objectnet chooses a model on objectnet, which is a test set" in capsys.readouterr().err
    assert submit_main([*words, "--select-on-test-set"]) == 0
    assert "warning: --best-on objectnet chooses" in capsys.readouterr().err
    arguments = submit_parser().parse_args(words)
    file = ClusterFile()
    [planned] = training.plan_runs(arguments, file, resolve_allocation(arguments, file))
    planned.run.claim(planned.work)
    assert submit_main(words) == 0, "a run with the flag is resumed without it"
    assert "warning: --best-on objectnet chooses" in capsys.readouterr().err


def test_a_soup_of_another_program_becomes_a_model_file(materials, tmp_path, fake_jobs):
    import torch
    from safetensors.torch import load_file

    state = load_file(materials / "tiny.safetensors")
    foreign = {f"model.{key}": value for key, value in state.items() if key.startswith("visual.")}
    foreign |= {f"classification_head.{key}": state[f"head.{key}"] for key in ("weight", "bias")}
    torch.save(foreign, tmp_path / "soup.pt")
    out = tmp_path / "out"
    words = flags(materials, out, *HERE, "--rows", "soup", f"soup-{HEADLINE}", "--seeds", 0)
    assert reproduce.main([*words, "--soup", str(tmp_path / "soup.pt")]) == 0
    assert fake_jobs.done == ["soup", f"soup-{HEADLINE}-s0", f"soup-{HEADLINE}-eval-s0"]
    made_of_it = load_file(out / "soup.safetensors")
    assert made_of_it.keys() == state.keys() and all(torch.equal(made_of_it[key], state[key]) for key in state)
    assert RunFolder(out / f"soup-{HEADLINE}-s0").recipe().model.pretrained == str(out / "soup.safetensors")


def test_killed_plan_is_resumed_and_ends_with_the_table(materials, tmp_path):
    out = tmp_path / "out"
    words = flags(materials, out, "--executor", "local", "--rows", "zero-shot", "ft", "--seeds", 0, "--epochs", 12)
    first = start([*words, "--checkpoint-steps", "2"])
    made.wait_for(out / "ft-s0", lambda: (RunFolder(out / "ft-s0").logged_step() or 0) > 5, "the run trains")
    made.kill_all(first)
    assert not (out / "ft-s0/results.json").exists(), "it was in the middle"
    zero = (out / "zero-shot/results.json").stat().st_mtime_ns
    said = call([*words, "--checkpoint-steps", "2"]).stdout
    assert "1 of 2: ft-s0 (is dead (killed without notice): resumed)" in said
    assert (out / "zero-shot/results.json").stat().st_mtime_ns == zero
    assert [line["from_step"] > 0 for line in read_lines(out / "ft-s0/attempts.jsonl")] == [False, True]
    table = (out / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == ["zero-shot", "FT"]
    assert "| top-1 %" in said and r"\begin{tabular}" in (out / "table.tex").read_text()
    rows = {row["row"]: row["top1"] for row in json.loads((out / "results.json").read_text())["rows"]}
    for word, name in (("zero-shot", "zero-shot"), ("ft", "ft-eval-s0")):
        [model] = json.loads((out / name / "results.json").read_text())["models"]
        assert rows[word]["val"]["value"] == model["sets"]["val"]["top1"]
        assert rows[word]["shifted"]["value"] == model["sets"]["shifted"]["top1"]
    assert (out / "bars.png").stat().st_size > 5000
    best = RunFolder(out / "ft-s0").best()
    assert f"FT: step {best.step}, best on holdout" in table
    [origin] = json.loads((out / "ft-eval-s0/results.json").read_text())["checkpoints"]
    assert (origin["file"], origin["step"], origin["top1"]) == (str(best.model), best.step, best.top1)
    # An evaluation is resumed like any run.
    (out / "ft-eval-s0/results.json").unlink()
    made.submit("--resume", out / "ft-eval-s0", "--executor", "local")
    assert (out / "ft-eval-s0/results.json").exists()


def test_published_rows():
    from cfmask.report.tables import PUBLISHED

    known = published_rows(PUBLISHED["ViT-B-16"])
    assert known[LABELS["zero-shot"]]["IN"] == 68.3 and known[LABELS["wise-ft"]]["A"] == 47.6
    assert known[LABELS[HEADLINE]]["Avg."] == 63.3 and known[LABELS["ft"]]["V2"] == 70.6


# --- on a real Slurm --------------------------------------------------------------------------------------------------

ON_ONE_NODE = ("--gpus-per-node", 0, "--tasks-per-node", 1, "--cpus-per-task", 1, "--time", 30)


@pytest.fixture
def paced(monkeypatch):
    """Runs that are submitted by this process wait at each step, as those of ``start``, and are followed closely."""
    monkeypatch.setattr(execution, "enqueue_all", functools.partial(execution.enqueue_all, pace_s=PACE_S))
    monkeypatch.setattr(progress, "_POLL_S", 1)


def submits(words: list[str], capsys) -> tuple[dict[str, str], str]:
    """The command, in this process: the jobs that it submits by node, and its output."""
    capsys.readouterr()
    assert reproduce.main(words) == 0
    said = capsys.readouterr().out
    return dict(re.findall(r"^(\S+): job ([\d_]+)(?: after .*)?$", said, re.MULTILINE)), said


def all_finished(out: Path, names: list[str]) -> bool:
    return all((out / name / "results.json").exists() for name in names)


@pytest.mark.slurm
def test_plan_of_dependent_jobs_survives_a_requeue_and_a_kill_of_the_command(
    slurm_cluster: Cluster, materials, tmp_path, capsys, paced
):
    out = tmp_path / "out"
    words = flags(materials, out, *ON_ONE_NODE, "--rows", "ft", "wise-ft", "--seeds", 0, "--epochs", 20)
    words += ["--checkpoint-steps", "5"]
    names = ["zero-shot", "ft-s0", "ft-eval-s0", "wise-ft-s0"]
    # Killed during submission: submitted jobs stay, and the same command adds the others.
    first = start(words)
    wait_until(lambda: list(out.glob("zero-shot/jobs/submissions.jsonl")) != [], "one is submitted")
    made.kill_all(first)
    there = {path.parts[-3] for path in out.glob("*/jobs/submissions.jsonl")}
    jobs, _ = submits(words, capsys)
    assert set(jobs) == set(names) - there, "only what was missing"
    jobs |= {name: read_lines(out / name / "jobs/submissions.jsonl")[0]["job"] for name in there}
    assert f"afterok:{jobs['ft-s0']}(" in slurm_cluster.job(jobs["wise-ft-s0"])["Dependency"]
    assert submits(words, capsys)[0] == {}, "nothing twice"
    # A requeued job keeps its id, and its dependents keep waiting.
    made.wait_for_step(out / "ft-s0", 8)
    slurm_cluster.call("scontrol", "requeue", jobs["ft-s0"])
    slurm_cluster.start_again_now(jobs["ft-s0"])
    wait_until(lambda: all_finished(out, names), "the plan is done")
    assert [len(read_lines(out / name / "jobs/submissions.jsonl")) for name in names] == [1] * len(names)
    attempts = read_lines(out / "ft-s0/attempts.jsonl")
    assert len(attempts) == 2 and attempts[1]["from_step"] >= 5
    more, said = submits(words, capsys)
    assert more == {} and "4 of 4 jobs done" in said and "| WiSE-FT, α = 0.5" in said


@pytest.mark.slurm
def test_concurrent_commands_submit_each_job_once_and_dependents_of_a_failed_job_are_submitted_again(
    slurm_cluster: Cluster, materials, tmp_path, capsys, paced
):
    out = tmp_path / "out"
    words = flags(materials, out, *ON_ONE_NODE, "--rows", "ft", "wise-ft", "--seeds", 0, "--epochs", 20)
    both = [start(words) for _ in range(2)]
    codes = [each.wait(timeout=300) for each in both]
    assert 0 in codes and set(codes) <= {0, 2}
    jobs = {}
    for name in ("zero-shot", "ft-s0", "ft-eval-s0", "wise-ft-s0"):
        [submission] = read_lines(out / name / "jobs/submissions.jsonl")
        jobs[name] = submission["job"]
    made.wait_for_step(out / "ft-s0", 5)
    slurm_cluster.call("scancel", jobs["ft-s0"])
    for name in ("ft-eval-s0", "wise-ft-s0"):
        slurm_cluster.wait_for_state(jobs[name], "CANCELLED")
    wait_until(lambda: slurm_cluster.call("squeue", "--noheader") == "", "the queue is empty")
    more, said = submits([*words, "--follow"], capsys)
    assert list(more) == ["ft-s0", "ft-eval-s0", "wise-ft-s0"] and not set(more.values()) & set(jobs.values())
    assert "ft-s0 is stopped (stopped at step" in said
    assert "4 of 4 jobs done" in said and "| FT " in said, "--follow returns when all is done"
    assert read_lines(out / "ft-s0/attempts.jsonl")[1]["from_step"] > 0


@pytest.mark.slurm
def test_rejection_by_slurm_leaves_no_run_folder(slurm_cluster: Cluster, materials, tmp_path, capsys):
    out = tmp_path / "out"
    assert reproduce.main(flags(materials, out, *ON_ONE_NODE, "--rows", "ft", "--partition", "nope")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Slurm does not take the job: invalid partition specified: nope")
    assert not [path for path in out.iterdir() if path.is_dir() and not path.name.startswith(".")]
