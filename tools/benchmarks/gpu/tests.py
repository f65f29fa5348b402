"""The tests marked gpu, in parallel processes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

from tools.benchmarks import REPO
from tools.benchmarks.gpu.runner import CannotRun, Section
from tools.benchmarks.gpu.setting import Setting

NEEDED = {"pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis"}
KEPT = re.compile(r"FAILED|ERROR|E  |=====|\d+\.\d+s (call|setup)|SKIPPED")


def gpu_tests(setting: Setting, section: Section) -> dict[str, Any]:
    """Report the tests that failed.

    Raises:
        AssertionError: a test failed, or none ran.
        CannotRun: a package that the tests need is not installed.
    """
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CannotRun(f"{', '.join(missing)} not installed (tests/requirements.txt)")
    junit = setting.work / "gpu-tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfEs"]
    command += ["--numprocesses", "1" if setting.dry else "8", f"--junitxml={junit}", "--durations=8"]
    if setting.dry:
        command.append("tests/test_gpu.py")  # one file is enough to show that tests are found
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    if setting.data is not None:
        environment["CFMASK_TEST_DATA"] = str(setting.data)
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=environment)
    print(done.stdout[-20000:], done.stderr[-3000:], flush=True)
    kept = [line for line in done.stdout.splitlines() if KEPT.match(line)]
    section.note("```\n" + "\n".join([*kept[-60:], *done.stdout.strip().splitlines()[-1:]])[-6000:] + "\n```")
    counts = {name: 0 for name in ("tests", "failures", "errors", "skipped")}
    for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
        counts = {name: count + int(suite.get(name, 0)) for name, count in counts.items()}
    if setting.dry:
        section.note("Without a GPU, all of these tests are skipped.")
    assert done.returncode == 0, f"pytest ended with exit code {done.returncode}"
    assert counts["tests"] > counts["skipped"] or setting.dry, "every test was skipped"
    return counts
