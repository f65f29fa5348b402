"""What every test may use. Importable from tests: reference.py, towers.py."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

from cfmask.runtime.logging import log_to_terminal
from slurm_fixture import slurm_cluster  # noqa: F401

REPO = Path(__file__).resolve().parents[1]
LEAN = REPO / "tests/lean"

# A shell that starts the tests in the background lets them ignore Ctrl-C, and all that they start: tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")

os.fsync = lambda descriptor: None  # as in the processes that tests start (lean/lean.py)

# How long an example takes is not what these tests are about, and a busy machine would fail them.
settings.register_profile("cfmask", deadline=None)
settings.load_profile("cfmask")


@pytest.fixture(autouse=True)
def terminal_log():
    """Log records are shown as by a command; a test may have configured a job's log."""
    log_to_terminal()


@pytest.fixture(autouse=True)
def one_thread():
    """A tool or a rank in this process takes as many threads as there are cores, and a test that forks after that has a
    child that waits for ever for threads that it does not have."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture
def poisoned():
    """New tensors are full of NaN: an element left unwritten shows."""
    import torch

    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # a run in this process has switched it off
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


LONGEST = (
    # Those that wait for Slurm beside those that compute.
    *("drill", "resume", "sweep", "cancel", "reproduce", "hangs", "bench_gpu", "wandb", "doctor", "make_shards_slurm"),
    *("rank_death", "environment", "fused", "ddp", "memory", "make_shards", "chain", "relevance_kernel"),
    *("process_death", "segment", "array", "async_checkpoint", "array_split", "status", "cluster_in_a_box", "methods"),
    "metrics",
)


def pytest_terminal_summary(terminalreporter):
    """Print the files that took longest, if any took a minute; each worker works on one file at a time."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.location[0]] += report.duration
    if seconds and max(seconds.values()) >= 60:
        terminalreporter.section("slowest files")
        for file, took in seconds.most_common(15):
            terminalreporter.write_line(f"{took:6.0f} s  {file}")
        terminalreporter.write_line(f"{seconds.total():6.0f} s  all files")


def pytest_collection_modifyitems(items):
    """Files that take minutes first: several are worked on at once, and none of these should be left for the end."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_configure(config):
    """Processes that tests start run this checkout's code, whichever one is installed, and do not import what they do
    not call: that is half the time of every rank's start. The workers of pytest-xdist, which the process that has
    ``numprocesses`` starts, import everything."""
    own = [str(REPO)]
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        own.insert(0, str(LEAN))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*own, os.environ.get("PYTHONPATH")]))


def pytest_collection_finish():
    """Leave imported modules, a million objects, out of garbage collections from now on: a full one takes half a
    second, and one in a forked child copies their memory."""
    gc.freeze()


@pytest.fixture
def all_imports(monkeypatch):
    """What the test starts imports all that it does outside of tests (lean/lean.py)."""
    import made

    monkeypatch.setenv("PYTHONPATH", made.path_of_all_imports())
