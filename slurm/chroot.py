#!/usr/bin/env python3
"""Run a command of this repository in another Debian release, to try it with that release's Slurm and Python.

    python3 slurm/chroot.py                                   the tests that need Slurm, the fault matrix among them
    python3 slurm/chroot.py --root /var/tmp/trixie -- bash    a shell there

The default is Debian 13 "trixie": Slurm 24.11, Python 3.13, MariaDB 11.8. The host needs root, debootstrap, a Debian
mirror that apt uses, and about 12 GB of disk for the root folder; its own release does not matter.

    ROOT/                       made by debootstrap on first use, reused afterwards
         var/lib/cfmask.json    the stamp: release and packages; without it, an interrupted ROOT is made again
         opt/cfmask-venv/       CFMASK_VENV: the virtual environment that tools/test.py makes there

The repository is mounted into ROOT under its own path. /proc, /dev, /sys and the repository are mounted in a private
mount namespace, and the command runs in a process namespace of its own: when this program ends, or is killed, the
kernel ends every process inside and drops the mounts. The network is the host's. Standard library only.

Exit codes: the command's; 2 refused; 130 interrupted.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("ca-certificates", "git", "procps", "python3", "python3-venv")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEFAULT_COMMAND = ("python3", "tools/test.py", "-m", "slurm and not slow")
VENV = "/opt/cfmask-venv"
STAMP = "var/lib/cfmask.json"
MADE_BY = "slurm/chroot.py"
NEEDED_BYTES = 12 * 10**9
# Variables that tell programs how to reach the network; files that they name are mounted too.
NETWORK = re.compile(r"(PIP_\w+|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|(https?|all|no)_proxy)", re.IGNORECASE)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x04000000, 0x08000000, 0x20000000  # linux/sched.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Refused(Exception):
    """It cannot be done on this host; the message says why and what to do."""


# ----------------------------------------------------------------------------------------------------- the root folder


def make_root(root: Path, suite: str) -> None:
    """Make the root folder with debootstrap, unless an earlier call has.

    Raises:
        Refused: the folder holds something else, no debootstrap, keyring, mirror or disk, or debootstrap failed.
    """
    wanted = {"made_by": MADE_BY, "suite": suite, "packages": list(PACKAGES)}
    marker = root.with_name(root.name + ".unfinished")
    if (root / STAMP).exists():
        found = json.loads((root / STAMP).read_text())
        if found.get("suite") != suite:
            raise Refused(
                f"{root} holds Debian {found.get('suite')!r}, not {suite!r}. Give another folder with --root."
            )
        if found == wanted:
            return
    elif root.exists() and any(root.iterdir()) and not marker.exists():
        raise Refused(f"{root} is not empty and was not made by {MADE_BY}. Give another folder with --root.")

    if shutil.which("debootstrap") is None:
        raise Refused("debootstrap is not installed: run `apt-get install debootstrap`.")
    if not KEYRING.exists():
        raise Refused(f"{KEYRING} is missing: run `apt-get install debian-archive-keyring`.")
    mirror = debian_mirror()
    root.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(root.parent).free) < NEEDED_BYTES:
        raise Refused(
            f"{root} needs {NEEDED_BYTES / 1e9:.0f} GB of disk and {free / 1e9:.1f} GB are free there: "
            "make room, or give a folder on a larger disk with --root."
        )
    marker.touch()
    shutil.rmtree(root, ignore_errors=True)  # nothing is mounted there: mounts live in the namespace of their process
    print(f"making {root}: Debian {suite}, about 2 minutes (log: {root}/debootstrap/debootstrap.log)", flush=True)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", f"--keyring={KEYRING}"]
    in_own_mounts = ["unshare", "--mount", "--propagation", "private", *command, suite, str(root), mirror]
    done = subprocess.run(in_own_mounts, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise Refused(f"`{shlex.join(command)} {suite} {root} …` failed (exit code {done.returncode}): {last}")
    # No package may start its service in there: the tests' daemons are private ones.
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    settings = subprocess.run(["apt-config", "dump"], capture_output=True, text=True).stdout.splitlines()
    network = [line for line in settings if re.match(r"Acquire::(https?::|Retries)", line)]
    (root / "etc/apt/apt.conf.d/90host").write_text("".join(line + "\n" for line in network))
    (root / STAMP).write_text(json.dumps(wanted) + "\n")
    marker.unlink()


def debian_mirror() -> str:
    """The Debian mirror that this host's apt is set up with, which has every release.

    Raises:
        Refused: apt has none.
    """
    asked = ["apt-get", "indextargets", "--format", "$(LABEL) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        lines = []
    mirrors = [uri for label, component, uri in (line.rsplit(" ", 2) for line in lines) if label == "Debian"]
    if not mirrors:
        raise Refused(
            "apt on this host knows no Debian mirror (`apt-get indextargets` lists none with the label Debian): "
            "run `apt-get update` on a Debian host."
        )
    return mirrors[0]


# ------------------------------------------------------------------------------------------------------ what is mounted


def network_settings() -> tuple[dict[str, str], set[Path]]:
    """What pip and TLS are told on this host: variables for the command, and the files and folders they name."""
    told = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    for key, value in re.findall(r"(?m)^(?:global|install)\.([\w-]+)='(.*)'$", listed):
        told.setdefault("PIP_" + key.upper().replace("-", "_"), value)
    paths = set()
    for word in " ".join(told.values()).split():
        url = urlsplit(word)
        path = Path(url.path if url.scheme == "file" else word)
        if path.is_absolute() and path.exists():
            # The pages of an index on disk link to packages in folders beside it.
            paths.add(path.parent if url.scheme == "file" and path.parent != Path("/") else path)
    return told, paths


def repository_folders() -> set[Path]:
    """The repository, and where git keeps its history if this is a linked work tree."""
    asked = ["git", "-C", str(REPO), "rev-parse", "--path-format=absolute", "--git-common-dir"]
    try:
        common = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        common = ""
    return {REPO, Path(common)} if common and not Path(common).is_relative_to(REPO) else {REPO}


def mount(root: Path, folders: set[Path]) -> None:
    """Mount what the command needs under ``root``; called in a mount namespace of its own.

    Raises:
        subprocess.CalledProcessError: the kernel refuses.
    """

    def call(*words: str | Path) -> None:
        subprocess.run(["mount", *map(str, words)], check=True, capture_output=True, text=True)

    call("--make-rprivate", "/")
    call("-t", "proc", "proc", root / "proc")
    for folder in ("dev", "sys"):
        call("--rbind", f"/{folder}", root / folder)
    call("-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "dev/shm")
    call("-t", "tmpfs", "-o", "mode=0755", "tmpfs", root / "run")
    for name in ("resolv.conf", "hosts"):
        if Path("/etc", name).exists():
            shutil.copyfile(Path("/etc", name), root / "etc" / name)
    for path in sorted(folders):
        there = root / path.relative_to("/")
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        else:
            there.parent.mkdir(parents=True, exist_ok=True)
            there.touch()
        call("--rbind", path, there)


# ------------------------------------------------------------------------------------------------------------- running


def run(root: Path, command: list[str], folders: set[Path], variables: dict[str, str]) -> int:
    """Run the command in ``root``, in namespaces of its own; its exit code (128 + number of the signal that ended it).

    Raises:
        Refused: the kernel does not allow namespaces or mounts.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS):
        reason = os.strerror(ctypes.get_errno())
        raise Refused(f"the kernel does not allow namespaces of one's own (unshare: {reason}): run this as real root.")
    alive, held_open = os.pipe()
    init = os.fork()
    if init == 0:  # process 1 of the namespace: when it ends, the kernel kills the rest
        os.close(held_open)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([alive], [], [], 0)[0]:  # the parent was killed before the kernel was told
            os._exit(128 + signal.SIGKILL)
        try:
            code = _as_init(root, command, folders, variables)
        except (OSError, subprocess.CalledProcessError) as error:
            words = (getattr(error, "stderr", None) or str(error)).strip()
            print(f"error: {root} cannot be set up for the command: {words}", file=sys.stderr, flush=True)
            code = 2
        os._exit(code)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches the command, which decides
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: os.kill(init, signal.SIGKILL))
    _, status = os.waitpid(init, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _as_init(root: Path, command: list[str], folders: set[Path], variables: dict[str, str]) -> int:
    """Mount, start the command, reap what is orphaned (nobody else does in this namespace) until the command ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    socket.sethostname("cfmask")
    mount(root, folders)
    os.chroot(root)
    os.chdir(REPO)
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        "CFMASK_VENV": VENV,
        **variables,
    }
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            os.execvpe(command[0], command, environment)
        except OSError as error:
            print(f"error: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    own, separator, command = arguments, "", list(DEFAULT_COMMAND)
    if "--" in arguments:
        place = arguments.index("--")
        own, separator, command = arguments[:place], "--", arguments[place + 1 :]
    parser = argparse.ArgumentParser(
        prog=MADE_BY,
        usage="%(prog)s [-h] [--suite NAME] [--root DIR] [-- COMMAND ...]",
        description="Run a command of this repository in another Debian release.",
        epilog=f"default command: {shlex.join(DEFAULT_COMMAND)}",
    )
    parser.add_argument("--suite", default="trixie", help="Debian release, by its name (default %(default)s)")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder for the release (default ~/.cache/cfmask-root/NAME)"
    )
    options = parser.parse_args(own)
    if separator and not command:
        parser.error("no command after --")
    root = (options.root or Path("~/.cache/cfmask-root") / options.suite).expanduser().resolve()
    try:
        if os.geteuid() != 0:
            raise Refused("a root folder needs root: run this as root, or with sudo.")
        if root == Path("/") or REPO.is_relative_to(root):
            raise Refused(f"--root {root} would replace what it is to hold: give a folder of its own.")
        root.parent.mkdir(parents=True, exist_ok=True)
        with root.with_name(root.name + ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(f"another process works in {root}: wait for it, or give another --root.") from None
            make_root(root, options.suite)
            variables, files = network_settings()
            return run(root, command, repository_folders() | files, variables)
    except Refused as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
