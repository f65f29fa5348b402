"""Arrays above the site's limit are split into several that share the parallelism: sweeps, conversions, and the paper's
plan."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import made
from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from launch.allocation.resolve import Allocation
from launch.slurm.texts import array_limit, parse_config
from launch.submission import submit as submission
from launch.submission.dependencies import ArrayPart, split_array
from launch.submission.planning import PlannedJob, claim_run_folders, queued_job
from launch.submission.submit import submit_to_slurm
from slurm_fixture import Cluster
from test_array import start as start_array
from test_reproduce import ON_ONE_NODE, put_part, submits
from test_reproduce import flags as plan_flags
from test_slurm_client import FakeSlurm, fake  # noqa: F401

# --- how a list of jobs is split --------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.none() | st.integers(0, 60), st.none() | st.integers(1, 60), st.randoms())
def test_split_arrays_cover_all_jobs_within_the_limits(number, largest, parallelism, random):
    parts = split_array(number, largest, parallelism)
    assert [place for part in parts for place in part.members] == list(range(number))
    sizes = [len(part.members) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and (largest is None or max(sizes) <= max(1, largest))
    assert len(parts) == (1 if largest is None else -(-number // max(1, largest))), "no more arrays than needed"
    ended: set[int] = set()
    while len(ended) < len(parts):  # in whatever order they end
        begun = [n for n, part in enumerate(parts) if part.behind is None or part.behind in ended]
        live = [n for n in begun if n not in ended]
        assert live, "one can always go on"
        if parallelism is not None:
            assert all(parts[n].parallelism >= 1 for n in live)
            assert sum(parts[n].parallelism for n in live) <= parallelism
            if not ended and parallelism >= len(parts):
                assert sum(part.parallelism for part in parts) == parallelism, "all of the throttle is used"
        ended.add(random.choice(live))


def test_split_array_examples():
    assert split_array(5, None, 3) == [ArrayPart(range(5), 3)]
    assert split_array(5, 3, None) == [ArrayPart(range(2)), ArrayPart(range(2, 5))]
    assert split_array(5, 3, 3) == [ArrayPart(range(2), 2), ArrayPart(range(2, 5), 1)]
    assert split_array(3, 1, 2) == [ArrayPart(range(1), 1), ArrayPart(range(1, 2), 1), ArrayPart(range(2, 3), 1, 0)]
    assert [part.behind for part in split_array(2000, 1000, 1)] == [None, 0]


@pytest.mark.parametrize(
    ("shown", "limit"),
    [
        ("MaxArraySize            = 1001\nMaxBatchRequeue = 5", 1001),
        ("MaxArraySize = 100001\nSchedulerParameters = bf_interval=1,max_array_tasks=500,defer", 500),
        ("MaxArraySize = 0", 0),
        ("SlurmctldPort = 6817", None),
    ],
)
def test_array_limit_from_the_configuration(shown, limit):
    assert array_limit(parse_config(shown)) == limit


def test_refusal_of_a_later_array_keeps_the_accepted_ones(fake: FakeSlurm, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(submission, "max_array_members", lambda: 2)
    refused = "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1"
    fake.will("sbatch", "echo Submitted batch job 12", "echo Submitted batch job 13", refused)
    planned = claim_run_folders([PlannedJob(RunFolder(tmp_path / f"runs/{number}"), Recipe()) for number in range(7)])
    allocation = Allocation("slurm", 1, 0, "", 1, 1, 10, python="python3", array_parallelism=2)
    with pytest.raises(UserError, match=r"violates.* 3 of 7 runs have been submitted; the same command"):
        submit_to_slurm(planned, allocation, follow=False)
    there = {each.run.root.name: each.run.root for each in planned if each.run.root.exists()}
    jobs = {name: [line["job"] for line in read_lines(root / "jobs/submissions.jsonl")] for name, root in there.items()}
    assert jobs == {"0": ["12"], "1": ["13_0"], "2": ["13_1"]}, "an array of one is a job"
    # The third, which is behind the first, was refused.
    sweeps = [path.name for path in (tmp_path / "runs/.sweeps").glob("*/*_submission.sh")]
    assert sweeps == ["13_submission.sh"]


# --- on a real Slurm --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = made.make_materials(tmp_path_factory.mktemp("materials"), per_class=16)
    (root / "shards/shifted").symlink_to("val")
    put_part(root / "shards/val", root / "shards/holdout")
    return root


@pytest.fixture(scope="module")
def small_arrays(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with arrays of two members at most. slurmctld reads that when it starts, and not at `scontrol
    reconfigure`."""
    before = slurm_cluster.conf.read_text()

    def restart(conf: str) -> None:
        slurm_cluster.conf.write_text(conf)
        slurm_cluster.stop("slurmctld")
        slurm_cluster.revive()

    restart(f"{before}\nMaxArraySize=2\n")
    try:
        yield slurm_cluster
    finally:
        restart(before)


@pytest.fixture
def blocker(small_arrays: Cluster, tmp_path, monkeypatch) -> Iterator[str]:
    """A job that does not start: what waits for it can be looked at, and ends with it."""
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    job = small_arrays.sbatch("--hold", "--output=/dev/null", "--wrap=true", cwd=tmp_path)
    try:
        yield job
    finally:
        small_arrays.call("scancel", "--user=root", "--state=PENDING")


def shown(cluster: Cluster, job: str) -> tuple[str, str, list[str]]:
    """Of an array: its indices, its throttle, what it waits for."""
    record = cluster.job(job)
    waits = [word.partition("(")[0] for word in record["Dependency"].split(",")]
    return record.get("ArrayTaskId", ""), record.get("ArrayTaskThrottle", ""), waits


@pytest.mark.slurm
def test_large_sweep_is_split_into_arrays(small_arrays: Cluster, materials, tmp_path, blocker):
    recipe = made.recipe_flags(materials, tmp_path / "unused")[:-2]
    words = [*recipe, *ON_ONE_NODE, "--seeds", 0, 1, 2, 3, "--array-parallelism", 1, "--after", blocker]
    said = made.submit(*words, "--dry-run", cwd=tmp_path).stdout
    assert "4 jobs as 2 arrays; this is the first one." in said and "#SBATCH --array=0-1%1" in said
    jobs = made.jobs_of(made.submit(*words, cwd=tmp_path), tmp_path)
    first, second = sorted({job.partition("_")[0] for job in jobs}, key=int)
    assert list(jobs) == [f"{first}_0", f"{first}_1", f"{second}_0", f"{second}_1"]
    assert shown(small_arrays, first) == ("0-1%1", "1", [f"afterok:{blocker}"])
    assert shown(small_arrays, second) == ("0-1%1", "1", [f"afterok:{blocker}", f"afterany:{first}_*"])
    for job, run in jobs.items():
        assert queued_job(RunFolder(run)) == f"{job} (pending)"
    again = made.submit(*words, cwd=tmp_path)
    assert again.stdout.count(": skipped") == 4


@pytest.mark.slurm
def test_large_conversion_is_split_into_arrays(small_arrays: Cluster, tmp_path):
    process = start_array(tmp_path, "getenv", '["SLURM_ARRAY_JOB_ID", "HOME", "USER", "HOME", "HOME"]', "--array", 5)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert len(output.split(",")) == 5
    assert re.search(r"array job \d+, \d+, \d+ of 5 tasks", errors)
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.slurm
def test_runs_of_a_plan_with_the_same_dependency_form_arrays(
    small_arrays: Cluster, materials, tmp_path, blocker, capsys
):
    out = tmp_path / "out"
    rows = ("--rows", "ft", "fd-clean", "wise-ft", "--seeds", 0, 1)
    words = plan_flags(materials, out, *ON_ONE_NODE, *rows, "--array-parallelism", 3, "--after", blocker)
    _, said = submits([*words, "--dry-run"], capsys)
    assert "Would submit 11 jobs, 4 of them in 1 array." in said
    jobs, _ = submits(words, capsys)
    assert len(jobs) == 11
    trained = [jobs[name] for name in ("ft-s0", "ft-s1", "fd-clean-s0", "fd-clean-s1")]
    first, second = sorted({job.partition("_")[0] for job in trained}, key=int)
    assert sorted(trained) == sorted(f"{array}_{member}" for array in (first, second) for member in (0, 1))
    assert shown(small_arrays, first) == ("0-1%2", "2", [f"afterok:{jobs['zero-shot']}"])
    assert shown(small_arrays, second) == ("0-1%1", "1", [f"afterok:{jobs['zero-shot']}"])
    for name in ("ft-eval-s1", "fd-clean-eval-s0"):
        run = name.replace("-eval", "")
        assert shown(small_arrays, jobs[name])[2] == [f"afterok:{jobs[run]}"]
    waits = shown(small_arrays, jobs["wise-ft-s1"])[2]
    assert waits == [f"afterok:{jobs['zero-shot']}", f"afterok:{jobs['ft-s1']}"]
    assert submits(words, capsys)[0] == {}
