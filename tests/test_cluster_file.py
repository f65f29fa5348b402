"""The cluster file and the flags: lookup, precedence, refusals, and the resulting sbatch file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from submitit.slurm.slurm import _make_sbatch_string

from cfmask.errors import UserError
from launch.allocation import resolve as allocations
from launch.allocation.cluster_file import OWN_KEYS, ClusterFile, find_cluster_file, read_cluster_file
from launch.allocation.resolve import (
    Allocation,
    resolve_allocation,
)
from launch.allocation.settings import FILE_KEYS, GPU_SETTINGS, gpus, minutes
from launch.arrays.arguments import add_array_arguments, resolve_array
from launch.submission.dependencies import after_success
from launch.submission.sbatch import ENVIRONMENT, rank_command, slurm_executor, slurm_parameters, write_environment
from launch.submit import parser

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def a_machine_with_slurm(monkeypatch, tmp_path):
    """A PATH with Slurm's commands, and no cluster file."""
    monkeypatch.setattr(allocations.shutil, "which", lambda name: f"/usr/bin/{name}" if name[0] == "s" else None)
    monkeypatch.delenv("CFMASK_CLUSTER", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def read(text: str, path: Path | None = None) -> ClusterFile:
    path = path or Path("some.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return read_cluster_file(path)


def allocate(*flags: object, file: str = "", last: dict | None = None) -> Allocation:
    return resolve_allocation(parser().parse_args(list(map(str, flags))), read(file), last)


def sbatch_file(allocation: Allocation, jobs: Path = Path("/runs/x/jobs")) -> str:
    parameters = slurm_parameters(allocation, "cfmask-x", shlex.quote(str(jobs)))
    return _make_sbatch_string(command="TASK", folder="/runs/x/jobs", **parameters)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_template_is_valid_and_has_every_key():
    template = (REPO / "slurm/cluster.toml").read_text()
    assert not read(template).values, "a copied template changes nothing"
    active = re.sub(r"^# (?=\[|[\w-]+ = )", "", template, flags=re.MULTILINE)
    active = active.replace('python = "/shared', '# python = "/shared')  # one of two ways
    file = read(active)
    assert {*file.values, "environment", "container", "sbatch"} == {*FILE_KEYS, *OWN_KEYS}
    assert file.image and file.mounts and file.environment and file.sbatch
    for way in GPU_SETTINGS:
        keys = {key: value for key, value in file.values.items() if key == way or key not in GPU_SETTINGS}
        keys["tasks_per_node"] = 8
        allocation = resolve_allocation(parser().parse_args([]), dataclasses.replace(file, values=keys))
        assert allocation.gpus_from == way and allocation.gpus_per_node == 8
        assert "--container-image" in sbatch_file(allocation)


@pytest.mark.parametrize("example", sorted((REPO / "slurm/examples").glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples_are_valid(example):
    sbatch_file(resolve_allocation(parser().parse_args([]), read_cluster_file(example)))


def test_wckey_reaches_every_kind_of_job(tmp_path):
    def asked(allocation) -> list[str]:
        text = slurm_executor(tmp_path, "x", "/runs/x", "0", allocation).batch_script()
        return [line for line in text.splitlines() if line.startswith("#SBATCH --wckey")]

    old_place = "[sbatch]\nwckey = 'old'"
    first = allocate("--wckey", "mine", file=old_place)
    assert asked(first) == ["#SBATCH --wckey=mine"], "the flag comes first"
    assert asked(allocate(file=old_place)) == ["#SBATCH --wckey=old"]
    assert asked(allocate(file="wckey = 'lab'")) == ["#SBATCH --wckey=lab"]
    assert asked(allocate()) == []
    for later in (after_success(first, ["7"]), dataclasses.replace(first, chain=("7",)), allocate(last=first.again)):
        assert asked(later) == ["#SBATCH --wckey=mine"]
    Path("cluster.toml").write_text("wckey = 'lab'")
    array = argparse.ArgumentParser()
    add_array_arguments(array)
    for flags, key in (([], "lab"), (["--wckey", "mine"], "mine")):
        assert resolve_array(array.parse_args(["--executor", "slurm", *flags])).allocation.wckey == key


def test_cluster_file_lookup_order(monkeypatch):
    assert find_cluster_file(None) is None
    at_home = Path("~/.config/cfmask/cluster.toml").expanduser()
    read("", at_home)
    assert find_cluster_file(None) == at_home
    read("", Path("cluster.toml"))
    assert find_cluster_file(None) == Path("cluster.toml")
    read("", Path("by-variable.toml"))
    monkeypatch.setenv("CFMASK_CLUSTER", "by-variable.toml")
    assert find_cluster_file(None) == Path("by-variable.toml")
    read("", Path("by-flag.toml"))
    assert find_cluster_file(Path("by-flag.toml")) == Path("by-flag.toml")
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    assert find_cluster_file(None) is None, "an empty variable means none"


def test_named_cluster_file_must_exist(monkeypatch):
    with pytest.raises(UserError, match="nope.toml, named by --cluster, does not exist"):
        find_cluster_file(Path("nope.toml"))
    monkeypatch.setenv("CFMASK_CLUSTER", "nope.toml")
    with pytest.raises(UserError, match=r"named by \$CFMASK_CLUSTER, does not exist"):
        find_cluster_file(None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes = 2\npartition = gpu", "is not TOML: .*line 2"),
        ("partion = 'gpu'", "there is no key partion. Did you mean partition.*account, array_parallelism"),
        ("lr = 3e-5", "there is no key lr. Choose from"),
        ("dependency = 'afterok:1'", "there is no key dependency"),
        ("nodes = '2'", "nodes has to be a whole number; it is '2'"),
        ("nodes = true", "nodes has to be a whole number; it is True"),
        ("time = 1.5", "time has to be a string or a whole number"),
        ("setup = 'module load cuda'", "setup has to be a list of strings"),
        ("setup = [1]", "setup has to be a list of strings"),
        ("setup = ['echo \"a']", "setup has to be whole commands of bash.*unexpected EOF"),
        ("setup = ['echo', ')']", "setup has to be whole commands of bash.*syntax error"),
        ("setup = ['cat <<EOF', 'x']", "setup has to be whole commands of bash.*here-document"),
        ("environment = 1", "environment has to be a table"),
        ("[environment]\npartition = 'gpu'", "partition is under .environment., but is a key: move it above"),
        ("[environment]\nA-B = '1'", "A-B has to be the name of a variable"),
        ("[environment]\nA = 1.5", "A has to be the name of a variable, with a string or a whole number"),
        ("[container]\nmounts = ['/a:/a']", "needs an image"),
        ("[container]\nimage = 'x'\nmounts = ['a:/a']", "'a:/a'; a mount is /FROM:/TO"),
        ("[container]\nimage = 'x'\nmounts = ['/a,b:/a']", "'/a,b:/a'; a mount is /FROM:/TO, .* without commas"),
        ("[sbatch]\ncomment = 'a\\b'", "comment has a backslash or line break"),
        ("[container]\nimage = 'x'\nname = 'y'", "there is no key container.name"),
        ("[sbatch]\nmem = '4G'", "must not have mem: it is the key memory"),
        ("[sbatch]\ngpus_per_node = 4", "must not have gpus_per_node: it is the key gpus_per_node"),
        ("[sbatch]\nsignal = 'USR1@60'", "must not have signal: cfmask sets it"),
        ("[sbatch]\nreboot = false", "true for an option without a value"),
    ],
)
def test_bad_entries_are_refused_with_file_and_key(text, said):
    with pytest.raises(UserError, match=f"(?s)The cluster file some.toml.*{said}"):
        read(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time = 'tomorrow'", "time is 'tomorrow', which is not minutes, or Slurm's"),
        ("nodes = 0", "nodes is 0, which is not a whole number, 1 or more"),
        ("gpus_per_node = 'a100'", "gpus_per_node is 'a100', which is not a number, or TYPE:NUMBER"),
        ("rendezvous_timeout = -1", "rendezvous_timeout is -1, which is not a number of minutes"),
        ("interface = 'ib 0'", "interface is 'ib 0', which is not a word"),
    ],
)
def test_file_values_are_converted_like_flags(text, said):
    with pytest.raises(UserError, match=said):
        allocate(file=text)


# --- how it adds up ---------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_defaults():
    file = "partition = 'gpu'\nqos = 'low'\nnodes = 2\ntime = '2-00:00:00'\ncpus_per_task = 12"
    a = allocate("--qos", "high", "--nodes", 4, file=file)
    assert (a.partition, a.qos, a.nodes, a.time_min, a.cpus_per_task) == ("gpu", "high", 4, 2880, 12)
    bare = allocate()
    assert (bare.partition, bare.nodes, bare.gpus_per_node, bare.time_min, bare.cpus_per_task) == (None, 1, 8, 1440, 8)


def test_resumed_run_keeps_its_allocation_unless_flags_override_it():
    flags = ("--nodes", 4, "--gpus-per-node", "a100:2", "--time", "2:00:00", "--after", 3, "--qos", "high")
    last = json.loads(json.dumps(allocate(*flags, file="cpus_per_task = 3").again))
    file = "nodes = 2\ngpus_per_node = 8\npartition = 'gpu'\nqos = 'low'"
    again = allocate(file=file, last=last)
    assert (again.nodes, again.gpus_per_node, again.gpu_type, again.tasks_per_node) == (4, 2, "a100", 2)
    assert (again.time_min, again.qos, again.partition, again.cpus_per_task) == (120, "high", "gpu", 8)
    assert again.dependency is None, "what it waited for is over"
    other = allocate("--nodes", 1, "--gpus-per-node", 4, "--time", 30, file=file, last=last)
    assert (other.nodes, other.gpus_per_node, other.gpu_type, other.time_min) == (1, 4, "", 30)
    assert allocate(last=json.loads(json.dumps(other.again))).again == other.again, "and the next time the same"
    by_tasks = allocate("--tasks-per-node", 3, "--gpus-per-node", 0, last=last)
    assert (by_tasks.gpus_per_node, by_tasks.world_size) == (0, 12)


def test_number_of_gpus_and_tasks_must_match():
    with pytest.raises(UserError, match="--tasks-per-node 2 contradicts --gpus-per-node with 8 GPUs, which"):
        allocate("--tasks-per-node", 2, file="gpus_per_node = 8")
    assert allocate("--tasks-per-node", 8, file="gpus_per_node = 8").gpus_per_node == 8
    assert allocate("--gpus-per-node", 4, file="gpus_per_node = 0\ntasks_per_node = 2").tasks_per_node == 4
    assert allocate(file="gpus_per_node = 0\ntasks_per_node = 2").world_size == 2
    with pytest.raises(UserError, match="--tasks-per-node 2 contradicts --gpus-per-node with 8 GPUs"):
        allocate(file="gpus_per_node = 8\ntasks_per_node = 2")


def test_on_this_machine_only_environment_is_taken_from_the_file():
    file = "nodes = 2\ngpus_per_node = 8\ninterface = 'ib0'\nsetup = ['module load x']\n[environment]\nA = 1"
    a = allocate("--executor", "local", file=file)
    assert (a.nodes, a.gpus_per_node, a.environment, a.setup) == (1, 0, {"A": "1"}, ())


def test_flags_for_slurm_are_refused_on_this_machine():
    with pytest.raises(UserError, match="--time, --partition, --after would do nothing: .* --executor is local"):
        allocate("--executor", "local", "--time", 30, "--partition", "gpu", "--after", 3)
    with pytest.raises(UserError, match="--nodes 2 needs Slurm"):
        allocate("--executor", "local", "--nodes", 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("2:00:00", 120), ("1-12", 2160), ("1-12:30", 2190), ("1-00:00:01", 1441)],
)
def test_time_in_slurms_formats(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "2h", "1:2:3:4", "-1", "1-", "inf"])
def test_other_forms_of_time_are_refused(text):
    with pytest.raises(ValueError, match="minutes|nothing"):
        minutes(text)


def test_gpus_with_and_without_a_type():
    assert (
        gpus("8") == ("", 8) and gpus("a100:4") == ("a100", 4) and gpus("nvidia_h100.80gb:1") == ("nvidia_h100.80gb", 1)
    )


def test_bad_flags_name_the_expected_value(capsys):
    for flag, value in (("--time", "soon"), ("--nodes", "0"), ("--after", "job7"), ("--gpus-per-node", "all")):
        with pytest.raises(SystemExit):
            parser().parse_args([flag, value])
        assert f"{flag}: '{value}' is not" in capsys.readouterr().err


# --- the sbatch file --------------------------------------------------------------------------------------------------


def test_sbatch_file_has_all_requested_options():
    flags = ("--nodes", 2, "--gpus-per-node", "a100:4", "--cpus-per-task", 12, "--time", "1-12:00:00", "--qos", "high")
    more = ("--constraint", "a100|h100", "--memory", 0, "--exclude", "n07,n[11-14]", "--account", "vision")
    text = sbatch_file(allocate(*flags, *more, "--partition", "gpu", "--after", 12, "13_4", "--interface", "ib0"))
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=a100:4",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --time=2160",
        "#SBATCH --qos=high",
        "#SBATCH --constraint='a100|h100'",
        "#SBATCH --mem=0",
        "#SBATCH --exclude='n07,n[11-14]'",
        "#SBATCH --account=vision",
        "#SBATCH --partition=gpu",
        "#SBATCH --dependency=afterok:12:13_4",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        ". /runs/x/jobs/environment.sh || exit 1",
    ):
        assert line in text.splitlines(), text
    assert re.search(r"^srun .* --cpus-per-task=12 --kill-on-bad-exit=1 --wait=0 TASK$", text, re.MULTILINE)


def test_no_gpus_are_requested_for_cpu_training():
    assert "gpus" not in sbatch_file(allocate("--gpus-per-node", 0, "--tasks-per-node", 2))


def test_after_and_dependency_are_exclusive():
    assert allocate("--dependency", "afterany:3,singleton").dependency == "afterany:3,singleton"
    with pytest.raises(UserError, match="--after and --dependency"):
        allocate("--dependency", "singleton", "--after", 3)


def test_options_of_sbatch_setup_and_srun_that_only_the_file_has():
    file = "setup = ['module load cuda']\nsrun_args = ['--mpi=none']\n[sbatch]\nmail-type = 'END'\nreboot = true"
    lines = sbatch_file(allocate(file=file)).splitlines()
    assert "#SBATCH --mail-type=END" in lines and "#SBATCH --reboot" in lines
    assert "module load cuda" in lines and any("--mpi=none TASK" in line for line in lines)


def test_a_container_runs_its_own_python_under_pyxis():
    a = allocate(file="[container]\nimage = '/i.sqsh'\nmounts = ['/lustre:/lustre', '/scratch:/tmp']")
    assert a.python == "python3"
    assert "--container-image=/i.sqsh --container-mounts=/lustre:/lustre,/scratch:/tmp TASK" in sbatch_file(a)
    assert allocations.uncovered(a, [Path("/lustre/runs/x"), Path("/home/me/runs")]) == [Path("/home/me/runs")]
    apptainer = "apptainer exec --nv /i.sif python3"
    assert allocate(file=f"python = '{apptainer}'").python == apptainer


def test_the_environment_is_set_on_the_node_where_variables_have_their_values(tmp_path):
    values = {
        "PLAIN": "x",
        "FILLED": "/scratch/$USER/${JOB}x",
        "ODD": 'a "b" `c` \\d $(e) $1 ${ ${!x} $',
        "SPACES": " a  b ",
    }
    toml = "[environment]\n" + "\n".join(f"{name} = '''{value}'''" for name, value in values.items())
    write_environment(allocate(file=toml), tmp_path)
    script = "\n".join(
        ["USER=me JOB=7", f". {tmp_path}/{ENVIRONMENT}", *(f'printf "%s\\0" "${name}"' for name in values)]
    )
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert said == ["x", "/scratch/me/7x", values["ODD"], " a  b "]


def test_tokens_are_in_a_file_that_only_its_owner_can_read(tmp_path):
    a = allocate("--interface", "ib0", file="[environment]\nHF_TOKEN = 'hf_secret'")
    assert "hf_secret" not in sbatch_file(a, jobs=tmp_path)
    (tmp_path / ENVIRONMENT).write_text("of the last submission")
    (tmp_path / ENVIRONMENT).chmod(0o644)
    write_environment(a, tmp_path)
    assert (tmp_path / ENVIRONMENT).stat().st_mode & 0o777 == 0o600
    exports = (tmp_path / ENVIRONMENT).read_text().splitlines()
    assert exports == [
        'export NCCL_SOCKET_IFNAME="=ib0"',
        'export GLOO_SOCKET_IFNAME="ib0"',
        'export HF_TOKEN="hf_secret"',
    ]


SCONTROL = """#!/bin/sh
case "$*" in *show*) echo "JobId=77 JobState=RUNNING PreemptTime=None" ;; --version) ;; *) echo "$@" ;; esac
"""


@pytest.mark.parametrize(
    ("setup", "reached"),
    [
        (["set -e"], True),
        (["set -eu"], True),
        (["set -euo pipefail"], True),
        (["set -x"], True),
        (["trap 'echo mine' EXIT"], True),
        (["false"], True),
        (["true \\"], True),
        (["exit 0"], False),
        (["exit 3"], False),
        (["set -e", "false"], False),
        (["set -u", "echo $NOT_SET"], False),
        (["set -e; set -o pipefail", "false | true"], False),
        (["exec true"], False),
        (["trap 'exit 0' EXIT", "exit 5"], False),
    ],
    ids=lambda value: " ; ".join(value) if isinstance(value, list) else "",
)
def test_setup_cannot_skip_the_last_lines_of_the_batch_script(tmp_path, setup, reached):
    """The last lines print the failure report and requeue the job; here a node is lost, so both have to happen."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    jobs = tmp_path / "jobs"
    (jobs / "failures").mkdir(parents=True)
    (jobs / "failures/77-0.txt").write_text("rank 1 failed first\n")
    (jobs / "failures/77-0.restart").touch()
    a = allocate(file=f"setup = {json.dumps(setup)}\n[environment]\nTOKEN = '$NOT_SET secret'")
    write_environment(a, jobs)
    text, ranks = re.subn(r"^srun .*$", 'echo RANKS "$TOKEN"; (exit 1)', sbatch_file(a, jobs=jobs), flags=re.MULTILINE)
    assert ranks == 1
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and done.stdout.endswith("rank 1 failed first\nrequeue 77\n"), done
    assert ("RANKS" in done.stdout) == reached
    assert "secret" not in done.stderr, "set -x ends with the setup"


def test_setup_that_exits_with_0_is_a_failure():
    for setup, code, said in (("exit 0", 1, "before the ranks started"), ("true", 0, "")):
        text = re.sub(r"^srun .*$", "true", sbatch_file(allocate(file=f"setup = ['{setup}']")), flags=re.MULTILINE)
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout


def test_exit_code_of_a_rank_requests_a_requeue(tmp_path):
    """For ranks without scontrol. Other exit codes become those of the job."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    for code, said in ((144, "requeue 77\n"), (0, ""), (1, ""), (143, "")):
        text = sbatch_file(allocate())
        text = re.sub(r"^srun .*$", f"(exit {code})", text, flags=re.MULTILINE)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77"}
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout) == (code, said)


def test_batch_script_prints_the_failure_report_and_requeues_after_a_lost_node(tmp_path):
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    jobs = tmp_path / "run folder" / "jobs"
    (jobs / "failures").mkdir(parents=True)
    (jobs / "failures/77-1.txt").write_text("rank 1 failed first\n")
    text = re.sub(r"^srun .*$", "(exit 1)", sbatch_file(allocate(), jobs=jobs), flags=re.MULTILINE)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}
    for lost, said in ((False, "rank 1 failed first\n"), (True, "rank 1 failed first\nrequeue 77\n")):
        if lost:
            (jobs / "failures/77-1.restart").touch()
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment)
        messages = re.sub(r"^\S+ \S+ ERROR batch \S+ \| ", "", done.stdout, flags=re.MULTILINE)
        assert (done.returncode, messages) == (1, said)


def test_signals_before_python_starts_are_ignored(tmp_path):
    """The command that starts a rank ignores USR2 and TERM until Python installs handlers."""
    (tmp_path / "launch/ranks").mkdir(parents=True)
    (tmp_path / "launch/ranks/start.py").write_text(
        "import os, signal, sys\n"
        "os.kill(os.getpid(), signal.SIGUSR2); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('alive', sys.argv[1:])"
    )
    command = f"{rank_command('python3', shlex.quote(str(tmp_path)))} -u -m submitit.core._submit 'a b'"
    for words in (
        shlex.split(command),
        ["bash", "-c", command],
    ):  # as submitit's local controller, and as a batch script
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.stdout == "alive ['-u', '-m', 'submitit.core._submit', 'a b']\n", done.stderr
