"""The set-up of the environment, in throwaway repositories with a real venv, a real pip and packages of a few bytes."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from conftest import LONGEST, REPO
from tools import environment

SCRIPT = """
import sys
import environment
environment.ensure()
import {module}
print(sys.prefix, sys.version_info[1], sys.argv[1:], {module}.__name__)
sys.exit(7)
"""


def other_pythons(*minors: int) -> list[str]:
    """Interpreters of these 3.x versions on this machine, from PATH or pyenv."""
    found: list[str] = []
    for minor in minors:
        candidates = [*Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"), Path(f"/usr/bin/python3.{minor}")]
        found += [str(path) for path in candidates if path.exists()][:1]
    return found


def make_wheel(folder: Path, name: str, modules: int = 1) -> Path:
    """A package of `modules` modules; many of them take pip seconds to unpack and compile."""
    info = f"{name}-1.0.dist-info"
    files = {f"{name}/__init__.py": "", f"{name}/part.py": "x = 1\n"}
    code = "".join(f"def f{i}(a, b): return a + b * {i}\n" for i in range(30))
    files |= {f"{name}/m{i}.py": code for i in range(modules)}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder, "tiny")
    make_wheel(folder, "other")
    make_wheel(folder, "many", modules=600)
    return folder


class Clone:
    """A repository with the real tools/environment.py, a requirement file, and a script that needs what is in it."""

    def __init__(self, root: Path, wheels: Path, requirement: str = "tiny", venv: Path | None = None) -> None:
        self.root, self.venv = root, venv or root / ".venv"
        (root / "tools").mkdir(parents=True)
        shutil.copy(REPO / "tools" / "environment.py", root / "tools")
        (root / "requirements.txt").write_text(requirement + "\n")
        (root / "tools" / "script.py").write_text(SCRIPT.format(module=requirement or "json"))
        # This machine's own package sources are left out of it.
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "CFMASK_"))}
        self.env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
        if venv:
            self.env["CFMASK_VENV"] = str(venv)

    def use_registry(self, url: str) -> None:
        del self.env["PIP_NO_INDEX"], self.env["PIP_FIND_LINKS"]
        self.env |= {"PIP_INDEX_URL": url, "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "127.0.0.1"}

    def start(self, *arguments: str, python: str = "") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [python or environment.base_python(), "tools/script.py", *arguments],
            cwd=self.root,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, python: str = "") -> tuple[int, str, str]:
        process = self.start(*arguments, python=python)
        out, err = process.communicate(timeout=180)
        return process.returncode, out, err

    def stamp(self) -> dict:
        return json.loads((self.venv / "cfmask-setup.json").read_text())


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """An environment that is set up, for clones to share."""
    clone = Clone(tmp_path_factory.mktemp("ready") / "clone", wheels, venv=tmp_path_factory.mktemp("ready") / "venv")
    assert clone.run()[0] == 7
    return clone.venv


def sentence(err: str) -> str:
    """The one line that says what went wrong."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err, err
    return errors[0]


@pytest.mark.parametrize("python", [environment.base_python(), *other_pythons(10)])
def test_the_first_run_makes_the_environment_and_goes_on_in_it(tmp_path: Path, wheels: Path, python: str) -> None:
    clone = Clone(tmp_path / "a clone", wheels)
    code, out, err = clone.run("--flag", "two words", "", python=python)
    minor = subprocess.check_output([python, "-c", "import sys; print(sys.version_info[1])"], text=True).strip()
    assert out == f"{clone.venv} {minor} ['--flag', 'two words', ''] tiny\n", err
    assert code == 7, "the script's own exit code"
    assert "setting up" in err and "tiny" in err and "s]" in err, "says what happens, package by package"
    assert not (clone.venv / "tmp").exists()


def test_the_second_run_starts_at_once_and_leaves_pip_alone(tmp_path: Path, wheels: Path, ready: Path) -> None:
    clone = Clone(tmp_path / "clone", wheels, venv=ready)
    log = (ready / "cfmask-setup.log").stat().st_mtime_ns
    seconds = []  # of a core: others may be busy with it
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code, _out, err = clone.run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert (code, err) == (7, "")
    assert (ready / "cfmask-setup.log").stat().st_mtime_ns == log
    assert min(seconds) < 0.3, seconds


def test_a_script_started_by_the_environments_own_python_only_reads_the_stamp(
    tmp_path: Path, wheels: Path, ready: Path
) -> None:
    """It imports the code of its own checkout."""
    clone = Clone(tmp_path / "clone", wheels, venv=ready)
    (clone.root / "tools/script.py").write_text(SCRIPT.format(module="tiny, beside"))
    (clone.root / "beside.py").touch()
    code, out, err = clone.run(python=str(ready / "bin" / "python"))
    assert (code, err) == (7, "") and out.startswith(str(ready))


def test_a_changed_requirement_file_is_installed_into_the_same_environment(
    tmp_path: Path, wheels: Path, ready: Path
) -> None:
    (ready / "kept").touch()
    clone = Clone(tmp_path / "clone", wheels, "other", venv=ready)
    code, out, _err = clone.run()
    assert code == 7 and out.endswith("other\n") and (ready / "kept").exists()


def test_two_processes_at_once_make_one_environment(tmp_path: Path, wheels: Path) -> None:
    clone = Clone(tmp_path / "clone", wheels)
    processes = [clone.start(str(i)) for i in range(2)]
    ends = [(process.communicate(timeout=180), process.returncode) for process in processes]
    assert [code for _, code in ends] == [7, 7], ends
    errs = [err for (_out, err), _code in ends]
    assert sum("waiting for it" in err for err in errs) == 1, errs
    assert sum("unpacking" in err for err in errs) == 1, "one of them installed, the other found it done"


def kill_when(process: subprocess.Popen[str], text: str) -> None:
    """SIGKILL as soon as the process says `text`; what it started (pip) lives on, as it would after an OOM kill."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            break
    else:
        pytest.fail(f"never said {text!r}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_an_install_killed_while_unpacking_is_made_again(tmp_path: Path, wheels: Path) -> None:
    clone = Clone(tmp_path / "clone", wheels, "many")
    kill_when(clone.start(), "unpacking")
    assert clone.stamp()["changing"]
    (clone.venv / "debris").touch()
    code, _out, err = clone.run()
    assert code == 7 and "half made" in err
    assert not (clone.venv / "debris").exists()
    assert (clone.run()[2]) == ""


class SlowRegistry(http.server.SimpleHTTPRequestHandler):
    """A package index that lets the largest package wait, as a slow network would."""

    asked_for_many = threading.Event()

    def do_GET(self) -> None:
        name = self.path.rstrip("/").rsplit("/", 1)[-1]
        if self.path.endswith(".whl"):
            if name.startswith("many"):
                self.asked_for_many.set()
                time.sleep(2)
            return super().do_GET()
        wheel = f"{name}-1.0-py3-none-any.whl"
        page = f'<!DOCTYPE html><html><body><a href="/{wheel}">{wheel}</a></body></html>'
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def registry(wheels: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowRegistry, directory=str(wheels)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    server.server_close()


def test_an_install_killed_while_downloading_goes_on_without_starting_over(tmp_path: Path, wheels: Path) -> None:
    clone = Clone(tmp_path / "clone", wheels, "many")
    (clone.root / "requirements.txt").write_text("many\ntiny\n")
    with registry(wheels) as url:
        clone.use_registry(url)
        process = clone.start()
        assert SlowRegistry.asked_for_many.wait(300)
        process.kill()
        process.communicate()
        assert not clone.stamp()["changing"] and not clone.stamp()["installed"]
        (clone.venv / "kept").touch()
        code, _out, err = clone.run()
    assert code == 7 and "again" not in err and (clone.venv / "kept").exists()


def test_an_environment_made_by_hand_is_accepted_and_kept(tmp_path: Path, wheels: Path) -> None:
    venv = tmp_path / "mine"
    subprocess.run([environment.base_python(), "-m", "venv", str(venv)], check=True)
    (venv / "mine.txt").touch()
    clone = Clone(tmp_path / "clone", wheels, venv=venv)
    assert clone.run()[0] == 7
    assert not clone.stamp()["made_here"]
    # Even with its interpreter gone: that is for its owner to repair.
    (venv / "bin" / "python").unlink()
    code, _out, err = clone.run()
    assert code == 2 and str(venv) in sentence(err) and (venv / "mine.txt").exists()


def test_an_environment_whose_python_was_removed_is_made_again(tmp_path: Path, wheels: Path, ready: Path) -> None:
    clone = Clone(tmp_path / "clone", wheels, venv=ready)
    (ready / "bin" / "python").unlink()
    code, _out, err = clone.run()
    assert code == 7 and "its Python has changed" in err


def test_a_folder_that_is_no_environment_is_not_touched(tmp_path: Path, wheels: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").touch()
    code, _out, err = Clone(tmp_path / "clone", wheels, venv=tmp_path / "data").run()
    assert code == 2 and "no virtual environment" in sentence(err)
    assert (tmp_path / "data" / "thesis.tex").exists()


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_gets_one_sentence(tmp_path: Path, wheels: Path, module: str) -> None:
    clone = Clone(tmp_path / "clone", wheels)
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / f"{module}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{module}'\")\n")
    clone.env["PYTHONPATH"] = str(shim)
    code, _out, err = clone.run()
    assert code == 2 and "apt-get install python3-venv" in sentence(err)
    assert [path.name for path in clone.venv.iterdir()] == ["cfmask-setup.lock"], "nothing in the way of the next try"


def test_too_little_disk_is_said_before_anything_is_installed(tmp_path: Path, wheels: Path) -> None:
    with pytest.raises(environment.SetupError, match="GB of disk"):
        environment.check_disk(tmp_path / "not" / "there" / "yet", 10**18)
    environment.check_disk(tmp_path, 1)

    # For real: a file system of 100 MB in a mount namespace, gone with the process.
    small = tmp_path / "small"
    small.mkdir()
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount.append('mount -t tmpfs -o size=100m tmpfs "$0" && exec "$@"')
    if not shutil.which("unshare") or subprocess.run([*mount, str(small), "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    clone = Clone(tmp_path / "clone", wheels, "torch", venv=small / "venv")
    done = subprocess.run(
        [*mount, str(small), environment.base_python(), "tools/script.py"],
        cwd=clone.root,
        env=clone.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "10.0 GB" in sentence(done.stderr) and "0.1 GB are free" in done.stderr and "CFMASK_VENV" in done.stderr


def test_an_unreachable_registry_is_said_soon(tmp_path: Path, wheels: Path, ready: Path) -> None:
    clone = Clone(tmp_path / "clone", wheels, "absent", venv=ready)
    clone.use_registry("http://127.0.0.1:9/simple")
    start = time.monotonic()
    code, _out, err = clone.run()
    assert time.monotonic() - start < 80, "pip by itself tries for minutes"
    assert code == 2 and "registry cannot be reached" in sentence(err) and "Connection refused" in sentence(err)


@pytest.mark.slow
def test_a_silent_registry_is_given_up_soon(tmp_path: Path, wheels: Path, ready: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        clone = Clone(tmp_path / "clone", wheels, "absent", venv=ready)
        clone.use_registry(f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        start = time.monotonic()
        code, _out, err = clone.run()
        assert time.monotonic() - start < 80, "pip by itself tries for minutes"
    assert code == 2 and "registry cannot be reached" in sentence(err)


def test_what_pip_cannot_install_is_told_with_pips_last_lines(tmp_path: Path, wheels: Path, ready: Path) -> None:
    clone = Clone(tmp_path / "clone", wheels, "absent", venv=ready)
    code, _out, err = clone.run()
    assert code == 2 and "No matching distribution found for absent" in sentence(err)
    assert str(ready / "cfmask-setup.log") in sentence(err)
    assert Clone(tmp_path / "clone2", wheels, "tiny", venv=ready).run()[0] == 7, "and the environment still serves"


def test_an_old_python_gets_one_sentence() -> None:
    assert environment.python_problem((3, 10, 0)) == "" == environment.python_problem((4, 0))
    assert "3.10 or newer, and this is 3.9.18" in environment.python_problem((3, 9, 18))
    for python in other_pythons(6, 7, 8, 9):
        done = subprocess.run([python, "tools/test.py"], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 2 and "needs Python 3.10" in sentence(done.stderr), python


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository for tools/test.py to check, which shares the environment that this test runs in."""
    files = ["requirements.txt", "tests/requirements.txt", "pyproject.toml"]
    installed = (environment.read_stamp(Path(sys.prefix)) or {"installed": {}})["installed"]
    if any(installed.get(name) != hashlib.sha256((REPO / name).read_bytes()).hexdigest() for name in files):
        pytest.skip("this environment was not set up by tools/test.py")
    for name in [*files, "tools/environment.py", "tools/test.py", "tools/__init__.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    for package in ("cfmask", "launch", "slurm"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def check(project: Path, *arguments: str) -> tuple[int, list[str]]:
    env = dict(os.environ, CFMASK_VENV=sys.prefix)
    command = [environment.base_python(), "tools/test.py", *arguments]
    done = subprocess.run(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout.splitlines()


def test_the_checks_report_skips_and_end_in_pytests_line(project: Path) -> None:
    (project / "tests" / "test_it.py").write_text(
        "import os\n\nimport pytest\n\n\n"
        'def test_threads():\n    assert os.environ["OMP_NUM_THREADS"] == "1"\n\n\n'
        "@pytest.mark.slow\ndef test_slow():\n    raise SystemError\n\n\n"
        '@pytest.mark.skip(reason="no such device")\ndef test_gpu():\n    pass\n'
    )
    code, lines = check(project)
    assert code == 0, lines
    assert "1 passed, 1 skipped" in lines[-1]
    assert "Left out: the sweeps marked slow; python3 tools/test.py --slow runs them too." in lines
    assert sum(line.startswith("SKIPPED [1] tests/test_it.py") and "no such device" in line for line in lines) == 1
    code, lines = check(project, "--slow")
    assert code == 1 and "1 failed, 1 passed, 1 skipped" in lines[-2]


def test_a_lint_error_fails_the_checks_and_the_tests_still_run(project: Path) -> None:
    (project / "tests" / "test_it.py").write_text("import os\ndef test_it(): pass\n")
    code, lines = check(project)
    assert code == 1 and "1 passed" in lines[-2] and lines[-1] == "FAILED: ruff check, ruff format"


def test_files_that_are_chosen_or_come_first_are_there() -> None:
    from tools.test import LOWEST

    assert [name for name in (*LOWEST, *LONGEST) if not (REPO / f"tests/test_{name}.py").exists()] == []


def test_no_tests_at_all_is_a_failure(project: Path) -> None:
    code, lines = check(project)
    assert code == 1 and lines[-1] == "FAILED: pytest"
