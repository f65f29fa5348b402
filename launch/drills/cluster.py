"""Faults that need an administrator, on the cluster of slurm/cluster.py: killed daemons, changed settings, a small file
system."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.drills.handle import DrillFailed
from launch.slurm.client import ask

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class DevCluster:
    """The cluster of slurm/cluster.py that runs in the folder ``state``."""

    state: Path

    @classmethod
    def find(cls) -> DevCluster | None:
        """The cluster that SLURM_CONF names, if slurm/cluster.py made it and this process is root."""
        state = Path(os.environ.get("SLURM_CONF", "/nowhere/slurm.conf")).parent
        return cls(state) if (state / "cluster.json").exists() and os.geteuid() == 0 else None

    def _record(self) -> dict[str, Any]:
        return json.loads((self.state / "cluster.json").read_text())

    def processes(self, *variables: str) -> list[int]:
        """Processes of this cluster's jobs with these variables, as NAME=VALUE, in their environment."""
        found = []
        for pid in [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                of_cluster = any(word.startswith(f"SLURM_CONF={self.state}/") for word in words)
                if of_cluster and any(word.startswith("SLURM_JOB_ID=") for word in words) and {*variables} <= {*words}:
                    found.append(pid)
        return found

    def kill(self, daemon: str) -> None:
        os.kill(self._record()["daemons"][daemon]["pid"], signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """Send SIGKILL to the daemon of a node and to everything that runs there. slurmstepd comes first: it would
        report the end of the job to the controller, which a lost node does not do."""
        self.kill(f"slurmd-{node}")
        for _ in range(2):  # the second time: processes that were just being started
            mine = self.processes(f"SLURMD_NODENAME={node}")
            parents = {parent for pid in mine if (parent := _parent(pid)) and _command(parent).startswith("slurmstepd")}
            for pid in [*parents, *mine]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def revive(self) -> None:
        """Start the daemons that were killed."""
        record = self._record()
        size = ("--nodes", str(record["nodes"]), "--cpus-per-node", str(record["cpus_per_node"]))
        command = [sys.executable, str(REPO / "slurm/cluster.py"), "up", "--state", str(self.state), *size]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise DrillFailed(f"the cluster cannot be restarted: {done.stderr.strip()}")

    @contextlib.contextmanager
    def without_user_signal(self) -> Iterator[None]:
        """Remove preempt_send_user_signal from the configuration."""
        conf = self.state / "slurm.conf"
        before = conf.read_text()
        conf.write_text(re.sub(r"(?m)^SlurmctldParameters=preempt_send_user_signal$", "", before))
        ask("scontrol", "reconfigure")
        try:
            yield
        finally:
            conf.write_text(before)
            ask("scontrol", "reconfigure")

    @contextlib.contextmanager
    def small_disk(self, folder: Path, *, megabytes: int = 24) -> Iterator[None]:
        """Mount a file system of this size at a new folder, and move its files to an ordinary folder afterwards."""
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "cfmask-drill", folder], check=True)
        kept = folder.with_name(f".{folder.name}.kept")
        try:
            yield
        finally:
            shutil.copytree(folder, kept, symlinks=True)
            subprocess.run(["umount", "-l", folder], check=True)
            folder.rmdir()
            kept.rename(folder)


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""
