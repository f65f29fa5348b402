"""The loaders and converters of cfmask and of its peers, each measured in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from tools.benchmarks import REPO
from tools.benchmarks.fresh_process import fresh
from tools.benchmarks.ours import our_convert, our_loader, our_loader_in_processes
from tools.benchmarks.photographs import draw_tree, repeat_images

OURS: dict[str, Callable[..., dict[str, float]]] = {"cfmask": our_loader, "cfmask_processes": our_loader_in_processes}


@dataclass(frozen=True)
class Comparison:
    """What all measurements of a comparison have in common."""

    source: Path
    """Tree of class/image.JPEG."""
    work: Path
    """Folder for the data of all loaders and converters."""
    peers: Path
    """Python interpreter with the peers."""
    workers: int
    batch: int
    rounds: int
    seconds: float
    """Length of a warm measurement of a loader."""
    only: frozenset[str]
    """Names to measure; all if empty."""

    def call_peer(self, *arguments: object) -> dict[str, Any]:
        """The JSON object that ``python -m tools.benchmarks.peers`` prints last.

        Raises:
            UserError: it printed none. The message has the last line of its output.
        """
        command = [str(self.peers), "-m", "tools.benchmarks.peers", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO)
        try:
            # The exit code is ignored: some libraries abort at their exit, after the measurement.
            return json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            output = done.stderr.strip() or done.stdout.strip() or "no output"
            raise UserError(f"{' '.join(map(str, arguments[:2]))} failed: {output.splitlines()[-1]}") from None

    def choose(self, names: list[str]) -> tuple[list[str], dict[str, str]]:
        """The names that can be measured, and the reasons why others cannot."""
        if self.peers.exists():
            problems = {name: why for name, why in self.call_peer("list").items() if why}
        else:
            why = f"{self.peers} does not exist; tools/peers-requirements.txt says how to make it"
            problems = dict.fromkeys(set(names) - set(OURS), why)
        names = [name for name in names if name in self.only or not self.only]
        return [name for name in names if name not in problems], {n: problems[n] for n in names if n in problems}

    def load(self, store: str, name: str, seconds: float) -> dict[str, Any]:
        if name in OURS:
            return fresh(OURS[name], self.work / "cfmask" / store / "train", self.batch, self.workers, seconds)
        data = ("--data", self.work / "peers", "--source", self.source)
        return self.call_peer(
            *("loader", name, *data, "--batch", self.batch, "--workers", self.workers, "--seconds", seconds)
        )

    def convert(self, store: str, name: str, out: Path) -> dict[str, Any]:
        if name == "cfmask":
            return fresh(our_convert, self.source, out, store, self.workers)
        common = ("--source", self.source, "--out", out, "--store", store, "--workers", self.workers)
        return self.call_peer("convert", name, *common)

    def prepare(self, store: str, name: str) -> None:
        """Make the data that a loader reads."""
        if name not in OURS:
            self.load(store, name, 0.1)
        elif not (self.work / "cfmask" / store / "train/manifest.json").exists():
            self.convert(store, "cfmask", self.work / "cfmask" / store)


def drop_from_page_cache(*folders: Path) -> None:
    """Have files of the folders read from the disk next time."""
    os.sync()
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """The comparison that the flags ask for, with a source of images, which is drawn if none is given."""
    with tempfile.TemporaryDirectory(prefix="cfmask-bench-") as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        source = (arguments.source or draw_tree(work / "drawn")).resolve()
        if arguments.images:
            source = repeat_images(source, work / f"source-{arguments.images}", arguments.images)
        yield Comparison(
            source=source,
            work=work,
            peers=arguments.peers.absolute(),
            workers=arguments.workers,
            batch=arguments.batch_size,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            only=frozenset(arguments.only),
        )
