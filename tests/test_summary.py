"""What submit.py prints about the jobs that it has submitted."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

import made
from cfmask.presets import PRESETS
from cfmask.recipe import Data, Method, Model, Optim, Recipe
from cfmask.runs import RunFolder
from launch.allocation.resolve import Allocation
from launch.slurm.client import SlurmError, SlurmUnavailable
from launch.slurm.queue import SacctRecord
from launch.slurm.texts import SlurmNode
from launch.submission import feasibility
from launch.submission.feasibility import ask_slurm, expected_start
from launch.submission.planning import PlannedJob
from launch.submission.summary import About, changes_of, recipe_lines, summary, where
from slurm_fixture import wait_until

DATA = Data(shards="/s", eval_sets=("holdout", "val"))
GPUS = Allocation("slurm", 2, 8, "a100", 8, 8, 90, partition="gpu")


def described(recipe: Recipe) -> Recipe:
    return replace(recipe, data=DATA).resolved()


def test_changes_from_the_preset_are_named_by_their_flags():
    assert changes_of(described(PRESETS["ft"])) == []
    changed = Recipe(model=Model(name="ViT-B-16-quickgelu"), method=Method(beta=7.0), optim=Optim(epochs=3, beta2=0.9))
    assert changes_of(described(changed)) == [
        "model ViT-B-32-quickgelu → ViT-B-16-quickgelu",
        "beta 30.0 → 7.0",
        "epochs 10 → 3",
        "adam-beta2 0.999 → 0.9",
    ]


def test_a_run_is_summed_up_in_five_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = described(PRESETS["ft"])
    planned = [PlannedJob(RunFolder(tmp_path / "runs/a b"), recipe)]
    about = About(lambda jobs: recipe_lines([recipe], 1_270_927, GPUS), tmp_path / "cluster.toml", "can start now")
    assert summary(planned, ["4711"], GPUS, about, "0123456789ab", "new").splitlines() == [
        "run      runs/a b: new; code 0123456789ab",
        "recipe   ft, unchanged",
        "steps    24,820: 10 epochs of 2,482; batches of 512, 32 on each of 16 GPUs; evaluated on holdout, val",
        "job      4711 on Slurm: 2 nodes × 8 a100 GPUs, partition gpu, at most 1 h 30 min a start; cluster file "
        "cluster.toml; can start now",
        "watch    python launch/status.py 'runs/a b' --follow",
    ]


def test_a_sweep_names_each_run_and_its_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = [
        described(replace(PRESETS[name], run=replace(PRESETS[name].run, seed=s)))
        for name in ("ft", "fd-clean")
        for s in (0, 1)
    ]
    planned = [PlannedJob(RunFolder(tmp_path / f"runs/{i}"), recipe) for i, recipe in enumerate(recipes)]
    said = summary(
        planned, ["7_0", "7_1", "8_0", "8_1"], GPUS, About(lambda jobs: recipe_lines(recipes, 5120, GPUS)), "c", ""
    )
    assert "recipe   ft, fd-clean × seeds 0, 1, unchanged" in said and "jobs     7, 8 on Slurm" in said
    assert re.findall(r"^ {9}(\S+)  (.*)$", said, re.MULTILINE) == [
        ("7_0", "runs/0"),
        ("7_1", "runs/1"),
        ("8_0", "runs/2"),
        ("8_1", "runs/3"),
    ]
    assert said.endswith("watch    python launch/status.py runs")


@pytest.mark.parametrize(
    ("allocation", "said"),
    [
        (Allocation("local", 1, 0, "", 1, 1, 1440), "this machine: 1 CPU rank"),
        (
            Allocation("slurm", 1, 2, "", 2, 1, "UNLIMITED"),
            "Slurm: 1 node × 2 GPUs, the default partition, no time limit",
        ),
        (
            Allocation("slurm", 1, 2, "", 2, 1, "partition"),
            "Slurm: 1 node × 2 GPUs, the default partition, the partition's time limit",
        ),
    ],
)
def test_the_place_of_a_job_in_words(allocation, said):
    assert where(allocation) == said


def test_the_expected_start_is_read_from_slurms_answer():
    def answer(start: datetime) -> str:
        return (
            f"sbatch: Job 9 to start at {start:%Y-%m-%dT%H:%M:%S} using 2 processors on nodes n[1-2] in partition low"
        )

    now = datetime.now()
    assert expected_start(answer(now)) == "can start now"
    assert expected_start(answer(now + timedelta(days=2))).startswith("expected to start ")
    assert expected_start(answer(now + timedelta(days=400_000))) == "" == expected_start("")


NODES = [SlurmNode("gpu", f"n{number}", "idle", 16, "gpu:a100:8") for number in (1, 2)]


@pytest.mark.parametrize(
    ("allocation", "nodes", "said"),
    [
        (
            replace(GPUS, cpus_per_task=9),
            NODES,
            r"0 of 2 nodes have 8 GPUs \(a100\) and 72 CPUs; 2 requested. To change: --cpus-per-task 2",
        ),
        (replace(GPUS, nodes=3, cpus_per_task=1), NODES, "2 of 2 nodes have 8 GPUs .*; 3 requested"),
        (replace(GPUS, cpus_per_task=1), NODES, r"2 of 2 nodes have 8 GPUs \(a100\) and 8 CPUs; 2 requested\.$"),
        (
            replace(GPUS, cpus_per_task=1, constraint="fast"),
            NODES,
            "and it is also asked for --constraint=fast: leave this out",
        ),
        (
            replace(GPUS, cpus_per_task=1, memory="200G"),
            [replace(node, memory_mb=100_000 + number) for number, node in enumerate(NODES)],
            "of which 0 have 200G of memory. To change: --memory 100000M",
        ),
        (replace(GPUS, cpus_per_task=1, exclude="n2"), NODES, "but --exclude n2 leaves 1 of them"),
        (replace(GPUS, gpu_type=""), [replace(node, gres="(null)") for node in NODES], "they have no GPUs"),
        (replace(GPUS, cpus_per_task=1), [replace(node, state="drained") for node in NODES], None),
    ],
)
def test_a_job_that_no_node_could_run_is_refused_and_one_whose_nodes_are_down_waits(
    allocation, nodes, said, monkeypatch, caplog
):
    def refuse(text: str) -> str:
        raise SlurmError("Slurm does not take the job: Requested node configuration is not available")

    monkeypatch.setattr(feasibility, "test_only", refuse)
    monkeypatch.setattr(feasibility.site, "read_nodes", lambda: nodes)
    monkeypatch.setattr(feasibility.site, "read_partitions", lambda **wait: [{"PartitionName": "gpu"}])
    monkeypatch.setattr(feasibility, "host_names", lambda text: [text])
    if said is None:
        assert ask_slurm("", allocation) == ""
        assert "of which 0 work; the others are drained" in caplog.text
    else:
        with pytest.raises(SlurmError, match=said):
            ask_slurm("", allocation)


def accepted(monkeypatch, *, partitions: list[dict[str, str]], qos_may_exceed: bool = False) -> None:
    """A Slurm that accepts every job, knows job 12 in the queue, and job 5 in its history."""
    monkeypatch.setattr(feasibility, "test_only", lambda text: "sbatch: Job 9 to start at …")
    monkeypatch.setattr(feasibility.site, "read_partitions", lambda **wait: partitions)
    monkeypatch.setattr(feasibility.site, "qos_may_exceed_partitions", lambda: qos_may_exceed)
    monkeypatch.setattr(feasibility.site, "hides_jobs", lambda: False)
    monkeypatch.setattr(feasibility, "known_jobs", lambda jobs: {"12"} & set(jobs))
    ended = [SacctRecord("5_1", "COMPLETED", "", "")]
    monkeypatch.setattr(feasibility, "history", lambda jobs: [each for each in ended if "5" in jobs])


SHORT = {"PartitionName": "gpu", "MaxTime": "01:00:00", "MaxNodes": "1"}
LONG = {"PartitionName": "long", "MaxTime": "UNLIMITED", "MaxNodes": "UNLIMITED"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time": 90}, "gpu allows at most 01:00:00, and --time requests 90 min. To change: --time 60"),
        ({"time": "UNLIMITED"}, "--time requests no limit"),
        ({"time": 60, "nodes": 2}, "gpu allows at most 1 nodes, and --nodes requests 2"),
        ({"time": 60}, None),
        ({"time": "partition"}, None),
        ({"time": 90, "partition": "gpu,long"}, None),
        ({"time": 90, "sbatch": {"time-min": "30"}}, None),
    ],
)
def test_a_job_over_the_limits_of_all_its_partitions_is_refused(given, said, monkeypatch, caplog):
    allocation = replace(GPUS, **{"nodes": 1, **given})
    accepted(monkeypatch, partitions=[SHORT, LONG])
    if said is None:
        assert ask_slurm("", allocation)
        return
    with pytest.raises(SlurmError, match=f"could never start: .*{said}"):
        ask_slurm("", allocation)
    accepted(monkeypatch, partitions=[SHORT, LONG], qos_may_exceed=True)
    assert ask_slurm("", allocation) and "unless its quality of service allows more" in caplog.text


@pytest.mark.parametrize("known", ["afterok:12", "afterok:12:5_1", "singleton", "afterany:12+30,singleton", None])
def test_a_job_can_wait_for_jobs_in_the_queue_and_in_the_history(known, monkeypatch):
    accepted(monkeypatch, partitions=[LONG])
    assert ask_slurm("", replace(GPUS, partition="long", dependency=known))


@pytest.mark.parametrize("unknown", ["afterok:99", "afterok:12:99", "singleton,afterany:99_3"])
def test_a_job_cannot_wait_for_one_that_slurm_does_not_know(unknown, monkeypatch):
    accepted(monkeypatch, partitions=[LONG])
    with pytest.raises(SlurmError, match="There is no job 99 to wait for"):
        ask_slurm("", replace(GPUS, partition="long", dependency=unknown))


def test_where_jobs_of_others_are_hidden_one_can_be_waited_for(monkeypatch):
    accepted(monkeypatch, partitions=[LONG])
    monkeypatch.setattr(feasibility.site, "hides_jobs", lambda: True)
    assert ask_slurm("", replace(GPUS, partition="long", dependency="afterok:99"))


def test_limits_are_those_of_the_partition_that_the_site_chooses(monkeypatch):
    """Many sites choose a partition in job_submit.lua, by the time limit or the GPUs."""
    accepted(monkeypatch, partitions=[SHORT | {"Default": "YES"}, LONG])
    long_job = replace(GPUS, nodes=1, time=90, partition=None)
    with pytest.raises(SlurmError, match="gpu allows at most 01:00:00"):
        ask_slurm("", long_job)
    where = "sbatch: Job 9 to start at 2026-11-27T12:00:00 using 8 processors on nodes n1 in partition "
    for chosen, is_fine in (("long", True), ("gpu", False)):
        monkeypatch.setattr(feasibility, "test_only", lambda text, chosen=chosen: where + chosen)
        if is_fine:
            assert ask_slurm("", long_job)
            continue
        with pytest.raises(SlurmError, match="gpu allows at most 01:00:00"):
            ask_slurm("", long_job)


def test_without_accounting_jobs_of_the_past_are_not_taken_for_unknown(monkeypatch):
    def no_accounting(jobs):
        raise SlurmError("Slurm accounting storage is disabled")

    accepted(monkeypatch, partitions=[LONG])
    monkeypatch.setattr(feasibility, "history", no_accounting)
    assert ask_slurm("", replace(GPUS, partition="long", dependency="afterok:99"))


def test_an_accepted_job_does_not_need_an_answer_about_limits(monkeypatch):
    def no_answer(**wait):
        raise SlurmUnavailable("scontrol failed")

    accepted(monkeypatch, partitions=[SHORT])
    monkeypatch.setattr(feasibility.site, "read_partitions", no_answer)
    assert ask_slurm("", replace(GPUS, nodes=1, time=90))


def test_a_misspelt_partition_gets_a_suggestion(monkeypatch):
    def refuse(text: str) -> str:
        raise SlurmError("invalid partition specified: lnog.")

    accepted(monkeypatch, partitions=[SHORT, LONG])
    monkeypatch.setattr(feasibility, "test_only", refuse)
    with pytest.raises(SlurmError, match=r"Did you mean long\? There are gpu, long\."):
        ask_slurm("", replace(GPUS, partition="lnog"))


@pytest.mark.slurm
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--verbose",)])
def test_an_impossible_request_is_refused_before_anything_is_made_or_printed(slurm_cluster, tmp_path, more):
    materials = made.make_materials(tmp_path / "materials", per_class=16)
    flags = [*made.recipe_flags(materials, tmp_path / "unused")[:-2], "--gpus-per-node", 0, "--executor", "slurm"]
    done = made.submit(*flags, *more, "--cpus-per-task", 9, check=False, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "runs").exists()
    assert re.fullmatch(
        r"error: Slurm does not take the job: .* 0 of 2 nodes have 9 CPUs; .*--cpus-per-task 4.*\n", done.stderr
    )
    assert slurm_cluster.call("squeue", "--noheader") == ""


@pytest.mark.slurm
def test_squeue_shows_which_run_a_job_is(slurm_cluster, tmp_path):
    materials = made.make_materials(tmp_path / "materials", per_class=16)
    flags = [*made.recipe_flags(materials, tmp_path / "unused")[:-2], "--gpus-per-node", 0, "--executor", "slurm"]
    done = made.submit(
        *flags, "--cpus-per-task", 1, "--preset", "ft", "--seeds", 0, 1, cwd=tmp_path, pace_s=made.PACE_S
    )
    jobs = made.jobs_of(done, tmp_path)
    assert len(done.stdout.splitlines()) == 7 and all(run.name.startswith("ft-tiny-s") for run in jobs.values())

    def names() -> set[str]:
        return {slurm_cluster.job(job)["JobName"] for job in jobs}

    wait_until(lambda: names() == {run.name for run in jobs.values()}, "the names of the members")
    slurm_cluster.call("scancel", *jobs)
