"""A real two-node Slurm for the tests that need one: the `slurm_cluster` fixture.

    pytestmark = pytest.mark.slurm

    def test_something(slurm_cluster: Cluster, tmp_path: Path) -> None:
        job = slurm_cluster.sbatch("--nodes=2", "--wrap=srun hostname", cwd=tmp_path)
        slurm_cluster.wait_for_state(job, "COMPLETED")

The cluster is brought up once a session through `slurm/cluster.py`, in a folder of its own, and SLURM_CONF points at it
for as long as it is up, so sbatch, srun and submitit find it. Where it cannot be had, the tests skip and say why.
"""

from __future__ import annotations

import contextlib
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

import pytest

from cfmask.runtime.machine import process_runs

CLUSTER_TOOL = Path(__file__).resolve().parents[1] / "slurm" / "cluster.py"

# Takes the cluster down when its standard input ends: when the session says so, and as well when the session is killed.
KEEPER = """
import shutil, subprocess, sys
sys.stdin.read()
code = subprocess.call(sys.argv[2:])
shutil.rmtree(sys.argv[1], ignore_errors=True)
sys.exit(code)
"""


class CannotBeHad(Exception):
    """This machine cannot run the cluster; the message says why in one line."""


@dataclass(frozen=True)
class Cluster:
    """A Slurm that is up, with nodes n1, n2 of 4 CPUs and partitions `low` (preemptible, default) and `high`."""

    state: Path

    @property
    def conf(self) -> Path:
        """The slurm.conf to point SLURM_CONF at."""
        return self.state / "slurm.conf"

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Run one of Slurm's commands against this cluster; return its output, fail with its errors."""
        environment = os.environ | {"SLURM_CONF": str(self.conf)}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path) -> str:
        """Submit a job from (and with its log in) a folder; return its id."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what the controller knows of a job, as `scontrol show job` names it (JobState, Restarts, ...)."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_state(self, job: str, state: str, timeout: float = 300) -> None:
        """Wait until the controller gives the job this state."""
        wait_until(lambda: self.job(job)["JobState"] == state, f"job {job} is {state}", timeout)

    def start_again_now(self, job: str) -> None:
        """Skip most of the two minutes that a requeued job is held for; some are needed for its first life to end."""
        self.wait_for_state(job, "PENDING")
        time.sleep(3)
        self.call("scontrol", "update", f"jobid={job}", "StartTime=now")

    def pid(self, daemon: str) -> int:
        """Return the process id of a daemon: slurmctld, slurmd-n1, slurmd-n2, slurmdbd, mariadbd, munged."""
        return json.loads((self.state / "cluster.json").read_text())["daemons"][daemon]["pid"]

    def stop(self, daemon: str) -> None:
        """End a daemon in an orderly way: killed, slurmctld forgets the ends of jobs, and requeues them."""
        pid = self.pid(daemon)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not process_runs(pid), f"{daemon} has ended")

    def revive(self) -> None:
        """Start those daemons again that were killed."""
        tool(self.state, "up")


def wait_until(holds: Callable[[], bool], what: str, timeout: float = 300) -> None:
    """Look five times a second whether it holds; fail saying what did not come true."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain until {what}"
        time.sleep(0.2)


def tool(state: Path, verb: str, *flags: str) -> str:
    """Run a verb of slurm/cluster.py; return what it printed."""
    command = [sys.executable, str(CLUSTER_TOOL), verb, "--state", str(state), *flags]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 2:
        raise CannotBeHad(done.stderr.strip().removeprefix("error: "))
    assert done.returncode == 0, f"`cluster.py {verb}` failed:\n{done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def running_cluster(*flags: str) -> Iterator[Cluster]:
    """Bring a cluster up in a new folder, with flags of `up`, and take it down at the end, even if this process is
    killed.

    Raises:
        CannotBeHad: no right to, or no packages.
    """
    folder = Path(tempfile.mkdtemp(prefix="cfmask-slurm-"))  # short: a socket's path holds 108 bytes
    state = folder / "state"
    down = [sys.executable, str(CLUSTER_TOOL), "down", "--state", str(state)]
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(folder), *down],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # ours may be a pipe whose reader must not wait for the keeper
        start_new_session=True,  # a Ctrl-C is for the tests; it ends them, and that ends our standard input
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
    """A two-node Slurm, up for the session, found through SLURM_CONF."""
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(running_cluster())
        except CannotBeHad as reason:
            pytest.skip(f"no Slurm on this machine: {reason}")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(cluster.conf))
        yield cluster
