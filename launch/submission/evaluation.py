"""Evaluations: the flags that evaluate, wise_ft and soup share, the Evaluation that they describe, and its start as a
job or in this process."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cfmask.data.benchmarks import ALIASES
from cfmask.evaluation.checks import check_choices, check_models_and_sets, chosen_models, set_folder
from cfmask.evaluation.model_origin import CHOICES, LAST, settled
from cfmask.evaluation.selection import FLAG, FLAG_HELP
from cfmask.evaluation_spec import Evaluation, is_of_other_models
from cfmask.run_search import find_model
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_object
from cfmask.runtime.output import silence_output
from cfmask.urls import is_remote
from launch.allocation.cluster_file import find_cluster_file, load_cluster_file
from launch.allocation.data import add_shards_argument, fill_in_data
from launch.allocation.resolve import Allocation, check_arithmetic, resolve_allocation, resolve_precision
from launch.allocation.settings import add_allocation_arguments, given_flags
from launch.state.processes import ending_signals
from launch.submission.claims import check_folder, take_folder
from launch.submission.planning import PlannedJob, claim_run_folders, should_skip
from launch.submission.submit import check_with_slurm, dry_run, print_work, start
from launch.submission.summary import About, evaluation_lines

_Kind = TypeVar("_Kind", bound=Evaluation)


def add_arguments(parser: argparse.ArgumentParser, *, sets_required: bool = True) -> None:
    """Add the flags that evaluate, wise_ft and soup share."""
    add_shards_argument(parser, cluster=False)
    parser.add_argument(
        "--sets",
        nargs="+",
        default=[],
        metavar="SET",
        help=f"folders under --shards to evaluate on; {', '.join(ALIASES)} are the paper's six"
        + (" (default: eval_sets of the cluster file)" if sets_required else ""),
    )
    parser.set_defaults(sets_required=sets_required)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for results.json, table.md, table.tex and pictures; the same command resumes in it "
        "(default: evaluations/<tool>-<hash>)",
    )
    parser.add_argument(
        "--checkpoint",
        choices=CHOICES,
        default=LAST,
        help="which checkpoint to take from the folder of a training run: that of the last step, or that of the epoch "
        "that was best on the run's held-out set, as in the authors' evaluation (default: last). Paths of model "
        "files and checkpoint folders are not affected",
    )
    parser.add_argument(FLAG, action="store_true", help=FLAG_HELP)
    parser.add_argument(
        "--allow-count-mismatch", action="store_true", help="accept a known set that has other counts than the original"
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images at a time (default: 256)")
    parser.add_argument(
        "--loader-workers", type=int, metavar="N", help="reader threads (default: the number of cores - 1)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "tf32", "bf16"),
        default="auto",
        help="arithmetic of the forward pass; auto: bf16 on GPUs, fp32 without (default: auto)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print what would run; nothing runs"
    )
    parser.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wait until the job ends, and show the results (default: yes)",
    )
    add_allocation_arguments(parser, here=True)


def allocation_of(arguments: argparse.Namespace) -> Allocation | None:
    """The allocation that the flags describe; None: work in this process. Sets, and shards if they are needed, are
    taken from the cluster file unless flags give them."""
    file = load_cluster_file(arguments.cluster)
    if arguments.sets_required or arguments.sets or getattr(arguments, "holdout", None):
        fill_in_data(arguments, file, sets=arguments.sets_required)
    if arguments.executor == "here" and not given_flags(arguments):
        return None
    if arguments.executor == "here":
        arguments.executor = "auto"
    return resolve_allocation(arguments, file)


def evaluation_of(
    arguments: argparse.Namespace,
    allocation: Allocation | None,
    kind: type[_Kind],
    models: Sequence[str],
    **fields: Any,
) -> _Kind:
    """The evaluation that the flags describe, checked against the models and sets on disk.

    Args:
        allocation: Where it runs; None: in this process.
        models: Paths that the user gave.
        fields: Further fields of ``kind``.

    Raises:
        UserError: Flags contradict each other, or models and sets do not match.
    """
    precision = resolve_precision(arguments.precision, allocation)
    check_arithmetic(precision, allocation)
    shards = arguments.shards or ""
    if shards and not is_remote(shards):
        shards = str(Path(shards).resolve())
    if fields.get("holdout") is not None:
        fields["holdout"] = set_folder(shards, fields["holdout"])
    chosen = chosen_models(models, arguments.checkpoint)
    evaluation = kind(
        models=tuple(str(settled(find_model(path))) for path in chosen),
        shards=shards,
        sets=tuple(set_folder(shards, name) for name in arguments.sets),
        batch_size=arguments.batch_size,
        precision=precision,
        loader_workers=arguments.loader_workers,
        allow_count_mismatch=arguments.allow_count_mismatch,
        **fields,
    ).checked()
    check_choices(evaluation, chosen, allowed=arguments.select_on_test_set)
    check_models_and_sets(evaluation)
    return evaluation


def carry_out(
    tool: str, evaluation: Evaluation, allocation: Allocation | None, arguments: argparse.Namespace
) -> tuple[int, RunFolder]:
    """Evaluate on ``allocation``, or in this process if that is None.

    Returns:
        The exit code, which is 0 if the results exist, and the evaluation's folder.
    """
    folder = arguments.out or Path("evaluations") / f"{tool}-{evaluation.digest()}"
    run = RunFolder(folder.absolute())
    check_folder(run, evaluation)
    _drop_results_of_other_models(run)
    planned = PlannedJob(run, evaluation)
    about = About(lambda jobs: evaluation_lines(evaluation), find_cluster_file(arguments.cluster))
    if run.results.exists():
        run.tidy()
        print(f"{run.root} already has the results", file=sys.stderr)
        return 0, run
    if arguments.dry_run:
        if allocation is None:
            print_work([planned])
            print(f"Would run in this process, into {run.root}. Everything checked; nothing was run.")
            return 0, run
        return dry_run([planned], allocation, about), run
    if allocation is None:
        return _in_this_process(evaluation, run), run
    if should_skip(run, sweep=False):
        return 0, run
    about = replace(about, start=check_with_slurm([planned], allocation))
    return start(claim_run_folders([planned]), allocation, about, follow=arguments.follow), run


def _drop_results_of_other_models(run: RunFolder) -> None:
    """Remove results that were computed from model files that have been replaced since."""
    if run.has_work() and is_of_other_models(read_object(run.results) or {}):
        print(f"Models changed since {run.results} was written: they are evaluated again.", file=sys.stderr)
        run.drop_results()


def _in_this_process(evaluation: Evaluation, run: RunFolder) -> int:
    import torch

    from cfmask.evaluation.worker import run_evaluation
    from cfmask.runtime.distributed import DistributedContext
    from cfmask.session import FINISHED, QUIT

    with ending_signals() as received:
        take_folder(run, evaluation).keep()
        run.clear_cancelled()
        cores = len(os.sched_getaffinity(0))
        context = DistributedContext(attempt=f"here-{os.getpid()}", cpus=cores, gpu=torch.cuda.is_available())
        outcome = run_evaluation(evaluation, run, context, lambda: QUIT if received else None)
        if outcome == FINISHED:
            return 0
        if signal.SIGHUP in received:
            silence_output()
        print(
            f"Interrupted by {received[0].name}. The same command resumes after the samples that have been counted.",
            file=sys.stderr,
        )
    return 128 + received[0]
