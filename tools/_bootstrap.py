"""Makes the virtual environment on first use and carries on inside it, so that one command is enough on a bare machine.

A command-line script of this repository imports this module before anything that has to be installed:

    import _bootstrap

    _bootstrap.ensure()             # returns only inside an environment that has requirements.txt
    import torch                    # noqa: E402

The environment lies in `<repository>/.venv`, or where the environment variable CFMASK_VENV says; several clones may
share one. An environment made by hand (say, with a CPU build of torch, which needs far less room) is accepted there
too: what is missing is installed into it, and it is never deleted. Where packages come from is pip's own business:
its configuration files and PIP_* variables hold, index options are never touched.

    <venv>/cfmask-setup.json    what has been installed (the stamp); written aside, then renamed
    <venv>/cfmask-setup.lock    held (flock) by the one process that changes the environment, and by its pip
    <venv>/cfmask-setup.log     everything that pip said the last time
    <venv>/tmp/                 pip's downloads while an install runs, so that room is needed in this one place

Survived: being killed at any moment, two processes that start at once, a requirement file that changed, a system Python
that was upgraded under the environment. Fatal, with one sentence on stderr and exit code 2: Python older than 3.10, no
`venv` or `ensurepip` module, too little disk, no way to the package registry, pip failing for another reason.

Written in the syntax of Python 3.6 and with the standard library alone: an old Python must get as far as the sentence.
"""

import fcntl
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

OLDEST_PYTHON = (3, 10)
ROOT = Path(__file__).resolve().parent.parent

# With the CUDA build of torch 6.3 GB stay, and until pip is through 3.2 GB of downloaded wheels lie beside them.
GB = 10**9
TORCH_BYTES = 10 * GB
OTHER_BYTES = GB // 2

# What the names of this module's own files in the environment begin with.
OURS = "cfmask-setup."

# How long the registry may keep the first, small question waiting (seconds). The install itself keeps pip's own
# patience: a stall in the middle of a large download is no reason to give up.
PROBE_TIMEOUT = 10
PROBE_LIMIT = 35
UNREACHABLE = re.compile(
    r"connection broken|connection error|Connection (refused|reset|timed out|aborted)|ConnectTimeout|ReadTimeout"
    r"|NewConnectionError|name resolution|Name or service not known|Network is unreachable|No route to host"
    r"|ProxyError|SSLError|Failed to connect|Could not fetch URL",
    re.IGNORECASE,
)


class SetupError(Exception):
    """The environment cannot be made; the message is the one sentence that the user gets."""


def python_problem(version):
    """What is wrong with a Python of this version (a tuple, as `sys.version_info`); "" if it will do."""
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return ""
    return "cfmask needs Python {}.{} or newer, and this is {}: run the same command with a newer one.".format(
        *OLDEST_PYTHON, ".".join(str(part) for part in version[:3])
    )


# Before any line that an older Python would stumble over.
if python_problem(sys.version_info):
    sys.stderr.write("error: " + python_problem(sys.version_info) + "\n")
    sys.exit(2)


def ensure(requirements=("requirements.txt",)) -> None:
    """Returns inside an environment that has the packages of `requirements`; makes it and re-executes there if need be.

    Args:
        requirements: pip requirement files, relative to the repository's root.

    A process outside the environment is replaced (`os.execv`) by the same command, options and arguments in the
    environment's Python, which calls this function again and only reads the stamp. Errors end the process with
    exit code 2, Ctrl-C with 130; the next run goes on from there.
    """
    venv = venv_path()
    wanted = {name: _digest(ROOT / name) for name in requirements}
    inside = os.path.realpath(sys.prefix) == os.path.realpath(str(venv))
    # Popped, so that programs started from here may bootstrap for themselves.
    came_from = os.environ.pop("CFMASK_BOOTSTRAPPED", None)
    try:
        if not _is_ready(venv, wanted, inside):
            _set_up(venv, wanted)
            inside = False  # the environment may just have been replaced under this process
        if inside:
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
        _say(f"error: the environment in {venv} cannot be made ({error}): allow it, or set CFMASK_VENV.")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted while setting up; the same command goes on from here.")
        sys.exit(130)
    os.environ["CFMASK_BOOTSTRAPPED"] = str(venv)
    sys.stdout.flush()
    sys.stderr.flush()
    python = str(_python(venv))
    os.execv(python, [python, *sys.orig_argv[1:]])


def venv_path() -> Path:
    """Where the environment lies: CFMASK_VENV, or `.venv` in the repository. Absolute."""
    return Path(os.path.abspath(os.path.expanduser(os.environ.get("CFMASK_VENV") or str(ROOT / ".venv"))))


def check_disk(venv: Path, needed: int) -> None:
    """Raises SetupError unless `needed` bytes are free where `venv` lies, or will lie."""
    place = venv
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(str(place)).free
    if free < needed:
        raise SetupError(
            f"installing into {venv} needs {needed / GB:.1f} GB of disk and {free / GB:.1f} GB are free there: "
            "make room, or set CFMASK_VENV to a folder on a larger disk."
        )


def _set_up(venv: Path, wanted: dict) -> None:
    """Brings the environment to the state that `_is_ready` asks for, one process at a time."""
    venv.mkdir(parents=True, exist_ok=True)
    with open(str(venv / "cfmask-setup.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process is setting up {venv}: waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_ready(venv, wanted, inside=False):  # made by the one we waited for
            return

        stamp, version = _read_stamp(venv), _version_of(venv)
        made_by_hand = (venv / "pyvenv.cfg").exists() if stamp is None else not stamp["made_here"]
        whole = stamp is not None and not stamp["changing"] and version is not None and stamp["python"] == version
        if made_by_hand and python_problem(version or (0,)):
            found = "no working Python" if version is None else "Python {}.{}".format(*version)
            raise SetupError(f"the environment {venv} has {found}, and cfmask needs 3.10 or newer: delete it.")
        if stamp is None and not made_by_hand and any(not entry.name.startswith(OURS) for entry in venv.iterdir()):
            raise SetupError(f"{venv} is there and is no virtual environment: remove it, or set CFMASK_VENV.")

        remake = not whole and not made_by_hand
        installed = stamp["installed"] if stamp is not None and whole else {}
        due = [name for name in wanted if installed.get(name) != wanted[name]]
        needed = _needed_bytes(None if remake else venv, wanted)
        _announce(venv, needed, again=remake and stamp is not None)
        if remake:
            _require_venv_module()
            _clear(venv)  # what is half made counts as free room
        check_disk(venv, needed)
        if remake:
            stamp = {"made_here": True, "changing": True, "python": list(sys.version_info[:2]), "installed": {}}
            _write_stamp(venv, stamp)
            _make(venv)
        stamp = {"made_here": not made_by_hand, "changing": False, "python": _version_of(venv), "installed": installed}
        if remake:
            _write_stamp(venv, stamp)
        if due:
            _install(venv, due, stamp, lock)
        _write_stamp(venv, dict(stamp, installed={**installed, **wanted}))
        _say(f"the environment is ready: {venv}")


def _is_ready(venv: Path, wanted: dict, inside: bool) -> bool:
    stamp = _read_stamp(venv)
    if stamp is None or stamp["changing"] or any(stamp["installed"].get(name) != wanted[name] for name in wanted):
        return False
    # A system upgrade can take the interpreter away from under the environment, or swap it for another version.
    return stamp["python"] == (list(sys.version_info[:2]) if inside else _version_of(venv))


def _announce(venv: Path, needed: int, again: bool) -> None:
    if again:
        _say(f"the environment in {venv} is half made or its Python has changed: making it again.")
    if needed == TORCH_BYTES:
        _say(f"setting up, once: a virtual environment in {venv} with PyTorch and the other requirements.")
        _say("This takes 2 to 15 minutes, by the network, and about 6 GB of disk with the CUDA build of torch.")
    else:
        _say(f"setting up: installing what is missing into {venv} (about a minute).")


def _needed_bytes(venv, wanted: dict) -> int:
    """Bytes that the install may take; `venv` is None if it starts from nothing."""
    asks_for_torch = any(re.search(r"^torch\b", (ROOT / name).read_text(), re.MULTILINE) for name in wanted)
    has_torch = venv is not None and any(venv.glob("lib/python*/site-packages/torch/__init__.py"))
    return TORCH_BYTES if asks_for_torch and not has_torch else OTHER_BYTES


def _require_venv_module() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(_no_venv_module(str(error))) from None


def _no_venv_module(reason: str) -> str:
    return (
        f"{_base_python()} cannot make virtual environments ({reason}): "
        "on Debian and Ubuntu run `apt-get install python3-venv`, elsewhere use a complete Python of 3.10 or newer."
    )


def _make(venv: Path) -> None:
    done = subprocess.run(
        [_base_python(), "-m", "venv", str(venv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        (venv / "cfmask-setup.log").write_text(done.stdout)
        if "ensurepip" in done.stdout:  # Debian ships the module without the wheels that it needs
            raise SetupError(_no_venv_module("ensurepip fails, see {}".format(venv / "cfmask-setup.log")))
        raise SetupError(f"`python -m venv {venv}` failed: {_last_lines(done.stdout)}")


def _install(venv: Path, files: list, stamp: dict, lock) -> None:
    """Installs the requirement files with pip; tells progress on stderr and keeps pip's output in the log."""
    scratch = venv / "tmp"
    shutil.rmtree(str(scratch), ignore_errors=True)
    scratch.mkdir()
    # PIP_USER and PIP_TARGET, set on some clusters for everyone, would put the packages elsewhere.
    environment = {key: value for key, value in os.environ.items() if key not in ("PIP_TARGET", "PIP_PREFIX")}
    environment.update(TMPDIR=str(scratch), PIP_USER="0", PYTHONUNBUFFERED="1", PIP_REQUIRE_VIRTUALENV="0")
    pip = [str(_python(venv)), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    log_path = venv / "cfmask-setup.log"
    try:
        with open(str(log_path), "w") as log:
            _probe_registry(pip, files, environment, scratch, log)
            command = pip + ["install", "--progress-bar", "off"]
            for name in files:
                command += ["-r", str(ROOT / name)]
            # pip holds the lock too: if this process is killed, the next one waits until pip has stopped.
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=str(ROOT),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                pass_fds=(lock.fileno(),),
            )
            output = _follow(process, venv, stamp, log)
    finally:
        shutil.rmtree(str(scratch), ignore_errors=True)
    if process.returncode == 0:
        return
    tail = _last_lines(output)
    if "No space left on device" in output or "Disk quota exceeded" in output:
        raise SetupError(f"the disk became full while installing into {venv}: make room, or set CFMASK_VENV. ({tail})")
    if UNREACHABLE.search(output):
        raise SetupError(
            f"the connection to the package registry broke while installing into {venv}: run this again once it is "
            f"back (pip said: {tail}; full log: {log_path})."
        )
    raise SetupError(f"pip could not install {' and '.join(files)} (pip said: {tail}; full log: {log_path}).")


def _probe_registry(pip: list, files: list, environment: dict, scratch: Path, log) -> None:
    """Asks for one small package with little patience, so that a machine without network hears of it in seconds."""
    names = re.findall(r"^[A-Za-z0-9][\w.-]*", "\n".join((ROOT / name).read_text() for name in files), re.MULTILINE)
    if not names:
        return
    # The last one: torch comes first, and is large.
    command = pip + ["download", "--no-deps", "--progress-bar", "off", "--dest", str(scratch / "probe"), names[-1]]
    command += ["--retries", "1", "--timeout", str(PROBE_TIMEOUT)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PROBE_LIMIT,
        )
        output, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        # Bytes, in spite of text=True.
        output = (error.stdout or b"").decode(errors="replace") + "connection timed out\n"
        failed = True
    log.write(output)
    # A package that is simply not there is no verdict on the network: the install itself will say it better.
    if failed and UNREACHABLE.search(output):
        reasons = re.findall(r"(?:Errno -?\d+\] |timed out|certificate verify failed)[^'\")]*", output)
        reason = re.sub(r"^Errno -?\d+\] ", "", reasons[-1]).strip() if reasons else "no connection"
        raise SetupError(
            f"the package registry cannot be reached to install the requirements ({reason}): connect this machine, or "
            f"tell pip of a proxy or mirror (HTTPS_PROXY, PIP_INDEX_URL), and run this again (full log: {log.name})."
        )


def _follow(process, venv: Path, stamp: dict, log) -> str:
    """Turns pip's output into one line for each package, with the time since the start; returns that output."""
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    live = sys.stderr.isatty()
    start = told = time.monotonic()
    output, now, before = [], "asking the package registry", _count_packages(venv)
    total, fetching = 0, ""

    def tell(text: str, passing: bool = False) -> None:
        stamped = f"[{time.monotonic() - start:4.0f} s] {text}"
        sys.stderr.write(("\r\033[K" if live else "") + stamped + ("" if passing else "\n"))
        sys.stderr.flush()

    try:
        while True:
            try:
                line = lines.get(timeout=0.5)
            except queue.Empty:
                # Between pip's lines: what is on its way, on a terminal at once, in a log file now and then.
                if live or time.monotonic() - told > 20:
                    if total:
                        now = f"unpacking {min(max(_count_packages(venv) - before, 0), total)} of {total} packages"
                    tell(f"... {now}{_megabytes(venv, fetching)}", passing=live)
                    told = time.monotonic()
                continue
            if line is None:
                break
            output.append(line)
            log.write(line)
            log.flush()
            fetched = re.match(r"\s*(?:Downloading|Using cached|Processing) (\S+)(?: \((\d.*)\))?", line)
            if fetched and not fetched.group(1).endswith(".metadata"):
                fetching = fetched.group(1).rsplit("/", 1)[-1]
                now = " ".join(fetching.split("-")[:2])
                tell(now + (f" ({fetched.group(2)})" if fetched.group(2) else ""))
                told = time.monotonic()
            elif line.startswith("Installing collected packages:"):
                # From here on the environment is in pieces until pip is through.
                _write_stamp(venv, dict(stamp, changing=True))
                total, fetching = line.count(",") + 1, ""
                tell(f"unpacking {total} packages ...")
                told = time.monotonic()
        process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        if live:
            sys.stderr.write("\r\033[K")
    return "".join(output)


def _megabytes(venv: Path, file_name: str) -> str:
    """How much of a download has arrived in pip's scratch folder, as a remark."""
    for path in venv.glob(f"tmp/*/{file_name}") if file_name else ():
        try:
            return f": {path.stat().st_size / 1e6:.0f} MB have arrived"
        except OSError:  # just moved away by pip
            pass
    return ""


def _count_packages(venv: Path) -> int:
    return sum(1 for _ in venv.glob("lib/python*/site-packages/*.dist-info"))


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _base_python() -> str:
    """The interpreter that environments are made of: not the one of an environment that may have to go."""
    return getattr(sys, "_base_executable", None) or sys.executable


def _version_of(venv: Path):
    """[major, minor] of the environment's Python, or None if it does not run."""
    command = [str(_python(venv)), "-I", "-S", "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        return [int(part) for part in subprocess.check_output(command, stderr=subprocess.DEVNULL).split()]
    except (OSError, subprocess.CalledProcessError):
        return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_stamp(venv: Path):
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


def _clear(venv: Path) -> None:
    """Empties the folder; the stamp goes last, so that a kill in between leaves it marked as ours to repair."""
    keep = ("cfmask-setup.lock", "cfmask-setup.json")
    for entry in venv.iterdir():
        if entry.name in keep:
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
