"""Where commands find data: --shards and --sets, else the cluster file's shards and eval_sets."""

from __future__ import annotations

import argparse
from pathlib import Path

from cfmask.errors import UserError
from cfmask.tool_arguments import DATA_HELP
from launch.allocation.cluster_file import ClusterFile, load_cluster_file
from launch.allocation.settings import CLUSTER_HELP

_FROM_FILE = "(default: shards of the cluster file)"


def add_shards_argument(parser: argparse.ArgumentParser, *, cluster: bool) -> None:
    """Add --shards, and --cluster unless the command has it as one of its allocation's flags.

    Args:
        cluster: Whether to add --cluster.
    """
    parser.add_argument("--shards", metavar="DIR_OR_URL", help=f"{DATA_HELP} {_FROM_FILE}")
    if cluster:
        parser.add_argument("--cluster", type=Path, metavar="FILE", help=CLUSTER_HELP)


def shards_of_file(cluster: Path | None) -> str:
    """The shards of the cluster file, for a command that has no flag for them.

    Raises:
        UserError: It has none, or cannot be used.
    """
    file = load_cluster_file(cluster)
    if file.shards is None:
        raise UserError("Name a folder of shards. A cluster file (slurm/cluster.toml) can set it for all commands.")
    return file.shards


def fill_in_data(arguments: argparse.Namespace, file: ClusterFile | None = None, *, sets: bool = False) -> None:
    """Set ``arguments.shards``, if it was not given, from the cluster file.

    Args:
        file: The cluster file; by default the one that --cluster, or its absence, means.
        sets: Also set ``arguments.sets``, from eval_sets.

    Raises:
        UserError: Neither the flags nor the file have them, or the file cannot be used.
    """
    file = load_cluster_file(arguments.cluster) if file is None else file
    where = f"The cluster file {file.path} can" if file.path else "A cluster file (slurm/cluster.toml) can"
    if not arguments.shards:
        arguments.shards = file.shards
    if not arguments.shards:
        raise UserError(f"--shards is missing: {DATA_HELP}. {where} set it for all commands, as shards.")
    if sets and not arguments.sets:
        arguments.sets = list(file.eval_sets)
    if sets and not arguments.sets:
        raise UserError(
            f"--sets is missing: folders in {arguments.shards} to evaluate on. {where} set them, as eval_sets."
        )
