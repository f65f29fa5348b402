"""slurm/chroot.py: a command in another root folder, its processes and mounts, and refusals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm_fixture import slurm_module

REPO = Path(__file__).resolve().parents[1]
TOOL = REPO / "slurm/chroot.py"
chroot = slurm_module("chroot")


def call(*flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, flags)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def command_in_root(tmp_path):
    """A command line that runs a shell command in a root folder: this machine's, through an overlay."""
    root, layers = tmp_path / "root", tmp_path / "layers"
    root.mkdir()
    layers.mkdir()
    stamp = {"made_by": chroot.MADE_BY, "suite": "trixie", "packages": list(chroot.PACKAGES)}
    script = f"""
set -e
mount -t tmpfs tmpfs {layers}
mkdir -p {layers}/upper/var/lib {layers}/work
echo {shlex.quote(json.dumps(stamp))} > {layers}/upper/{chroot.STAMP}
mount -t overlay -o lowerdir=/,upperdir={layers}/upper,workdir={layers}/work overlay {root}
"""
    in_own_mounts = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    if subprocess.run([*in_own_mounts, script], capture_output=True).returncode:
        pytest.skip("overlays need root, and a kernel that has them")

    def made(command: str) -> list[str]:
        run = shlex.join([sys.executable, str(TOOL), "--root", str(root), "--", "sh", "-c", command])
        return [*in_own_mounts, f"{script}exec {run}"]

    return made


def test_command_runs_in_the_root_with_the_repository_and_a_venv_of_its_own(command_in_root, tmp_path):
    script = "pwd; echo $CFMASK_VENV; test -e tools/test.py; test -e /dev/null; echo $PIP_TIMEOUT; touch /mark; exit 7"
    done = subprocess.run(
        command_in_root(script), env=os.environ | {"PIP_TIMEOUT": "99"}, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == [str(REPO), chroot.VENV, "99"]
    assert not Path("/mark").exists()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_orphans_are_reaped_and_end_with_the_command(command_in_root):
    orphans, seen = "(sleep 0 &); (sleep 4711 &); sleep 0.5", "ps -e -o stat= | grep -c Z; pgrep -cf '^sleep 4711'"
    done = subprocess.run(command_in_root(f"{orphans}; {seen}"), capture_output=True, text=True)
    assert done.stdout.split() == ["0", "1"], done.stderr
    assert ["sleep", "4711"] not in command_lines()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_kill_leaves_no_process(command_in_root, number):
    process = subprocess.Popen(command_in_root("setsid sleep 4712 & echo started; wait"), stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"started\n"
    process.send_signal(number)
    process.wait(300)
    deadline = time.monotonic() + 300
    while ["sleep", "4712"] in command_lines():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.stdout.close()


def command_lines() -> list[list[str]]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found.append(Path(f"/proc/{entry}/cmdline").read_text().rstrip("\0").split("\0"))
            except OSError:
                continue
    return found


def test_refusals_say_why(tmp_path):
    (tmp_path / "thesis.tex").touch()
    taken = call("--root", tmp_path, "--", "true")
    assert taken.returncode == 2 and "is not empty and was not made by" in taken.stderr
    assert (tmp_path / "thesis.tex").exists()
    assert "would replace" in call("--root", REPO.parent, "--", "true").stderr
    other = tmp_path / "other"
    (other / chroot.STAMP).parent.mkdir(parents=True)
    (other / chroot.STAMP).write_text(json.dumps({"made_by": chroot.MADE_BY, "suite": "sid"}))
    assert "holds Debian 'sid', not 'trixie'" in call("--root", other, "--", "true").stderr
    none = call("--root", tmp_path / "new", "--", "true", PATH="/nowhere")
    assert none.returncode == 2 and none.stderr.startswith("error: debootstrap is not installed")
    assert not (tmp_path / "new").exists()


def test_pip_and_tls_settings_are_passed_with_the_files_that_they_name(tmp_path, monkeypatch):
    certificates, index = tmp_path / "ca.pem", tmp_path / "index/simple"
    certificates.touch()
    index.mkdir(parents=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{index} https://user@example.org/simple")
    monkeypatch.setenv("PIPELINE", "no")
    variables, paths = chroot.network_settings()
    assert variables["SSL_CERT_FILE"] == str(certificates)
    assert "https://user@example.org" in variables["PIP_EXTRA_INDEX_URL"] and "PIPELINE" not in variables
    assert {certificates, index.parent} <= paths, "an index links to what lies beside it"
