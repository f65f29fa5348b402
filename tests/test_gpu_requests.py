"""Requests for GPUs and time: the ways that sites require, contradictions, and the options of sbatch."""

from __future__ import annotations

import json
import math
import subprocess
import time
from pathlib import Path

import pytest

from cfmask.errors import UserError
from cfmask.recipe import Recipe, Run
from launch.allocation import resolve as allocations
from launch.allocation.cluster_file import read_cluster_file
from launch.allocation.resolve import Allocation, check_arithmetic, resolve_allocation
from launch.checks.cluster import check_nodes, check_partition
from launch.checks.findings import OK, PROBLEM
from launch.restarts import deadline
from launch.slurm.client import SlurmUnavailable
from launch.slurm.executor import SlurmExecutor
from launch.slurm.texts import SlurmNode
from launch.submission.sbatch import slurm_parameters
from launch.submit import parser


@pytest.fixture(autouse=True)
def a_machine_with_slurm(monkeypatch, tmp_path):
    monkeypatch.setattr(allocations.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.chdir(tmp_path)


def allocate(*flags: object, file: str = "", last: dict | None = None) -> Allocation:
    Path("some.toml").write_text(file)
    return resolve_allocation(parser().parse_args(list(map(str, flags))), read_cluster_file(Path("some.toml")), last)


def options(allocation: Allocation, *names: str) -> list[str]:
    """The options of the sbatch file with these names."""
    executor = SlurmExecutor("jobs")
    executor.update_parameters(**slurm_parameters(allocation, "x", "jobs"))
    lines = [line.removeprefix("#SBATCH --") for line in executor.batch_script().splitlines()]
    return [line for line in lines if line.partition("=")[0] in names]


GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gres", "exclusive", "ntasks-per-node")

WAYS = [
    (("--gpus-per-node", "4"), ("", 4), ["gpus-per-node=4", "ntasks-per-node=4"]),
    (("--gpus-per-node", "2080ti:4"), ("2080ti", 4), ["gpus-per-node=2080ti:4", "ntasks-per-node=4"]),
    (("--gres", "gpu:4"), ("", 4), ["gres=gpu:4", "ntasks-per-node=4"]),
    (("--gres", "gpu:a100-sxm4-80gb:2"), ("a100-sxm4-80gb", 2), ["gres=gpu:a100-sxm4-80gb:2", "ntasks-per-node=2"]),
    (
        ("--gpus-per-task", "nvidia_a100_1g.5gb:1", "--tasks-per-node", "7"),
        ("nvidia_a100_1g.5gb", 7),
        ["gpus-per-task=nvidia_a100_1g.5gb:1", "ntasks-per-node=7"],
    ),
    (("--gpus-per-task", "1", "--tasks-per-node", "2"), ("", 2), ["gpus-per-task=1", "ntasks-per-node=2"]),
    (("--exclusive", "8"), ("", 8), ["exclusive", "ntasks-per-node=8"]),
    (("--exclusive", "0", "--tasks-per-node", "4"), ("", 0), ["exclusive", "ntasks-per-node=4"]),
    (("--gres", "gpu:0", "--tasks-per-node", "3"), ("", 0), ["ntasks-per-node=3"]),
    ((), ("", 8), ["gpus-per-node=8", "ntasks-per-node=8"]),
]


@pytest.mark.parametrize(("flags", "found", "asked"), WAYS, ids=lambda value: " ".join(map(str, value)))
def test_gpu_requests_by_flag_key_and_resume(flags, found, asked):
    by_flags = allocate(*flags)
    assert (by_flags.gpu_type, by_flags.gpus_per_node) == found and options(by_flags, *GPU_OPTIONS) == asked
    keys = dict(zip(flags[::2], flags[1::2], strict=True))
    lines = (
        f"{flag[2:].replace('-', '_')} = {value if value.isdigit() else json.dumps(value)}"
        for flag, value in keys.items()
    )
    by_file = allocate(file="\n".join(lines))
    assert by_file == allocate(*flags)
    last = json.loads(json.dumps(by_flags.again))
    assert options(allocate(last=last), *GPU_OPTIONS) == asked
    assert options(allocate(last=last, file="gres = 'gpu:3'"), *GPU_OPTIONS) == asked, "last wins over the file"
    other = allocate("--exclusive", 2, last=last, file="gres = 'gpu:3'")
    assert options(other, *GPU_OPTIONS) == ["exclusive", "ntasks-per-node=2"], "flags win over both"
    assert not {"gres", "gpus_per_task", "gpus_per_node"} & other.again.keys()


def test_a_rank_sees_one_gpu_where_each_task_asks_for_its_own():
    """As seen on Slurm 22.05 with typed GPUs: srun's own request would be TYPE:1, and not bound to tasks."""
    a = allocate("--gpus-per-task", "2080ti:1", "--tasks-per-node", 2)
    assert "--gpus-per-task=1" in slurm_parameters(a, "x", "jobs")["srun_args"]
    assert not [arg for arg in slurm_parameters(allocate("--gres", "gpu:2"), "x", "jobs")["srun_args"] if "gpu" in arg]


@pytest.mark.parametrize("managed", [True, False])
@pytest.mark.parametrize(("gpus", "asked"), [(4, "gpu:4"), (0, "")])
def test_ranks_of_exclusive_nodes_request_managed_gpus(gpus, asked, managed):
    """A job with --exclusive alone has the GPUs of its nodes, and its steps have none that they do not ask for."""
    setup = slurm_parameters(allocate("--exclusive", gpus), "x", "jobs")["setup"]
    script = "\n".join([*setup, 'echo "${SLURM_GRES:-}"', ")"])
    environment = {"PATH": "/usr/bin:/bin"} | ({"SLURM_GPUS_ON_NODE": "4"} if managed else {})
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == (asked if managed else "")


def test_other_gres_are_kept_beside_gpu_requests():
    file = "[sbatch]\ngres = 'tmpdisk:100G,craynetwork:1'"
    assert options(allocate("--gres", "gpu:2", file=file), "gres") == ["gres=gpu:2,tmpdisk:100G,craynetwork:1"]
    with_gpus = options(allocate("--gpus-per-node", 2, file=file), "gres", "gpus-per-node")
    assert with_gpus == ["gpus-per-node=2", "gres=tmpdisk:100G,craynetwork:1"]
    assert options(allocate("--gpus-per-node", 0, file=file), "gres") == ["gres=tmpdisk:100G,craynetwork:1"]


def test_tasks_flag_combines_with_gpus_per_task_of_the_file():
    a = allocate("--tasks-per-node", 4, file="gpus_per_task = 'a100:1'\ntasks_per_node = 8")
    assert (a.gpus_per_node, a.gpu_type, a.tasks_per_node) == (4, "a100", 4)


def test_tasks_of_a_flag_leave_the_gpus_of_the_file():
    a = allocate("--tasks-per-node", 4, file="gres = 'gpu:a100:4'")
    assert (a.gpus_per_node, a.gpu_type, a.tasks_per_node) == (4, "a100", 4)
    a = allocate("--tasks-per-node", 4, "--gpus-per-node", 0, file="gres = 'gpu:a100:4'")
    assert (a.gpus_per_node, a.tasks_per_node) == (0, 4)


@pytest.mark.parametrize(
    ("flags", "file", "said"),
    [
        (("--gres", "gpu:4", "--gpus-per-node", 4), "", "--gpus-per-node and --gres are different ways"),
        (("--gres", "gpu:4", "--exclusive", 4), "", "--gres and --exclusive are different ways"),
        ((), "gres = 'gpu:4'\nexclusive = 4", "--gres and --exclusive are different ways"),
        (("--nodes", 2), "gpus_per_node = 4\ngpus_per_task = 1\ntasks_per_node = 4", "different ways"),
        (("--gpus-per-task", 1), "", "say with --tasks-per-node how many"),
        (("--gres", "gpu:4", "--tasks-per-node", 2), "", "--tasks-per-node 2 contradicts --gres with 4 GPUs"),
        (("--exclusive", 4, "--tasks-per-node", 2), "", "--tasks-per-node 2 contradicts --exclusive with 4 GPUs"),
        (("--tasks-per-node", 2), "gpus_per_node = 4", "--tasks-per-node 2 contradicts --gpus-per-node with 4 GPUs"),
        (("--tasks-per-node", 2), "gres = 'gpu:a100:4'", "--tasks-per-node 2 contradicts --gres with 4 GPUs"),
        ((), "[sbatch]\nexclusive = true", "must not have exclusive: it is the key exclusive"),
        ((), "[sbatch]\ngres = 'gpu:a100:4'", "gres requests GPUs: one of the keys"),
        ((), "[sbatch]\ngres = 'tmpdisk:1G,gpu'", "gres requests GPUs"),
        ((), "[sbatch]\ngpus = 8", "must not have gpus: one of the keys gpus_per_node, gres"),
        ((), "[sbatch]\ngpus-per-socket = 2", "must not have gpus-per-socket: one of the keys"),
        ((), "[sbatch]\ngpus_per_task = 1", "it is the key gpus_per_task"),
        ((), "[sbatch]\nntasks = 4", "a node has as many tasks as GPUs"),
        ((), "[sbatch]\ncpus-per-gpu = 4", "it is the key cpus_per_task"),
        ((), "[sbatch]\nno-requeue = true", "must not have no-requeue: cfmask sets it"),
        ((), "[sbatch]\nexclus = true", "must not have exclus"),
    ],
)
def test_contradictory_gpu_requests_are_refused(flags, file, said):
    with pytest.raises(UserError, match=said):
        allocate(*flags, file=file)


@pytest.mark.parametrize(
    "flags",
    [
        ("--gpus-per-task", "2"),
        ("--gpus-per-task", "a100:2"),
        ("--gpus-per-node", "a100:0"),
        ("--gres", "gpu:a100:0"),
        ("--gres", "4"),
        ("--gres", "gpu"),
        ("--gres", "gpu:a100"),
        ("--gres", "gpu:4,tmpdisk:1G"),
        ("--exclusive", "user"),
        ("--gpus-per-node", "a100"),
        ("--gpus-per-node", "4:4"),
        ("--time", "0"),
    ],
    ids=" ".join,
)
def test_bad_flag_values_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(list(flags))
    assert f"{flags[0]}: '{flags[1]}' is not" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--gres=gpu:1", "--gpus-per-task=1", "--exclusive=1", "--time=UNLIMITED"])
def test_requests_to_slurm_are_refused_on_this_machine(flag):
    with pytest.raises(UserError, match=f"{flag.partition('=')[0]} would do nothing"):
        allocate("--executor", "local", flag)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
@pytest.mark.parametrize("graphs", ["auto", "on", "off"])
@pytest.mark.parametrize("gpus", [0, 2])
def test_gpu_only_settings_are_refused_without_a_gpu(precision, graphs, gpus):
    a = allocate("--gpus-per-node", gpus)
    recipe = Recipe(run=Run(precision=precision, cuda_graphs=graphs))
    if gpus == 0 and (precision == "tf32" or graphs == "on"):
        with pytest.raises(UserError, match="would do nothing: the allocation .* has no GPU"):
            check_arithmetic(recipe.run.precision, a, cuda_graphs=recipe.run.cuda_graphs)
    else:
        check_arithmetic(recipe.run.precision, a, cuda_graphs=recipe.run.cuda_graphs)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "asked", "notice"),
    [
        ("90", ["time=90"], ["signal=USR2@120"]),
        ("10", ["time=10"], ["signal=USR2@60"]),
        ("1:30:00", ["time=90"], ["signal=USR2@120"]),
        ("2-12", ["time=3600"], ["signal=USR2@120"]),
        ("UNLIMITED", ["time=UNLIMITED"], ["signal=USR2@120"]),
        ("infinite", ["time=UNLIMITED"], ["signal=USR2@120"]),
        ("partition", [], ["signal=USR2@120"]),
    ],
)
def test_time_limits_as_flag_and_key(given, asked, notice):
    for a in (allocate("--time", given), allocate(file=f"time = {given if given.isdigit() else repr(given)}")):
        assert options(a, "time") == asked and options(a, "signal") == notice
        assert options(allocate(last=json.loads(json.dumps(a.again)) | {"time": a.time}), "time") == asked


@pytest.mark.parametrize(
    ("job", "left"),
    [
        ({"TimeLimit": "01:00:00", "RunTime": "00:10:00"}, 3000 - 180),
        ({"TimeLimit": "00:10:00", "RunTime": "00:00:05"}, 595 - 60),
        ({"TimeLimit": "2-00:00:00", "RunTime": "1-23:00:00"}, 3600 - 180),
        ({"TimeLimit": "UNLIMITED", "RunTime": "00:00:05"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_job_without_a_known_limit_asks_slurm_for_it(monkeypatch, job, left):
    monkeypatch.setattr(deadline, "show_job", lambda name, **_: job)
    assert deadline.stop_time(None, "77") - time.monotonic() == pytest.approx(left, abs=1)
    assert deadline.stop_time(None, None) == math.inf
    assert deadline.stop_time(60, "77") - time.monotonic() == pytest.approx(3600 - 180, abs=1)


def test_a_job_without_scontrol_takes_its_end_from_the_environment(monkeypatch):
    def unavailable(name, **_):
        raise SlurmUnavailable("There is no scontrol on this machine.")

    monkeypatch.setattr(deadline, "show_job", unavailable)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline.stop_time(None, "77") == math.inf
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert deadline.stop_time(None, "77") - time.monotonic() == pytest.approx(3600 - 180, abs=2)


@pytest.mark.slurm
def test_slurm_applies_time_limits_and_jobs_read_them(slurm_cluster, tmp_path):
    slurm_cluster.call("scontrol", "update", "PartitionName=abrupt", "DefaultTime=00:07:00")
    found = {}
    for given in ("UNLIMITED", "partition", "2-00", "30"):
        allocation = allocate("--gpus-per-node", 0, "--cpus-per-task", 1, "--partition", "abrupt", "--time", given)
        executor = SlurmExecutor(tmp_path / "jobs")
        executor.update_parameters(**slurm_parameters(allocation, "x", str(tmp_path / "jobs")))
        (tmp_path / "script.sh").write_text(executor.batch_script())
        job = slurm_cluster.sbatch("--hold", str(tmp_path / "script.sh"), cwd=tmp_path)
        found[given] = slurm_cluster.job(job)["TimeLimit"]
        slurm_cluster.call("scancel", job)
    assert found == {"UNLIMITED": "UNLIMITED", "partition": "00:07:00", "2-00": "2-00:00:00", "30": "00:30:00"}
    for more, left in ((("--partition=abrupt",), 420 - 42), (("--partition=abrupt", "--time=UNLIMITED"), math.inf)):
        job = slurm_cluster.sbatch(*more, "--output=/dev/null", "--wrap=sleep 60", cwd=tmp_path)
        slurm_cluster.wait_for_state(job, "RUNNING")
        assert deadline.stop_time(None, job) - time.monotonic() == pytest.approx(left, abs=15)
        slurm_cluster.call("scancel", job)
    slurm_cluster.call("scontrol", "update", "PartitionName=abrupt", "DefaultTime=UNLIMITED")


# --- doctor.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "most", "default", "state", "said"),
    [
        ("UNLIMITED", "UNLIMITED", "NONE", OK, "no limit requested; gpu allows any time"),
        ("UNLIMITED", "1-00:00:00", "NONE", PROBLEM, "--time requests no limit"),
        ("partition", "1-00:00:00", "02:00:00", OK, "the default of gpu, 02:00:00"),
        ("partition", "1-00:00:00", "NONE", OK, "the default of gpu, 1-00:00:00"),
        ("1440", "1-00:00:00", "NONE", OK, "1440 min requested"),
        ("1441", "1-00:00:00", "NONE", PROBLEM, "--time requests 1441 min"),
    ],
)
def test_doctor_understands_time_limits(given, most, default, state, said):
    partition = {"PartitionName": "gpu", "State": "UP", "MaxTime": most, "DefaultTime": default}
    found = check_partition([partition], "gpu", allocate("--time", given).time)[-1]
    assert found.state == state and said in found.found


@pytest.mark.parametrize(
    ("flags", "gres", "state"),
    [
        (("--gres", "gpu:2080ti:4"), "gpu:2080ti:4(S:0-1)", OK),
        (("--gres", "gpu:2080ti:4"), "gpu:a100:4", PROBLEM),
        (("--gpus-per-task", "1", "--tasks-per-node", "4"), "gpu:4", OK),
        (("--gpus-per-task", "1", "--tasks-per-node", "8"), "gpu:4", PROBLEM),
        (("--exclusive", "4"), "(null)", OK),
    ],
)
def test_doctor_finds_nodes_with_the_requested_gpus(flags, gres, state):
    a = allocate(*flags, "--cpus-per-task", 1)
    assert check_nodes([SlurmNode("gpu", "n1", "idle", 64, gres)], ["gpu"], a).state == state
