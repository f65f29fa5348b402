"""Finds Slurm's programs on this machine, or installs them from Debian's packages."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from processes import processes

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "munge")
PROGRAMS = (
    *("slurmctld", "slurmd", "slurmdbd", "srun", "sbatch", "sacct", "munged"),
    *("mariadbd", "mariadb-install-db", "my_print_defaults"),
)
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"))


class Refused(Exception):
    """Nothing was done; the message says why. Exit code 2."""


class Failed(Exception):
    """A step failed. Exit code 1."""


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def slurm_version() -> tuple[int, int]:
    """Returns (22, 5) for Slurm 22.05.8.

    Raises:
        Failed: slurmd does not print a version.
    """
    done = subprocess.run([shutil.which("slurmd", path=PATH) or "slurmd", "-V"], capture_output=True, text=True)
    found = re.search(r"(\d+)\.(\d+)", done.stdout)
    if found is None:
        raise Failed(f"`slurmd -V` does not print a version: {(done.stdout + done.stderr).strip()!r}")
    return int(found[1]), int(found[2])


def install() -> None:
    """Install the Debian packages.

    Raises:
        Refused: no apt-get, or it failed.
    """
    if shutil.which("apt-get", path=PATH) is None:
        raise Refused("Slurm is not installed, and without apt-get (Debian, Ubuntu) it cannot be installed from here.")
    print(f"installing {' '.join(PACKAGES)} and MariaDB with apt-get ...", file=sys.stderr)
    had_munged = munged_runs()

    def apt(*arguments: str) -> str:
        command = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", *arguments]
        settings = os.environ | {"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
        done = subprocess.run(command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise Refused(f"Slurm is not installed, and `{' '.join(command)}` failed: {' '.join(last)}")
        return done.stdout

    apt("update")
    # MariaDB's programs without its service; older releases have a version in the package's name.
    pattern = r"^mariadb-(server|client)-core(-[0-9.]+)?$"
    search = ["apt-cache", "--names-only", "search", pattern]
    found = [line.split()[0] for line in subprocess.run(search, capture_output=True, text=True).stdout.splitlines()]
    cores = [min((name for name in found if kind in name), key=len, default=None) for kind in ("server", "client")]
    database = [name for name in cores if name] or ["mariadb-server"]
    apt("install", "-y", "--no-install-recommends", *PACKAGES, *database)
    if not had_munged and munged_runs():
        # The package starts a munged for the machine, which the cluster does not use.
        subprocess.run(["service", "munge", "stop"], stdin=subprocess.DEVNULL, capture_output=True)
    if missing := missing_programs():
        raise Refused(f"the packages are installed, but these programs are still missing: {', '.join(missing)}.")


def munged_runs() -> bool:
    names = []
    for pid in processes():
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/{pid}/comm").read_text().strip())
    return "munged" in names
