"""Creates the virtual environment on first use and continues inside it, so that one command is enough on a new machine.

    if __name__ == "__main__":
        import environment

        environment.ensure()        # returns only inside an environment in which cfmask is installed

The environment is `<repository>/.venv`, or the folder that CFMASK_VENV names; several clones may share one. An
environment made by hand (for example with a CPU build of torch) is accepted and never deleted: what is missing is
installed into it. venv and pip do the work, and pip's configuration files and PIP_* variables hold. This module adds
what they lack: a lock, a record of what is installed that survives a kill, a check of the disk, and one sentence and
exit code 2 for each error.

    <venv>/cfmask-setup.json    what is installed; written aside, then renamed
    <venv>/cfmask-setup.lock    held (flock) by the process that changes the environment, and by its pip
    <venv>/cfmask-setup.log     pip's output of the last time
    <venv>/tmp/                 pip's downloads, so that room is needed in one place

Written in the syntax of Python 3.6 with the standard library alone: an old Python must get as far as the sentence.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
GB = 10**9
# The CUDA build of torch takes 6.3 GB, and until pip is done another 3.2 GB for its downloads.
TORCH_BYTES, OTHER_BYTES = 10 * GB, GB // 2
PROJECT = "pyproject.toml"
UNREACHABLE = re.compile(
    r"connection broken|connection error|Connection (refused|reset|timed out|aborted)|ConnectTimeout|ReadTimeout"
    r"|Read timed out|NewConnectionError|name resolution|Name or service not known|Network is unreachable"
    r"|No route to host|ProxyError|SSLError|Failed to connect|Could not fetch URL",
    re.IGNORECASE,
)


class SetupError(Exception):
    """The environment cannot be created. The message is the sentence that the user reads."""


def python_problem(version):
    """What is wrong with a Python of this version (a tuple); "" if nothing is."""
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return ""
    return "cfmask needs Python {}.{} or newer, and this is {}: run the same command with a newer one.".format(
        *OLDEST_PYTHON, ".".join(str(part) for part in version[:3])
    )


# Before any line that an older Python would not understand.
if python_problem(sys.version_info):
    sys.stderr.write("error: " + python_problem(sys.version_info) + "\n")
    sys.exit(2)


def ensure(requirements=("requirements.txt",), lowest: bool = False) -> None:
    """Return inside an environment that has this project and the packages of ``requirements``; create it if need be.

    Args:
        requirements: pip requirement files, relative to the repository's root.
        lowest: an environment of its own, `.venv-lowest`, with the lowest versions that requirements.txt allows.

    A process outside the environment, or without this checkout first on PYTHONPATH, is replaced (``os.execv``) by the
    same command in the environment's Python, which calls this function again. PYTHONPATH matters because a shared
    environment may have another checkout installed. Errors end the process with exit code 2, Ctrl-C with 130; the next
    run continues.
    """
    chosen = str(ROOT / ".venv-lowest") if lowest else os.environ.get("CFMASK_VENV") or str(ROOT / ".venv")
    venv = Path(os.path.abspath(os.path.expanduser(chosen)))
    files = list(requirements) + ([PROJECT] if (ROOT / PROJECT).exists() else [])
    wanted = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in files}
    inside = os.path.realpath(sys.prefix) == os.path.realpath(str(venv))
    # Popped, so that programs started from here may set up environments of their own.
    came_from = os.environ.pop("CFMASK_BOOTSTRAPPED", None)
    try:
        if not _is_ready(venv, wanted, inside):
            if {"-h", "--help"} & set(sys.argv[1:]):  # nobody installs gigabytes to read a page
                print(sys.modules["__main__"].__doc__)
                sys.exit(0)
            _set_up(venv, wanted, lowest)
            inside = False  # the environment of this process may have been replaced
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        if inside and paths[:1] == [str(ROOT)]:
            return
        if came_from is not None:
            raise SetupError(
                f"{venv}/bin/python does not run in its own environment (sys.prefix is {sys.prefix}): "
                "unset PYTHONHOME if it is set, otherwise delete that folder and run this again."
            )
    except SetupError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        _say(f"error: the environment in {venv} cannot be created ({error}): allow it, or set CFMASK_VENV.")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted while setting up; the same command continues from here.")
        sys.exit(130)
    os.environ["CFMASK_BOOTSTRAPPED"] = str(venv)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
    sys.stdout.flush()
    os.execv(str(_python(venv)), [str(_python(venv)), *sys.orig_argv[1:]])


def check_disk(venv: Path, needed: int) -> None:
    """Raise SetupError unless ``needed`` bytes are free where ``venv`` is, or will be."""
    folder = venv
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(str(folder)).free
    if free < needed:
        raise SetupError(
            f"installing into {venv} needs {needed / GB:.1f} GB of disk and {free / GB:.1f} GB are free there: "
            "make room, or set CFMASK_VENV to a folder on a larger disk."
        )


def _is_ready(venv: Path, wanted: dict, inside: bool) -> bool:
    stamp = read_stamp(venv)
    if stamp is None or stamp["changing"] or any(stamp["installed"].get(name) != wanted[name] for name in wanted):
        return False
    # A system upgrade can remove or replace the interpreter of the environment.
    return stamp["python"] == (list(sys.version_info[:2]) if inside else _version_of(venv))


def _set_up(venv: Path, wanted: dict, lowest: bool) -> None:
    """Bring the environment to the state that ``_is_ready`` asks for, one process at a time."""
    venv.mkdir(parents=True, exist_ok=True)
    with open(str(venv / "cfmask-setup.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process is setting up {venv}: waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_ready(venv, wanted, inside=False):  # the other process has done it
            return
        stamp, version = read_stamp(venv), _version_of(venv)
        made_by_hand = (venv / "pyvenv.cfg").exists() if stamp is None else not stamp["made_here"]
        if made_by_hand and python_problem(version or (0,)):
            found = "no working Python" if version is None else "Python {}.{}".format(*version)
            raise SetupError(f"the environment {venv} has {found}, and cfmask needs 3.10 or newer: delete it.")
        if stamp is None and not made_by_hand and any(not e.name.startswith("cfmask-setup.") for e in venv.iterdir()):
            raise SetupError(f"{venv} exists and is no virtual environment: remove it, or set CFMASK_VENV.")
        whole = stamp is not None and not stamp["changing"] and version is not None and stamp["python"] == version
        remake = not whole and not made_by_hand
        if remake and stamp is not None:
            _say(f"the environment in {venv} is half made or its Python has changed: creating it again.")
        has_torch = not remake and any(venv.glob("lib/python*/site-packages/torch/__init__.py"))
        asks_for_torch = any(re.search(r"^torch\b", (ROOT / name).read_text(), re.MULTILINE) for name in wanted)
        needed = TORCH_BYTES if asks_for_torch and not has_torch else OTHER_BYTES
        size = "2 to 15 minutes and about 6 GB of disk" if needed == TORCH_BYTES else "about a minute"
        _say(f"setting up the environment in {venv} ({size}) ...")
        if remake:
            _require_venv_module()
            _clear(venv)
        check_disk(venv, needed)
        if remake:
            _write_stamp(venv, {"made_here": True, "changing": True, "python": None, "installed": {}})
            _make(venv)
        installed = stamp["installed"] if stamp is not None and whole else {}
        stamp = {"made_here": not made_by_hand, "changing": False, "python": _version_of(venv), "installed": installed}
        if remake:
            _write_stamp(venv, stamp)
        _install(venv, [name for name in wanted if installed.get(name) != wanted[name]], stamp, lock, lowest)
        _write_stamp(venv, dict(stamp, installed=dict(installed, **wanted)))
        _say(f"the environment is ready: {venv}")


def _require_venv_module() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(_no_venv_module(str(error))) from None


def _no_venv_module(reason: str) -> str:
    return (
        f"{base_python()} cannot create virtual environments ({reason}): "
        "on Debian and Ubuntu run `apt-get install python3-venv`, elsewhere use a complete Python of 3.10 or newer."
    )


def _make(venv: Path) -> None:
    done = subprocess.run(
        [base_python(), "-m", "venv", str(venv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode and "ensurepip" in done.stdout:  # Debian ships the module without the wheels that it needs
        raise SetupError(_no_venv_module("ensurepip fails"))
    if done.returncode:
        raise SetupError(f"`python -m venv {venv}` failed: {_last_lines(done.stdout)}")


def _install(venv: Path, files: list, stamp: dict, lock, lowest: bool) -> None:
    """Install requirement files, and this project in editable mode, with pip; its output goes to stderr and the log."""
    scratch, log_path = venv / "tmp", venv / "cfmask-setup.log"
    shutil.rmtree(str(scratch), ignore_errors=True)
    scratch.mkdir()
    # PIP_USER and PIP_TARGET, which some clusters set for everyone, would install elsewhere.
    variables = {key: value for key, value in os.environ.items() if key not in ("PIP_TARGET", "PIP_PREFIX")}
    variables.update(TMPDIR=str(scratch), PIP_USER="0", PYTHONUNBUFFERED="1", PIP_REQUIRE_VIRTUALENV="0")
    # pip's default of 5 retries takes minutes to notice that there is no network.
    command = [str(_python(venv)), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    command += ["--progress-bar", "off", "--retries", "3"]
    for name in files:
        command += ["-e", str(ROOT)] if name == PROJECT else ["-r", str(ROOT / name)]
    if lowest:
        bounds = re.findall(r"^([\w-]+)>=([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
        (scratch / "lowest.txt").write_text("".join(f"{name}=={version}\n" for name, version in bounds))
        command += ["-c", str(scratch / "lowest.txt")]
    output, start = [], time.monotonic()
    try:
        # pip holds the lock too: if this process is killed, the next one waits until pip has stopped.
        process = subprocess.Popen(
            command,
            env=variables,
            cwd=str(ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(lock.fileno(),),
        )
        assert process.stdout is not None
        try:
            with open(str(log_path), "w") as log:
                for line in process.stdout:
                    output.append(line)
                    log.write(line)
                    if line.startswith("Installing collected packages:"):
                        # From here until pip is done the environment is incomplete.
                        _write_stamp(venv, dict(stamp, changing=True))
                        line = f"unpacking {line.count(',') + 1} packages"
                    elif not re.match(r"\s*(Downloading|Using cached|Processing) (?!.*\.metadata)", line):
                        continue
                    _say(f"[{time.monotonic() - start:4.0f} s] {line.strip()}")
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    finally:
        shutil.rmtree(str(scratch), ignore_errors=True)
    if process.returncode:
        raise SetupError(_pip_problem("".join(output), venv, files, log_path))


def _pip_problem(output: str, venv: Path, files: list, log_path: Path) -> str:
    tail = _last_lines(output)
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return f"the disk became full while installing into {venv}: make room, or set CFMASK_VENV. ({tail})"
    if UNREACHABLE.search(output):
        reasons = re.findall(r"(?:Errno -?\d+\] |timed out|certificate verify failed)[^'\")]*", output)
        reason = re.sub(r"^Errno -?\d+\] ", "", reasons[-1]).strip() if reasons else "no connection"
        return (
            f"the package registry cannot be reached to install the requirements ({reason}): connect this machine, or "
            f"tell pip of a proxy or mirror (HTTPS_PROXY, PIP_INDEX_URL), and run this again (full log: {log_path})."
        )
    return f"pip could not install {' and '.join(files)} (pip said: {tail}; full log: {log_path})."


def base_python() -> str:
    """The interpreter that environments are made of: not that of an environment, which may have to go."""
    return getattr(sys, "_base_executable", None) or sys.executable


def read_stamp(venv: Path):
    """The stamp {made_here, changing, python, installed: {file: sha256}}, or None."""
    try:
        stamp = json.loads((venv / "cfmask-setup.json").read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and {"made_here", "changing", "python", "installed"} <= set(stamp) else None


def _write_stamp(venv: Path, stamp: dict) -> None:
    aside = venv / "cfmask-setup.json.new"
    aside.write_text(json.dumps(stamp, indent=1))
    os.replace(str(aside), str(venv / "cfmask-setup.json"))


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _version_of(venv: Path):
    """[major, minor] of the environment's Python, or None if it does not run."""
    command = [str(_python(venv)), "-I", "-S", "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        return [int(part) for part in subprocess.check_output(command, stderr=subprocess.DEVNULL).split()]
    except (OSError, subprocess.CalledProcessError):
        return None


def _clear(venv: Path) -> None:
    """Empty the folder. The stamp stays: after a kill it still says that the folder is ours to repair."""
    for entry in venv.iterdir():
        if entry.name in ("cfmask-setup.lock", "cfmask-setup.json"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(str(entry))
        else:
            entry.unlink()


def _last_lines(output: str, count: int = 3) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("WARNING")]
    return " / ".join(lines[-count:])


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
