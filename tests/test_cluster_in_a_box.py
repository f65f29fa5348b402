"""slurm/cluster.py: its cluster runs, accounts, preempts and requeues jobs, and is removed completely."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slurm_fixture import CLUSTER_TOOL, Cluster, slurm_module, tool, wait_until

cluster, configuration = slurm_module("cluster"), slurm_module("configuration")

pytestmark = pytest.mark.slurm


def processes_of(state: Path) -> list[str]:
    """Command lines of processes with the folder in command line or environment, and of the steps of its Slurm."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
                # slurmstepd writes its title over its environment.
                here = command.startswith(b"slurmstepd") and os.readlink(entry / "cwd").startswith(str(state))
            except OSError:
                continue
            if here or str(state).encode() in command + variables:
                found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_two_node_job_runs_on_both_nodes_and_is_accounted(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = slurm_cluster.sbatch(
        "--nodes=2", "--output=log", "--wrap=srun sh -c 'echo on $SLURMD_NODENAME'", cwd=tmp_path
    )
    slurm_cluster.wait_for_state(job, "COMPLETED")
    assert sorted((tmp_path / "log").read_text().split("\n")) == ["", "on n1", "on n2"]

    def accounted() -> str:
        return slurm_cluster.call("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,NodeList").strip()

    wait_until(lambda: accounted() == "COMPLETED|n[1-2]", "sacct shows the job as completed")


def test_high_preempts_low_with_its_signal_and_requeues_it(slurm_cluster: Cluster, tmp_path: Path) -> None:
    task = tmp_path / "task.sh"
    task.write_text(
        """\
trap 'echo $SLURMD_NODENAME got USR2' USR2
trap 'echo $SLURMD_NODENAME got TERM' TERM
echo $SLURMD_NODENAME starts, restarts ${SLURM_RESTART_COUNT:-0}
[ ${SLURM_RESTART_COUNT:-0} = 0 ] || exit 0
(trap "" USR2; exec sleep 300) &  # Slurm signals every process of a step, this one too
while kill -0 $!; do wait; done
"""
    )
    log = tmp_path / "log"
    slurm_cluster.call("scontrol", "update", "PartitionName=low", "GraceTime=2")
    try:
        low = slurm_cluster.sbatch(
            *("--partition=low", "--nodes=2", "--requeue", "--open-mode=append", "--output=log"),
            *("--time=30", "--signal=USR2@60", f"--wrap=srun bash {task}"),
            cwd=tmp_path,
        )
        wait_until(lambda: log.exists() and log.read_text().count("restarts 0") == 2, "both tasks have started")
        high = slurm_cluster.sbatch(
            "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1", cwd=tmp_path
        )
        slurm_cluster.wait_for_state(high, "COMPLETED")
        wait_until(lambda: slurm_cluster.job(low)["Reason"] == "BeginTime", "the preempted job is back in the queue")
        # A requeued job is held back for two minutes.
        slurm_cluster.call("scontrol", "update", f"jobid={low}", "StartTime=now")
        slurm_cluster.wait_for_state(low, "COMPLETED")
    finally:
        slurm_cluster.call("scontrol", "update", "PartitionName=low", "GraceTime=30")

    assert slurm_cluster.job(low)["Restarts"] == "1"
    output = log.read_text()
    for node in ("n1", "n2"):
        assert f"{node} starts, restarts 0" in output
        assert f"{node} got USR2" in output
        assert f"{node} starts, restarts 1" in output


def test_up_is_idempotent_and_revives_a_killed_daemon(slurm_cluster: Cluster) -> None:
    assert "already up" in tool(slurm_cluster.state, "up")
    before = {name: slurm_cluster.pid(name) for name in ("slurmctld", "slurmd-n1", "slurmd-n2")}
    os.kill(before["slurmctld"], signal.SIGKILL)
    command = [sys.executable, str(CLUSTER_TOOL), "status", "--state", str(slurm_cluster.state)]
    wait_until(lambda: subprocess.run(command, capture_output=True).returncode == 1, "status reports the dead daemon")
    slurm_cluster.revive()
    assert slurm_cluster.pid("slurmctld") != before["slurmctld"]
    assert slurm_cluster.pid("slurmd-n1") == before["slurmd-n1"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert slurm_cluster.call("sinfo", "-h", "-o", "%R").split() == ["low", "abrupt", "high"]


def test_daemons_listen_on_loopback_only(slurm_cluster: Cluster) -> None:
    if "listen on every interface" in tool(slurm_cluster.state, "status"):
        pytest.skip("no right to give the daemons a host name of their own")
    ports = {int(port) for port in re.findall(r"Port=(\d+)", slurm_cluster.conf.read_text())}
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            for row in Path(table).read_text().splitlines()[1:]:
                address, port = row.split()[1].split(":")
                if int(port, 16) in ports and row.split()[3] == "0A":  # listening
                    addresses.add(address)
    assert len(ports) == 4
    assert addresses == {"0100007F"}


def test_cluster_of_a_killed_session_is_removed_with_its_job(slurm_cluster: Cluster, tmp_path: Path) -> None:
    session = f"""
import os, signal
from pathlib import Path
from slurm_fixture import running_cluster, wait_until
with running_cluster() as cluster:
    without_environment = "env -i sh -c 'echo > $0/started; sleep 300; true' {tmp_path}"
    wrap = f"--wrap=srun sleep 300 & srun --overlap --nodes=1 {{without_environment}} & wait"
    job = cluster.sbatch("--nodes=2", "--output=/dev/null", wrap, cwd={str(tmp_path)!r})
    wait_until(Path({str(tmp_path)!r}, "started").exists, "it runs")
    print(cluster.state, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, "-c", session], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = Path(done.stdout.strip())
    wait_until(lambda: not processes_of(state) and not state.parent.exists(), "processes and folder are gone")
    assert not processes_of(tmp_path), "processes without an environment end with their job"
    assert processes_of(slurm_cluster.state), "the other cluster keeps running"


@pytest.mark.parametrize(
    ("version", "written"), [((22, 5), False), ((23, 11), False), ((24, 5), True), ((25, 11), True)]
)
def test_settings_of_later_versions_are_left_out_of_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], written: bool
) -> None:
    monkeypatch.setattr(configuration, "slurm_version", lambda: version)
    (tmp_path / "munge").mkdir()
    configuration.write_configuration(tmp_path, nodes=1, cpus_per_node=1)
    file = tmp_path / "cgroup.conf"
    assert file.exists() == written
    assert ("MaxBatchRequeue" in (tmp_path / "slurm.conf").read_text()) == written, "22.05 rejects unknown keys"
    assert not written or "CgroupPlugin=disabled" in file.read_text().splitlines()


def test_up_refuses_a_folder_that_is_not_a_cluster(slurm_cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    command = [sys.executable, str(CLUSTER_TOOL), "up", "--state", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* is not empty and not a cluster of this program\..*\n", done.stderr)
    assert (tmp_path / "thesis.tex").exists()


def test_second_up_waits_while_the_first_installs_packages(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """apt does not wait for the lock on its lists: the second command would fail, and all tests that need it skip."""
    with (cluster.PACKAGE_LOCK / "cfmask-slurm-packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = tmp_path / "not a name for a cluster"
        refused = subprocess.run([sys.executable, str(CLUSTER_TOOL), "up", "--state", str(state)], capture_output=True)
        assert refused.returncode == 2, "a refusal needs no lock"
        second = subprocess.Popen([sys.executable, str(CLUSTER_TOOL), "up", "--state", str(slurm_cluster.state)])
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1.5)
    assert second.wait(300) == 0
