"""Loaders and converters of cfmask and its peers, each measured in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from tools.benchmarks.photographs import draw_tree, multiply

REPO = Path(__file__).resolve().parents[2]
IN_PROCESSES = "cfmask_processes"
OURS = ("cfmask", IN_PROCESSES)


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run share."""

    source: Path
    work: Path
    peers: Path
    workers: int
    batch: int
    rounds: int
    seconds: float

    def call(self, module: str, *arguments: object, python: Path | str = sys.executable) -> dict[str, Any]:
        """The JSON object that a module of tools/benchmarks/ prints last when it is run.

        Raises:
            UserError: it printed none; with the last line that it said.
        """
        command = [str(python), "-m", f"tools.benchmarks.{module}", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO)
        try:
            # Whatever the exit code: some libraries abort when they are torn down, after the measurement.
            return json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            words = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            raise UserError(f"{module} {' '.join(map(str, arguments[:2]))} failed: {words}") from None

    def missing_peers(self) -> dict[str, str]:
        """Peers that cannot run here, with the reason."""
        if not self.peers.exists():
            return {"all peers": f"{self.peers} is not there: tools/peers-requirements.txt says how to make it"}
        return {name: why for name, why in self.call("peers", "list", python=self.peers).items() if why}

    def load(self, store: str, name: str, seconds: float) -> dict[str, Any]:
        common = ("--batch", self.batch, "--workers", self.workers, "--seconds", seconds)
        if name in OURS:
            how = ("--processes",) if name == IN_PROCESSES else ()
            return self.call("ours", "loader", self.work / "cfmask" / store / "train", *common, *how)
        arguments = ("--data", self.work / "peers", "--source", self.source, *common)
        return self.call("peers", "loader", name, *arguments, python=self.peers)

    def convert(self, store: str, name: str, out: Path) -> dict[str, Any]:
        common = ("--source", self.source, "--out", out, "--store", store, "--workers", self.workers)
        if name == "cfmask":
            return self.call("ours", "convert", *common)
        return self.call("peers", "convert", name, *common, python=self.peers)

    def prepare(self, store: str, name: str) -> None:
        """Make what a loader reads."""
        if name not in OURS:
            self.load(store, name, 0.1)
        elif not (self.work / "cfmask" / store / "train/manifest.json").exists():
            self.convert(store, "cfmask", self.work / "cfmask" / store)


def forget_files(*folders: Path) -> None:
    """Drop folders' files from the page cache, so that they are read from the disk next."""
    os.sync()
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[Bench]:
    """What the flags of loader and convert ask for: a source of images, drawn if none is given, and a work folder."""
    with tempfile.TemporaryDirectory(prefix="cfmask-bench-") as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        source = (arguments.source or draw_tree(work / "drawn")).resolve()
        if arguments.images:
            source = multiply(source, work / f"source-{arguments.images}", arguments.images)
        yield Bench(
            source=source,
            work=work,
            peers=arguments.peers.absolute(),
            workers=arguments.workers,
            batch=arguments.batch_size,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
        )
