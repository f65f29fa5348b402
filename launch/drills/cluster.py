"""What only the administrator of a cluster can do to it, for drills on that of slurm/cluster.py: daemons that are
killed, settings that are changed, disks that are full or slow."""

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

from launch.drills.handle import Trouble, slurm

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Box:
    """A cluster that is ours to break. state: its folder."""

    state: Path

    @classmethod
    def find(cls) -> Box | None:
        """The one that SLURM_CONF names, if it is one, and we are root."""
        state = Path(os.environ.get("SLURM_CONF", "/nowhere/slurm.conf")).parent
        return cls(state) if (state / "cluster.json").exists() and os.geteuid() == 0 else None

    def _record(self) -> dict[str, Any]:
        return json.loads((self.state / "cluster.json").read_text())

    def processes(self, *variables: str) -> list[int]:
        """What runs in a job of this cluster, and has these variables: NAME=VALUE."""
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
        """SIGKILL to the daemon of a node and to all that runs there; first to what would still tell the controller how
        a job has ended, because a node that is lost does not."""
        self.kill(f"slurmd-{node}")
        for _ in range(2):  # what was being started
            mine = self.processes(f"SLURMD_NODENAME={node}")
            parents = {parent for pid in mine if (parent := _parent(pid)) and _command(parent).startswith("slurmstepd")}
            for pid in [*parents, *mine]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def revive(self) -> None:
        """Start what was killed."""
        record = self._record()
        size = ("--nodes", str(record["nodes"]), "--cpus-per-node", str(record["cpus_per_node"]))
        command = [sys.executable, str(REPO / "slurm/cluster.py"), "up", "--state", str(self.state), *size]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise Trouble(f"the cluster does not come up again: {done.stderr.strip()}")

    @contextlib.contextmanager
    def without_user_signal(self) -> Iterator[None]:
        """The cluster as one whose administrator has not set preempt_send_user_signal."""
        conf = self.state / "slurm.conf"
        before = conf.read_text()
        conf.write_text(re.sub(r"(?m)^SlurmctldParameters=preempt_send_user_signal$", "", before))
        slurm("scontrol", "reconfigure")
        try:
            yield
        finally:
            conf.write_text(before)
            slurm("scontrol", "reconfigure")

    @contextlib.contextmanager
    def small_disk(self, folder: Path, *, megabytes: int = 24) -> Iterator[None]:
        """The folder as a file system of its own; what was left there is an ordinary folder afterwards."""
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


def fill_disk(path: Path, *, leave: int) -> None:
    """A file that takes all the space there is, but for so many bytes."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    os.truncate(path, max(0, path.stat().st_size - leave))


@contextlib.contextmanager
def slow_disk(folder: Path) -> Iterator[Path]:
    """What is submitted meanwhile has a disk on which checkpoints do not end, as long as the file is there that this
    yields: Python imports sitecustomize when it starts, and sbatch hands PYTHONPATH on."""
    folder.mkdir()
    slow, before = folder / "slow", os.environ.get("PYTHONPATH")
    (folder / "sitecustomize.py").write_text(
        "import os, threading, time\n\n\n"
        "def fsync(descriptor, fsync=os.fsync):\n"
        f"    while threading.current_thread().name.startswith('checkpoint ') and os.path.exists({str(slow)!r}):\n"
        "        time.sleep(0.1)\n"
        "    fsync(descriptor)\n\n\n"
        "os.fsync = fsync\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    try:
        yield slow
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
