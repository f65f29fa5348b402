"""The parts, the most valuable first, and the command that runs them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cfmask.errors import UserError
from tools.benchmarks.fresh_process import SHARED_IMPORTS
from tools.benchmarks.gpu import steps
from tools.benchmarks.gpu.attention import attention
from tools.benchmarks.gpu.bits import bits
from tools.benchmarks.gpu.checkpoints import checkpoints
from tools.benchmarks.gpu.compiled import compiled
from tools.benchmarks.gpu.environment import environment
from tools.benchmarks.gpu.graphs import graphs
from tools.benchmarks.gpu.kernels import kernels
from tools.benchmarks.gpu.loader_threads import loader_threads
from tools.benchmarks.gpu.profile import profile
from tools.benchmarks.gpu.runner import CANNOT_RUN, LEFT_OUT, RAN, Part, Runner
from tools.benchmarks.gpu.setting import TINY_CONFIG, Setting
from tools.benchmarks.gpu.tests import gpu_tests
from tools.benchmarks.gpu.whole_run import whole_run

STAGES: tuple[tuple[Part, ...], ...] = (
    (Part("environment", environment, 3),),
    # These are not timed and share the card.
    (
        Part("kernels", kernels, 15),
        Part("bits", bits, 40),
        Part("tests", gpu_tests, 120),
        Part("run", whole_run, 65),
    ),
    (Part("steps", steps.SMALL, 55),),
    (Part("profile", profile, 12),),
    (Part("graphs", graphs, 20),),
    (Part("checkpoint", checkpoints, 15),),
    (Part("steps-512", steps.LARGE, 25),),
    (Part("attention", attention, 4),),
    (Part("loader-threads", loader_threads, 35),),
    (Part("steps-L14", steps.L14_STEPS, 20),),
    (Part("compile", compiled, 70),),
)
"""Parts, the most valuable first; those of a stage run side by side. Seconds are those of an H100 with 16 cores."""

NOT_MEASURED = (
    "Not measured: anything that needs several GPUs. NCCL refuses two ranks on one GPU, so reductions over ranks and "
    "DDP's overlap are left out."
)


def run(arguments: argparse.Namespace) -> str:
    """Run the parts that fit, and report on them in ``arguments.out``.

    Raises:
        UserError: a part is unknown, there is no GPU, or a part failed. In the last case, all parts have run.
    """
    stages = chosen(STAGES, arguments.only, arguments.skip)
    start = time.monotonic()
    if not arguments.dry and not has_gpu():
        raise UserError("torch finds no GPU here. --dry runs the same code on the CPU, with a tiny model.")
    for module in SHARED_IMPORTS:
        __import__(module)
    torch.set_num_threads(1 if arguments.dry else 8)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "log.txt").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the parts too
    with tempfile.TemporaryDirectory(prefix="cfmask-gpu-", ignore_cleanup_errors=True) as temporary:
        work = Path(temporary)
        tiny = work / "tiny.json"
        tiny.write_text(json.dumps(TINY_CONFIG))
        data = arguments.data and arguments.data.resolve()
        setting = Setting(arguments.dry, arguments.out.resolve(), work, data, tiny)
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        heading = f"# cfmask on a GPU, {when}, budget {arguments.minutes:g} minutes"
        heading += (
            "\n\nDry run: on the CPU, with a tiny model in place of every model that is named." if arguments.dry else ""
        )
        heading += f"\n\nImports took {time.monotonic() - start:.1f} s."
        runner = Runner(setting, 60 * arguments.minutes, heading, start)
        outcomes = runner.run(stages)
        left_out = [name for name, outcome in outcomes.items() if outcome.status == LEFT_OUT]
        end = [f"Total: {time.monotonic() - start:.0f} s.", NOT_MEASURED]
        if left_out:
            end.insert(0, f"Parts left out because the budget was spent: {', '.join(left_out)}.")
        runner.write_report(*end)
    report = arguments.out / "report.md"
    bad = [f"{n} {o.status}" for n, o in outcomes.items() if o.status not in (RAN, LEFT_OUT, CANNOT_RUN)]
    if bad:
        raise UserError(f"{'; '.join(bad)}. See {report}.")
    return f"{report}: {', '.join(f'{name} {outcome.status}' for name, outcome in outcomes.items())}"


def chosen(stages: Sequence[Sequence[Part]], only: Sequence[str], skip: Sequence[str]) -> list[list[Part]]:
    """The stages with the parts that ``only`` and ``skip`` leave; empty stages are dropped.

    Raises:
        UserError: a name is unknown.
    """
    names = [part.name for stage in stages for part in stage]
    unknown = sorted({*only, *skip} - set(names))
    if unknown:
        raise UserError(f"Unknown part {', '.join(unknown)}. Choose from {', '.join(names)}.")
    wanted = [[part for part in stage if part.name in (only or names) and part.name not in skip] for stage in stages]
    return [stage for stage in wanted if stage]


def has_gpu() -> bool:
    """Asks in a child process, because a process that has initialised CUDA cannot fork children that use it."""
    pid = os.fork()
    if pid == 0:
        found = False
        try:
            found = torch.cuda.is_available()
        finally:
            os._exit(0 if found else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
