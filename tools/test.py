"""Runs everything that has to hold: ruff, mypy, pytest. Sets up its own environment on first use.

    python3 tools/test.py                     all of it, except the sweeps marked slow
    python3 tools/test.py --slow              those too
    python3 tools/test.py --quick             the linters, and tests that start no runs: two minutes
    python3 tools/test.py --lowest            core tests at the lowest versions that requirements.txt allows
    python3 tools/test.py tests/test_step.py -k relevance     what follows goes to pytest

pytest runs even if a linter complains, so that one run shows everything; the exit code is 0 only if all passed.
Tests that were skipped are listed at the end with the reason, and the files that took longest with their seconds.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = str(min(8, 2 * len(os.sched_getaffinity(0))))
"""Two for each core: most of what tests do is wait, for a Slurm or a run that they have started."""
QUICK = (
    *("architecture", "checkpoint", "checkpoint_state", "cluster_file", "demo_parts", "health", "images", "optim"),
    *("passes", "plan", "recipe", "restarts", "run_restarts", "runs", "secrets", "shards", "slurm_client", "step"),
    *("validation", "weights"),
)
"""What --quick runs of tests/."""
LOWEST = (*QUICK, "ddp", "evaluator", "fused", "methods", "models", "preprocessing", "relevance_kernel", "stream")
"""What --lowest runs of tests/."""


FLAGS = ("--slow", "--quick", "--lowest")


def main(arguments: list) -> int:
    slow, quick, lowest = (flag in arguments for flag in FLAGS)
    arguments = [argument for argument in arguments if argument not in FLAGS]
    pytest_options = [] if slow else ["-m", "not slow and not slurm" if quick or lowest else "not slow"]
    pytest_options += [f"tests/test_{name}.py" for name in (QUICK if quick else LOWEST if lowest else ())]
    checks = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy"],
        "pytest": [
            *("pytest", "--numprocesses", WORKERS, "--dist", "loadfile", "--no-loadscope-reorder"),
            *pytest_options,
            *arguments,
        ],
    }
    if lowest:
        del checks["ruff check"], checks["ruff format"], checks["mypy"]
    if not (slow or quick or lowest):
        print("Left out: the sweeps marked slow; python3 tools/test.py --slow runs them too.", flush=True)
    failed = []
    for name, command in checks.items():
        print(f"== {name}", flush=True)
        variables = dict(os.environ, OMP_NUM_THREADS="1")  # threads of many processes are in each other's way
        if subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=variables).returncode:
            failed.append(name)  # pytest's 5 included: no tests found is a failure
    if failed:
        print("FAILED: " + ", ".join(failed), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0)
    import environment

    environment.ensure(("requirements.txt", "tests/requirements.txt"), lowest="--lowest" in sys.argv)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
