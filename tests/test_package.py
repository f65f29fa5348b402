"""The installed package, and commands outside the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

import cfmask
from conftest import REPO

COMMANDS = sorted(
    str(path.relative_to(REPO))
    for folder in ("launch", "tools")
    for path in (REPO / folder).glob("*.py")
    if "__main__" in path.read_text() and path.name not in ("demo.py", "test.py", "environment.py")
)
"""All but those that set up their own environment."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_outside_the_environment_says_how_to_enter_it(tmp_path, command):
    # Isolated, and without site-packages: as a Python that has nothing installed.
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(REPO / command), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: No module named")
    assert "source .venv/bin/activate" in line and done.stdout == ""


def test_a_command_with_the_library_of_another_checkout_is_refused(tmp_path):
    for name in ("launch", "cfmask"):
        shutil.copytree(REPO / name, tmp_path / "other" / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, str(tmp_path / "other/launch/status.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"pip install -e {tmp_path / 'other'}" in done.stderr and str(REPO) in done.stderr


def test_the_library_is_imported_from_any_folder_and_in_an_instant(tmp_path):
    try:
        metadata.version("cfmask")
    except metadata.PackageNotFoundError:
        pytest.skip("cfmask is not installed in this environment (pip install -e .)")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import sys, cfmask, launch; print(cfmask.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [cfmask.__version__, "False"], done.stderr


def test_no_module_edits_the_import_path():
    edits = [
        f"{path.relative_to(REPO)}:{number}"
        for folder in ("cfmask", "launch", "slurm", "tests", "tools")
        for path in (REPO / folder).rglob("*.py")
        if path.name != "test_package.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "E402" in line or line.lstrip().startswith(("sys.path.", "sys.path[", "sys.path ="))
    ]
    assert edits == []
