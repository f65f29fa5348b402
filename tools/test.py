"""Runs everything that has to hold: ruff, mypy, pytest. Sets up its own environment on first use.

    python3 tools/test.py                     all of it, except the sweeps marked slow
    python3 tools/test.py --slow              those too
    python3 tools/test.py tests/test_step.py -k relevance     what follows goes to pytest

pytest runs even if a linter complains, so that one run shows everything; the exit code is 0 only if all passed.
Tests that were skipped are listed at the end with the reason.
"""

import os
import subprocess
import sys

import _bootstrap

WORKERS = str(min(4, len(os.sched_getaffinity(0))))


def main(arguments: list) -> int:
    slow = "--slow" in arguments
    arguments = [argument for argument in arguments if argument != "--slow"]
    pytest_options = [] if slow else ["-m", "not slow"]
    checks = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy"],
        # Threads of many small test processes on few cores only get into each other's way; but most of what these tests
        # do is wait for processes that they have started, so several files are worked on at once.
        "pytest": [
            *("pytest", "--numprocesses", WORKERS, "--dist", "loadfile", "--no-loadscope-reorder"),
            *pytest_options,
            *arguments,
        ],
    }
    if not slow:
        print("Left out: the sweeps marked slow; python3 tools/test.py --slow runs them too.", flush=True)
    failed = []
    for name, command in checks.items():
        print(f"== {name}", flush=True)
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if subprocess.run([sys.executable, "-m", *command], cwd=_bootstrap.ROOT, env=environment).returncode:
            failed.append(name)  # pytest's 5 included: no tests found is a failure
    if failed:
        print("FAILED: " + ", ".join(failed), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0)
    _bootstrap.ensure(("requirements.txt", "tests/requirements.txt"))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
