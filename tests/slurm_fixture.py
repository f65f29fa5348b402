"""The fixture ``slurm_cluster``: a real two-node Slurm.

    pytestmark = pytest.mark.slurm

    def test_something(slurm_cluster: Cluster, tmp_path: Path) -> None:
        job = slurm_cluster.sbatch("--nodes=2", "--wrap=srun hostname", cwd=tmp_path)
        slurm_cluster.wait_for_state(job, "COMPLETED")

The cluster is started once per session with `slurm/cluster.py`, in a folder of its own, and SLURM_CONF names it while
it runs, so that sbatch, srun and submitit find it. If it cannot be started, the tests skip and say why.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from cfmask.runtime.machine import process_runs

CLUSTER_TOOL = Path(__file__).resolve().parents[1] / "slurm" / "cluster.py"

# Stops the cluster when its standard input ends: when the session closes it, or is killed.
KEEPER = """
import shutil, subprocess, sys
sys.stdin.read()
code = subprocess.call(sys.argv[2:])
shutil.rmtree(sys.argv[1], ignore_errors=True)
sys.exit(code)
"""


class CannotBeHad(Exception):
    """This machine cannot run the cluster; the message says why."""


def slurm_module(name: str) -> ModuleType:
    """A module of slurm/, whose programs import the modules beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CLUSTER_TOOL.parent)
        return importlib.import_module(name)


@dataclass(frozen=True)
class Cluster:
    """A running Slurm with nodes n1 and n2 of 4 CPUs, and partitions `low` (preemptible, default) and `high`."""

    state: Path

    @property
    def conf(self) -> Path:
        """The value for SLURM_CONF."""
        return self.state / "slurm.conf"

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command of Slurm against this cluster. Returns its output; fails with its errors."""
        environment = os.environ | {"SLURM_CONF": str(self.conf)}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path) -> str:
        """Submit a job from a folder, which also gets its log. Returns its id."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job` (JobState, Restarts, …)."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_state(self, job: str, state: str, timeout: float = 300) -> None:
        """Wait until the controller shows this state of the job."""
        wait_until(lambda: self.job(job)["JobState"] == state, f"job {job} is {state}", timeout)

    def start_again_now(self, job: str) -> None:
        """Skip most of the two minutes for which a requeued job is held; its first start needs some seconds to end."""
        self.wait_for_state(job, "PENDING")
        time.sleep(3)
        self.call("scontrol", "update", f"jobid={job}", "StartTime=now")

    def pid(self, daemon: str) -> int:
        """The process id of a daemon: slurmctld, slurmd-n1, slurmd-n2, slurmdbd, mariadbd, munged."""
        return json.loads((self.state / "cluster.json").read_text())["daemons"][daemon]["pid"]

    def stop(self, daemon: str) -> None:
        """Stop a daemon with SIGTERM: after SIGKILL, slurmctld forgets the ends of jobs, and requeues them."""
        pid = self.pid(daemon)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not process_runs(pid), f"{daemon} has ended")

    def revive(self) -> None:
        """Restart the daemons that were killed."""
        tool(self.state, "up")


def wait_until(holds: Callable[[], bool], what: str, timeout: float = 300) -> None:
    """Check the condition five times a second; fail with its description after the timeout."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"timed out after {timeout:.0f} s waiting until {what}"
        time.sleep(0.2)


def tool(state: Path, verb: str, *flags: str) -> str:
    """Run a verb of slurm/cluster.py. Returns its output."""
    command = [sys.executable, str(CLUSTER_TOOL), verb, "--state", str(state), *flags]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 2:
        raise CannotBeHad(done.stderr.strip().removeprefix("error: "))
    assert done.returncode == 0, f"`cluster.py {verb}` failed:\n{done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def running_cluster(*flags: str) -> Iterator[Cluster]:
    """Start a cluster in a new folder, with flags of `up`, and stop it at the end, even if this process is killed.

    Raises:
        CannotBeHad: there is no permission, or packages are missing.
    """
    folder = Path(tempfile.mkdtemp(prefix="cfmask-slurm-"))  # short: a socket's path holds 108 bytes
    state = folder / "state"
    down = [sys.executable, str(CLUSTER_TOOL), "down", "--state", str(state)]
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(folder), *down],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # a reader of this process's stderr must not wait for the keeper
        start_new_session=True,  # Ctrl-C ends the tests, which closes the keeper's standard input
    )
    assert keeper.stdin is not None
    try:
        tool(state, "up", *flags)
        yield Cluster(state)
    finally:
        keeper.stdin.close()
        code = keeper.wait(timeout=300)
    assert code == 0, f"`{' '.join(down)}` failed with exit code {code}"


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """A two-node Slurm for the session, which SLURM_CONF names."""
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(running_cluster())
        except CannotBeHad as reason:
            pytest.skip(f"no Slurm on this machine: {reason}")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(cluster.conf))
        yield cluster
