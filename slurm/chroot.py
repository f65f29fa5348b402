#!/usr/bin/env python3
"""Run a command of this repository in another Debian release, to test it with that release's Slurm and Python.

    python3 slurm/chroot.py                                   the tests that need Slurm, the fault matrix among them
    python3 slurm/chroot.py --root /var/tmp/trixie -- bash    a shell there

The default is Debian 13 "trixie": Slurm 24.11, Python 3.13, MariaDB 11.8. The host needs root, debootstrap, a Debian
mirror in apt's configuration, and about 12 GB of disk for the root folder; its own release does not matter.

    ROOT/                       made by debootstrap on first use, reused afterwards
         var/lib/cfmask.json    the stamp: release and packages; a ROOT without it is incomplete and is made again
         opt/cfmask-venv/       CFMASK_VENV: the virtual environment that tools/test.py makes there

The repository is mounted into ROOT under its own path. Mounts are in a private mount namespace, and the command runs
in a process namespace of its own (util-linux: unshare, setpriv). When this program ends or is killed, the kernel ends
every process inside and removes the mounts. The network is the host's. Standard library only.

Exit codes: the command's; 2 refused; 130 interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
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
# Variables that configure network access; files that they name are mounted too.
NETWORK = re.compile(r"(PIP_\w+|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|(https?|all|no)_proxy)", re.IGNORECASE)

# The kernel kills unshare when this process ends, and process 1 of the namespace, with all others, when unshare ends.
NAMESPACES = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"),
)


class Refused(Exception):
    """Not possible on this host; the message says why and what to do."""


def make_root(root: Path, suite: str) -> None:
    """Make the root folder with debootstrap, unless an earlier call has.

    Raises:
        Refused: the folder holds something else; debootstrap, its keyring, a mirror or disk space is missing; or
            debootstrap failed.
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
    shutil.rmtree(root, ignore_errors=True)  # safe: mounts exist only in the namespace of their process
    print(f"making {root}: Debian {suite}, about 2 minutes (log: {root}/debootstrap/debootstrap.log)", flush=True)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", f"--keyring={KEYRING}"]
    in_own_mounts = ["unshare", "--mount", "--propagation", "private", *command, suite, str(root), mirror]
    done = subprocess.run(in_own_mounts, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise Refused(f"`{shlex.join(command)} {suite} {root} …` failed (exit code {done.returncode}): {last}")
    # Packages must not start their services: the tests run daemons of their own.
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    settings = subprocess.run(["apt-config", "dump"], capture_output=True, text=True).stdout.splitlines()
    network = [line for line in settings if re.match(r"Acquire::(https?::|Retries)", line)]
    (root / "etc/apt/apt.conf.d/90host").write_text("".join(line + "\n" for line in network))
    (root / STAMP).write_text(json.dumps(wanted) + "\n")
    marker.unlink()


def debian_mirror() -> str:
    """The Debian mirror in this host's apt configuration, which has every release.

    Raises:
        Refused: there is none.
    """
    asked = ["apt-get", "indextargets", "--format", "$(LABEL) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        lines = []
    mirrors = [uri for label, component, uri in (line.rsplit(" ", 2) for line in lines) if label == "Debian"]
    if not mirrors:
        raise Refused(
            "apt on this host has no Debian mirror (`apt-get indextargets` lists none with the label Debian): "
            "run `apt-get update` on a Debian host."
        )
    return mirrors[0]


def network_settings() -> tuple[dict[str, str], set[Path]]:
    """The variables that configure pip and TLS on this host, and the files and folders that they name."""
    variables = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    for key, value in re.findall(r"(?m)^(?:global|install)\.([\w-]+)='(.*)'$", listed):
        variables.setdefault("PIP_" + key.upper().replace("-", "_"), value)
    paths = set()
    for word in " ".join(variables.values()).split():
        url = urlsplit(word)
        path = Path(url.path if url.scheme == "file" else word)
        if path.is_absolute() and path.exists():
            # The pages of an index on disk link to packages in folders beside it.
            paths.add(path.parent if url.scheme == "file" and path.parent != Path("/") else path)
    return variables, paths


def repository_folders() -> set[Path]:
    """The repository, and the folder of git's history if this is a linked work tree."""
    asked = ["git", "-C", str(REPO), "rev-parse", "--path-format=absolute", "--git-common-dir"]
    try:
        common = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        common = ""
    return {REPO, Path(common)} if common and not Path(common).is_relative_to(REPO) else {REPO}


def mount_commands(root: Path, folders: set[Path]) -> list[str]:
    """Make the mount points in ``root``; return the shell commands that mount what the command needs."""
    commands: list[tuple[str | Path, ...]] = [
        ("-t", "proc", "proc", root / "proc"),
        *(("--rbind", f"/{folder}", root / folder) for folder in ("dev", "sys")),
        ("-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "dev/shm"),
        ("-t", "tmpfs", "-o", "mode=0755", "tmpfs", root / "run"),
    ]
    for name in ("resolv.conf", "hosts"):
        if Path("/etc", name).exists():
            shutil.copyfile(Path("/etc", name), root / "etc" / name)
    for path in sorted(folders):
        there = root / path.relative_to("/")
        (there if path.is_dir() else there.parent).mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            there.touch()
        commands.append(("--rbind", path, there))
    return [shlex.join(["mount", *map(str, words)]) for words in commands]


def run(root: Path, command: list[str], folders: set[Path], variables: dict[str, str]) -> int:
    """Run the command in ``root``, in namespaces of its own.

    Returns:
        Its exit code, or 128 + the number of the signal that ended it.

    Raises:
        Refused: the kernel does not allow namespaces.
    """
    probe = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    if probe.returncode:
        raise Refused(f"the kernel does not allow new namespaces ({probe.stderr.strip()}): run this as real root.")
    set_up = " && ".join(["echo cfmask > /proc/sys/kernel/hostname", *mount_commands(root, folders)])
    inside = shlex.join(["chroot", str(root), "env", f"--chdir={REPO}", *command])
    # The shell is process 1 of the namespace. It does not exec the command, but waits for it and reaps orphans.
    script = f"""
trap : INT  # Ctrl-C is for the command
{{ {set_up}; }} || {{ echo "error: "{shlex.quote(str(root))}" cannot be set up for the command" >&2; exit 2; }}
{inside}
exit $?
"""
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        "CFMASK_VENV": VENV,
        **variables,
    }
    signal.signal(signal.SIGINT, lambda *_: None)  # the same; a handler, unlike SIG_IGN, is not inherited
    process = subprocess.Popen([*NAMESPACES, "sh", "-c", script], env=environment)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: process.kill())
    code = process.wait()
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
    parser.add_argument("--suite", default="trixie", help="name of the Debian release (default: %(default)s)")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder for the release (default: ~/.cache/cfmask-root/NAME)"
    )
    options = parser.parse_args(own)
    if separator and not command:
        parser.error("no command after --")
    root = (options.root or Path("~/.cache/cfmask-root") / options.suite).expanduser().resolve()
    try:
        if os.geteuid() != 0:
            raise Refused("a root folder needs root: run this as root, or with sudo.")
        if root == Path("/") or REPO.is_relative_to(root):
            raise Refused(f"--root {root} would replace the repository: give a folder of its own.")
        root.parent.mkdir(parents=True, exist_ok=True)
        with root.with_name(root.name + ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(f"another process uses {root}: wait for it, or give another --root.") from None
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
