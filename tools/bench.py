#!/usr/bin/env python3
"""Measure what cfmask costs on this machine, beside other libraries and the authors' algorithm.

    python tools/bench.py loader  --source TREE     images/s of training streams, warm and cold, for every store
    python tools/bench.py convert --source TREE     images/s of conversions, for every store
    python tools/bench.py resume                    seconds to the first batch, at 0 % and 99 % of all of ImageNet
    python tools/bench.py parts   --source TREE     time of each part of decoding and converting an image
    python tools/bench.py order                     how well the order mixes samples, beside a full permutation
    python tools/bench.py step                      training steps beside the authors' algorithm: time, FLOPs, memory
    python tools/bench.py checkpoint                how long a checkpoint stops training
    python tools/bench.py watch                     what watching ranks costs a step
    python tools/bench.py gpu                       all measurements that need a GPU, within minutes

TREE is a folder of class/image.JPEG; without --source, noise that looks like photographs of ImageNet's size is drawn.
Peers run in an interpreter of their own (tools/peers-requirements.txt says how to make it). A peer that cannot be
imported is listed with the reason. Contenders take turns, each in a fresh process. Tables show medians and ranges.
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
    from cfmask.presets import PRESETS, canonical_name
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.tool_arguments import add_device_argument
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")

BENCHMARKS = {
    "loader": "training streams",
    "convert": "conversions",
    "resume": "time to the first batch",
    "parts": "time of each part of decoding and converting an image",
    "order": "how well the order mixes samples",
    "step": "training steps",
    "checkpoint": "how long a checkpoint stops training",
    "watch": "what watching ranks costs a step",
    "gpu": "all measurements that need a GPU, within minutes",
}
"""Modules of tools/benchmarks/, and their help."""
ROUNDS = {"loader": 5, "convert": 5, "resume": 5, "step": 3, "checkpoint": 5, "watch": 5}
MODELS = {"watch": "ViT-B-32-quickgelu", "checkpoint": "ViT-B-16-quickgelu"}


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    # Imported late: torch takes seconds to import, and --help does not need it.
    print(importlib.import_module(f"tools.benchmarks.{arguments.verb}").run(arguments))


def parser() -> argparse.ArgumentParser:
    top = CommandParser(__doc__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="|".join(BENCHMARKS))
    of = {name: verbs.add_parser(name, help=text) for name, text in BENCHMARKS.items()}
    for name in ("loader", "convert", "parts"):
        of[name].add_argument("--source", type=Path, metavar="TREE", help="folder of class/image.JPEG (default: drawn)")
    for name in ("loader", "convert", "resume"):
        add_stream_arguments(of[name], peers=name != "resume")
    of["convert"].add_argument("--stores", nargs="+", choices=STORES, default=STORES, help="stores (default: all)")
    for name, rounds in ROUNDS.items():
        of[name].add_argument(
            "--rounds",
            type=int,
            default=rounds,
            metavar="N",
            help=f"number of measurements of each (default: {rounds})",
        )
    add_step_arguments(of["step"])
    for name, model in MODELS.items():
        of[name].add_argument("--model", default=model, metavar="NAME", help=f"{MODEL_HELP} (default: {model})")
        add_device_argument(of[name])
    of["checkpoint"].add_argument(
        "--folder", type=Path, metavar="DIR", help="folder on the disk to write to (default: a temporary folder)"
    )
    add_gpu_arguments(of["gpu"])
    return top


MODEL_HELP = "open_clip model, or the path of a configuration"


def add_stream_arguments(verb: argparse.ArgumentParser, *, peers: bool) -> None:
    add, python = verb.add_argument, REPO / ".venv-peers/bin/python"
    if peers:
        add("--peers", type=Path, default=python, metavar="PYTHON", help="Python with the peers (default: .venv-peers)")
        add("--images", type=int, metavar="N", help="repeat the source's images until there are at least N")
        add("--seconds", type=float, default=8, metavar="S", help="length of a warm measurement (default: 8)")
        add("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
        add("--only", nargs="+", default=[], metavar="NAME", help="measure only these")
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help="processes on this machine (default: all cores)")
    add("--work", type=Path, metavar="DIR", help="folder for the data that is made (default: a temporary folder)")


def add_step_arguments(verb: argparse.ArgumentParser) -> None:
    add, presets = verb.add_argument, sorted(set(PRESETS) - {"lp-ft"})
    add("--model", metavar="NAME", help=f"{MODEL_HELP} (default: several)")
    add("--batch-size", type=int, metavar="N", help="images at a time (default: 32, on a GPU several)")
    precisions = ("fp32", "tf32", "bf16")
    add("--precision", choices=precisions, help="precision of cfmask's steps (default: fp32, on a GPU bf16)")
    add_device_argument(verb)
    add("--compiled", action="store_true", help="add a row with torch.compile, which takes a minute a round")
    help_of_presets = "presets to measure in place of variants of the headline method"
    add("--presets", nargs="+", type=canonical_name, choices=presets, default=[], metavar="ROW", help=help_of_presets)
    add("--steps", type=int, metavar="N", help="timed steps of a round (default: 3, on a GPU 20)")


def add_gpu_arguments(verb: argparse.ArgumentParser) -> None:
    add, out = verb.add_argument, Path("gpu-report")
    add("--minutes", type=float, default=8, metavar="M", help="time that may be spent (default: 8)")
    add("--only", nargs="+", default=[], metavar="NAME", help="measure only these")
    add("--skip", nargs="+", default=[], metavar="NAME", help="leave these parts out")
    add("--dry", action="store_true", help="run all parts on the CPU, with a tiny model")
    help_of_out = f"folder for report.md, results.json and log.txt (default: {out})"
    add("--out", type=Path, default=out, metavar="DIR", help=help_of_out)
    add("--data", type=Path, metavar="DIR", help="folder with the photographs and the tower that some tests need")


if __name__ == "__main__":
    sys.exit(main())
