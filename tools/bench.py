#!/usr/bin/env python3
"""Benchmarks: what cfmask costs beside its peers, on this machine, in one run.

    python tools/bench.py loader  --source TREE     images/s of training streams, warm and cold, every store
    python tools/bench.py convert --source TREE     images/s of conversions, every store
    python tools/bench.py resume                    seconds to the first batch, at 0 % and 99 % of all of ImageNet
    python tools/bench.py parts   --source TREE     what the time of an image goes to
    python tools/bench.py order                     how well the order mixes, beside a full permutation
    python tools/bench.py step                      training steps beside the authors' way: images/s, FLOPs, memory
    python tools/bench.py checkpoint                how long a checkpoint keeps training waiting
    python tools/bench.py watch                     what heartbeats and times of ranks cost a step
    python tools/bench.py gpu                       all that is worth knowing of this code on this GPU, in minutes

TREE is a folder of class/image.JPEG; without --source photograph-like noise of ImageNet's size is drawn. Peers run in
an interpreter of their own (tools/peers-requirements.txt says how it is made); one that is not there is named with
the reason. Contenders take turns, each in a fresh process; tables show medians and the range over the rounds.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
try:
    from cfmask.data.images import STORES
    from cfmask.presets import PRESETS
    from cfmask.runtime.command import exits_cleanly
    from cfmask.tool_arguments import add_device_argument
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")

BENCHMARKS = {
    "loader": "training streams",
    "convert": "conversions",
    "resume": "time to the first batch",
    "parts": "what the time of an image goes to",
    "order": "how well the order mixes",
    "step": "training steps",
    "checkpoint": "what a checkpoint costs training",
    "watch": "what it costs that ranks are watched",
    "gpu": "everything that needs a GPU, within some minutes",
}
"""Each a module of tools/benchmarks/ of the same name."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="|".join(BENCHMARKS))
    of = {name: verbs.add_parser(name, help=what, allow_abbrev=False) for name, what in BENCHMARKS.items()}
    for name in ("loader", "convert", "parts"):
        of[name].add_argument("--source", type=Path, metavar="TREE", help="folder of class/image.JPEG (default: drawn)")
    for name in ("loader", "convert", "resume"):
        add_stream_arguments(of[name], peers=name != "resume")
    of["convert"].add_argument(
        "--stores", nargs="+", choices=STORES, default=STORES, help="what shards hold (default: all of them)"
    )
    for name, rounds in (("loader", 5), ("convert", 5), ("resume", 5), ("step", 3), ("checkpoint", 5), ("watch", 5)):
        of[name].add_argument(
            "--rounds", type=int, default=rounds, metavar="N", help=f"how often each is measured (default: {rounds})"
        )
    add_step_arguments(of["step"])
    for verb, model in ((of["watch"], "ViT-B-32-quickgelu"), (of["checkpoint"], "ViT-B-16-quickgelu")):
        verb.add_argument(
            "--model",
            default=model,
            metavar="NAME",
            help=f"open_clip model, or a configuration's path (default: {model})",
        )
        add_device_argument(verb)
    verb.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to write to (default: a temporary one)")
    add_gpu_arguments(of["gpu"])
    return top


def add_stream_arguments(verb: argparse.ArgumentParser, *, peers: bool) -> None:
    if peers:
        verb.add_argument(
            "--peers",
            type=Path,
            default=REPO / ".venv-peers/bin/python",
            metavar="PYTHON",
            help="interpreter with the peers (default: that of .venv-peers)",
        )
        verb.add_argument("--images", type=int, metavar="N", help="repeat the source's images up to so many")
        verb.add_argument("--seconds", type=float, default=8, metavar="S", help="of a warm measurement (default: 8)")
        verb.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
        verb.add_argument("--only", nargs="+", default=[], metavar="NAME", help="measure these alone")
    cores = len(os.sched_getaffinity(0))
    verb.add_argument(
        "--workers", type=int, default=cores, metavar="N", help="processes on this machine (default: all cores)"
    )
    verb.add_argument("--work", type=Path, metavar="DIR", help="where sets are made (default: a temporary folder)")


def add_step_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", metavar="NAME", help="open_clip model, or a configuration's path (default: several)")
    verb.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default: 32, on a GPU several)")
    verb.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), help="of our steps (default: fp32, on a GPU bf16)"
    )
    add_device_argument(verb)
    verb.add_argument("--compiled", action="store_true", help="a row with torch.compile too (a minute a round)")
    verb.add_argument(
        "--presets",
        nargs="+",
        choices=sorted(set(PRESETS) - {"lp-ft"}),
        default=[],
        metavar="ROW",
        help="these methods beside the authors', in place of the headline's variants",
    )
    verb.add_argument("--steps", type=int, metavar="N", help="timed in a round (default: 3, on a GPU 20)")


def add_gpu_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--minutes", type=float, default=8, metavar="M", help="what may be spent (default: 8)")
    verb.add_argument("--only", nargs="+", default=[], metavar="NAME", help="measure these alone")
    verb.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="leave these parts out")
    verb.add_argument("--dry", action="store_true", help="take every path on the CPU, with a tiny model")
    verb.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-report"),
        metavar="DIR",
        help="folder for report.md, results.json and log.txt (default: gpu-report)",
    )
    verb.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the photographs and the tower that some tests look for"
    )


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    # Imported when it is wanted: torch takes seconds, and --help needs none of it.
    print(importlib.import_module(f"tools.benchmarks.{arguments.verb}").run(arguments))


if __name__ == "__main__":
    sys.exit(main())
