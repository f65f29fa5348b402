"""Training runs before they are queued: the runs that flags describe, their resolved recipes, and all checks that need
no GPU."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from cfmask.data.plan import lanes_of_rank, steps_per_epoch
from cfmask.data.shards import Manifest, find_set, load_manifest
from cfmask.errors import UserError, did_you_mean_path
from cfmask.evaluation.selection import FLAG, FLAG_HELP, check_selection, refuse_idle_flag, trained_on
from cfmask.evaluation_spec import Evaluation
from cfmask.models.head import ModelInfo, check_head, check_same_kind, read_info
from cfmask.models.initial import check_initial_model, described
from cfmask.models.weights import is_path
from cfmask.presets import PRESETS, nearest_preset
from cfmask.recipe import Recipe
from cfmask.run_search import find_model
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from cfmask.urls import is_remote
from launch.allocation.cluster_file import ClusterFile, load_cluster_file
from launch.allocation.resolve import (
    Allocation,
    check_arithmetic,
    choose_executor,
    resolve_allocation,
    resolve_precision,
    warn_of_paths_outside,
)
from launch.allocation.settings import add_allocation_arguments, argument_type, count
from launch.notification.notify import kept_setting
from launch.submission.claims import check_folder
from launch.submission.planning import PlannedJob, behind_its_jobs, claim_run_folders, should_skip
from launch.submission.recipe_arguments import add_recipe_arguments, given_recipe_flags, preset_name, recipe_from
from launch.submission.submit import check_with_slurm, dry_run, last_submission, print_work, start
from launch.submission.summary import About, evaluation_lines, recipe_lines

logger = logging.getLogger(__name__)


def add_submit_arguments(p: argparse.ArgumentParser) -> None:
    """All flags of launch/submit.py."""
    p.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/<preset>-<model>-s<seed>-<hash>)")
    p.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="resume this run. Its folder has the recipe and the last allocation; flags override the allocation",
    )
    p.add_argument(
        "--from-step-0",
        action="store_true",
        help="with --resume, for a run whose checkpoints were lost: allow it to start again at step 0 and to discard "
        "its logs. If a valid checkpoint is found, it is used. Without this flag such a start ends with an error",
    )
    p.add_argument("--seeds", nargs="+", type=int, metavar="N", help="sweep: a run for each of these seeds")
    p.add_argument(
        "--presets",
        nargs="+",
        type=preset_name,
        choices=sorted(PRESETS),
        metavar="ROW",
        help="sweep: a run for each of these rows",
    )
    p.add_argument(
        "--chain",
        type=argument_type(count),
        metavar="N",
        help="queue N jobs for each run, for sites where a job may not requeue itself. Each starts when the one before "
        "has ended, successfully or not, resumes the run, and ends at once if the run is finished. With --resume, they "
        "are queued behind the run's existing jobs",
    )
    p.add_argument(FLAG, action="store_true", help=f"--best-on may {FLAG_HELP}")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and the sbatch file, and check everything; nothing is queued",
    )
    p.add_argument("--verbose", action="store_true", help="also print the resolved recipe, which the run folder has")
    p.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        help="show progress until the job ends (default: yes on this machine, no on Slurm)",
    )
    add_allocation_arguments(p)
    add_recipe_arguments(p)


def submit(arguments: argparse.Namespace, *, pace_s: float = 0.0) -> int:
    """Plan, check and submit the runs that the flags of ``add_submit_arguments`` describe.

    Args:
        pace_s: Seconds that the runs wait at each step (``Job``), for fault injection by launch/drill.py and by tests.

    Returns:
        The exit code of submit.py.

    Raises:
        UserError: A setting is refused; nothing has been queued.
    """
    if arguments.from_step_0 and not arguments.resume:
        raise UserError("--from-step-0 would do nothing: it is for a run that is resumed (--resume RUN).")
    if arguments.resume and (run := RunFolder(arguments.resume.resolve())).results.exists():
        return 0 if should_skip(run, sweep=False) else 1
    file = load_cluster_file(arguments.cluster)
    if arguments.resume:
        allocation, planned = plan_resume(arguments, file)
    else:
        allocation = resolve_allocation(arguments, file)
        planned = plan_runs(arguments, file, allocation)
    sweep, chain = len(planned) > 1, arguments.chain or 0
    unfinished = _unfinished(planned, sweep=sweep)
    if not unfinished:
        return 0
    _check_all(planned, unfinished, arguments, allocation)
    if chain and arguments.resume:
        unfinished = [behind_its_jobs(each) for each in unfinished]
    wanted = [each for each in unfinished if each.behind or not should_skip(each.run, sweep=sweep)]
    if not wanted:
        return 0
    if arguments.resume:
        _report_other_ranks(wanted[0], allocation)
    about = About(lambda jobs: _describe(jobs, allocation), file.path)
    if arguments.dry_run:
        return dry_run(wanted, allocation, about, chain=chain)
    if arguments.from_step_0 and wanted[0].behind:
        raise UserError(
            f"--from-step-0 is for a run without a job, and job {wanted[0].behind[0]} exists: it would be allowed to "
            "begin again, too. End it first, with launch/cancel.py."
        )
    about = replace(about, start=check_with_slurm(wanted, allocation, chain=chain))
    if arguments.verbose:
        print_work(wanted)
    wanted = claim_run_folders(wanted)
    for each in wanted:
        if not each.behind:
            each.run.allow_step_0(arguments.from_step_0)  # also withdraws the permission of an earlier submission
    return start(wanted, allocation, about, follow=arguments.follow, chain=chain, pace_s=pace_s)


def _unfinished(planned: Sequence[PlannedJob], *, sweep: bool) -> list[PlannedJob]:
    """The runs without results. The others are reported before anything is checked: their shards may be gone."""
    for each in planned:
        if each.run.has_work():
            each.run.check_free_for(each.work)  # refuses a folder of another run
    return [each for each in planned if not each.run.results.exists() or not should_skip(each.run, sweep=sweep)]


def _describe(planned: Sequence[PlannedJob], allocation: Allocation) -> list[str]:
    recipes = [each.work for each in planned if isinstance(each.work, Recipe)]
    if not recipes:
        return [text for each in planned if isinstance(each.work, Evaluation) for text in evaluation_lines(each.work)]
    data = recipes[0].data
    return recipe_lines(recipes, load_set(data.shards, data.train_split).num_samples, allocation)


def _check_all(
    planned: Sequence[PlannedJob],
    unfinished: Sequence[PlannedJob],
    arguments: argparse.Namespace,
    allocation: Allocation,
) -> None:
    """Check the unfinished ones of planned runs, and flags that apply to some kinds of submission only."""
    choices: dict[tuple[object, ...], bool] = {}
    for each in unfinished:
        check_folder(each.run, each.work)
        if isinstance(each.work, Recipe):
            check(each.work, each.run, allocation)
            # A run that was started with this choice keeps it.
            allowed = arguments.select_on_test_set or each.run.has_work()
            choice = (each.work.data.shards, each.work.data.train_split, each.work.run.best_on, allowed)
            if choice not in choices:  # warn once for a sweep
                choices[choice] = check_best_on(each.work, allowed=allowed)
    refuse_idle_flag(arguments.select_on_test_set, any(choices.values()))
    run, work = unfinished[0].run, unfinished[0].work
    warn_of_paths_outside(allocation, run.root, work.data.shards if isinstance(work, Recipe) else work.shards)
    sweep = len(planned) > 1
    if sweep and arguments.follow is not None:
        raise UserError(
            "--follow and --no-follow are for a single run, and this is a sweep: on this machine its runs are "
            "processed one after the other; on Slurm, python launch/status.py shows them all."
        )
    if not sweep and arguments.array_parallelism:
        raise UserError(
            "--array-parallelism would do nothing: this is a single run. --seeds and --presets make a sweep."
        )
    if arguments.chain:
        check_chain(arguments, allocation)


def check_chain(arguments: argparse.Namespace, allocation: Allocation) -> None:
    """
    Raises:
        UserError: --chain would do nothing, or contradicts another flag.
    """
    if not allocation.on_slurm:
        raise UserError(
            f"--chain would do nothing: its jobs wait for each other in Slurm's queue, but --executor is "
            f"{allocation.executor}. Leave it out."
        )
    if arguments.retries is not None:
        raise UserError(
            "--retries would do nothing with --chain: the next job of the chain starts after any end of a job. "
            "--restarts-without-progress limits the number of starts without progress."
        )
    if arguments.array_parallelism:
        raise UserError(
            "--array-parallelism would do nothing with --chain: each run of the sweep has a chain of its own, because "
            "an array waits for whole arrays, or for the success of their members."
        )


# --- which runs ---------------------------------------------------------------------------------------------------


def plan_runs(arguments: argparse.Namespace, file: ClusterFile, allocation: Allocation) -> list[PlannedJob]:
    """The runs that the flags describe: one, or one for each of --presets and --seeds.

    Raises:
        UserError: Flags contradict each other.
    """
    for one, many in (("seed", "seeds"), ("preset", "presets")):
        given = getattr(arguments, many)
        if given and (hasattr(arguments, f"run.{one}") or (one == "preset" and arguments.preset)):
            raise UserError(f"--{one} and --{many} contradict each other: give one of them.")
        if given and len(set(given)) != len(given):
            raise UserError(f"--{many} names one of them twice: {' '.join(map(str, given))}.")
    recipes = [
        resolve_recipe(recipe_of(arguments, file, preset, seed), allocation)
        for preset in arguments.presets or [arguments.preset]
        for seed in arguments.seeds or [None]
    ]
    if len(recipes) > 1 and arguments.run:
        raise UserError(f"--run names one folder, and this is a sweep of {len(recipes)} runs. Leave it out.")
    return [PlannedJob(RunFolder((arguments.run or default_folder(recipe)).resolve()), recipe) for recipe in recipes]


def recipe_of(arguments: argparse.Namespace, file: ClusterFile, preset: str | None, seed: int | None = None) -> Recipe:
    """The unresolved recipe of flags, a row, a seed, and the cluster file; flags override the others."""
    member = argparse.Namespace(**vars(arguments))
    member.preset = preset
    if seed is not None:
        setattr(member, "run.seed", seed)
    for key, value in (("shards", file.shards), ("eval_sets", file.eval_sets)):
        if value and not hasattr(member, f"data.{key}"):
            setattr(member, f"data.{key}", value)
    return recipe_from(member)


def plan_resume(arguments: argparse.Namespace, file: ClusterFile) -> tuple[Allocation, list[PlannedJob]]:
    """The run (or evaluation) to resume, with the allocation of its last submission unless flags override it.

    Raises:
        UserError: The folder is not a run folder, or a flag would do nothing.
    """
    flags = [f"--{name}" for name in ("run", "seeds", "presets") if getattr(arguments, name)]
    flags += given_recipe_flags(arguments)
    if flags:
        raise UserError(
            f"--resume continues the recipe in {arguments.resume}; these flags would do nothing: "
            f"{', '.join(flags)}. Leave them out, or start another run without --resume."
        )
    run = RunFolder(arguments.resume.resolve())
    work = run.work()
    if arguments.from_step_0 and not isinstance(work, Recipe):
        raise UserError(f"--from-step-0 would do nothing: {run.root} is an evaluation, which has no checkpoints.")
    last = last_submission(run)
    same = last is not None and last["executor"] == choose_executor(arguments)
    before = {**last["allocation"], **kept_setting(run)} if last is not None and same else None
    allocation = resolve_allocation(arguments, file, before)
    return allocation, [PlannedJob(run, work)]


def _report_other_ranks(planned: PlannedJob, allocation: Allocation) -> None:
    """Say that a resumed run gets another number of ranks than before."""
    attempts = read_lines(planned.run.attempts)
    had = next((line["world_size"] for line in reversed(attempts) if line.get("world_size")), None)
    if isinstance(planned.work, Recipe) and had not in (None, allocation.world_size):
        print(
            f"Ranks: {allocation.world_size}, where there were {had}. Batches and masks stay the same; weights are "
            "equal up to rounding.",
            file=sys.stderr,
        )


# --- resolving and checking -------------------------------------------------------------------------------------


def resolve_recipe(recipe: Recipe, allocation: Allocation) -> Recipe:
    """The recipe with absolute paths, the paper's values, and the precision filled in."""
    if not recipe.data.shards:
        raise UserError(
            "--shards is missing: the folder that tools/make_shards.py wrote, with one folder for each split. A "
            "cluster file (slurm/cluster.toml) can set it for all runs."
        )
    shards = recipe.data.shards if is_remote(recipe.data.shards) else str(Path(recipe.data.shards).resolve())
    precision = resolve_precision(recipe.run.precision, allocation)
    model = replace(
        recipe.model,
        name=_absolute(recipe.model.name) if recipe.model.name.endswith(".json") else recipe.model.name,
        pretrained=_absolute(recipe.model.pretrained) if is_path(recipe.model.pretrained) else recipe.model.pretrained,
        head=_absolute(recipe.model.head) if recipe.model.head else None,
    )
    segmentation = None if recipe.data.segmentation is None else _absolute(recipe.data.segmentation)
    method = recipe.method
    if method.ensemble is not None:
        method = replace(method, ensemble=_absolute(method.ensemble))
    return replace(
        recipe,
        model=model,
        method=method,
        data=replace(recipe.data, shards=shards, segmentation=segmentation),
        run=replace(recipe.run, precision=precision),
    ).resolved()


def _absolute(path: str) -> str:
    """The path for a job, which starts in another directory. Links are not followed, because the configuration of
    weights may be beside a link to them. ".." is kept: after a link to a folder it means the folder above the target. A
    missing file keeps its path, because a run that has started does not need the file any more."""
    return str(Path(path).absolute())


RUNS = Path("runs")
"""Folder of the runs whose folder is not given."""


def default_folder(recipe: Recipe) -> Path:
    """The folder in RUNS that this recipe's run has, under whatever name, else one that is named after the preset."""
    digest = recipe.digest()
    if found := [path for path in sorted(RUNS.glob(f"*-{digest}")) if RunFolder(path).has_work()]:
        return found[0]
    name = nearest_preset(recipe) or recipe.method.row
    return RUNS / f"{name}-{Path(recipe.model.name).stem}-s{recipe.run.seed}-{digest}"


def check(
    recipe: Recipe, run: RunFolder, allocation: Allocation, coming: Mapping[str, ModelInfo] = MappingProxyType({})
) -> None:
    """Check everything that can be known before a job is queued.

    Args:
        coming: Model files that do not exist yet, because another job makes them before this one starts.

    Raises:
        UserError: Shards, weights, head, lanes, ranks or sizes do not match.
    """
    shards = recipe.data.shards
    train = load_set(shards, recipe.data.train_split)
    steps_per_epoch(train.num_samples, recipe.optim.batch_size)
    check_ranks(recipe, allocation)
    if recipe.data.segmentation is not None and not os.path.exists(recipe.data.segmentation):
        raise UserError(
            f"--segmentation {recipe.data.segmentation}: no such file or directory."
            f"{did_you_mean_path(recipe.data.segmentation)} Give what tools/validate_masks.py takes: a folder of PNGs, "
            "COCO annotations, or masks that tools/segment.py made."
        )
    for name in recipe.data.eval_sets:
        check_same_classes(load_set(shards, name), train)
    if run.initial.exists():
        return  # the run has its weights and head
    classes = tuple(wnid for wnid, _ in train.classes)
    start = _check_start(recipe, train, coming)
    depth = start.config["vision_cfg"].get("layers", 12)
    if recipe.method.first_block is not None and recipe.method.first_block >= depth:
        raise UserError(
            f"--first-block is {recipe.method.first_block}; {recipe.model.name} has {depth} blocks, counted from 0."
        )
    ensemble = recipe.method.ensemble
    if ensemble is not None and (os.path.exists(ensemble) or ensemble not in coming):
        path = find_model(ensemble)
        check_same_kind(read_info(path), replace(start, classes=classes), str(path))


def check_ranks(recipe: Recipe, allocation: Allocation) -> None:
    """Raises UserError if the ranks have not the arithmetic of a recipe, or cannot share its lanes or micro-batches."""
    check_arithmetic(recipe.run.precision, allocation, cuda_graphs=recipe.run.cuda_graphs)
    own_lanes = len(lanes_of_rank(0, allocation.world_size, recipe.optim.lanes))
    optim = recipe.optim
    if not optim.is_open_for(allocation.world_size) and own_lanes % optim.num_micro_batches:
        raise UserError(
            f"--micro-batches {optim.num_micro_batches} does not divide the {own_lanes} lanes that each of "
            f"{allocation.world_size} ranks has: a micro-batch is made of whole lanes."
        )


def _check_start(recipe: Recipe, train: Manifest, coming: Mapping[str, ModelInfo]) -> ModelInfo:
    """The model that the run starts from. Checked here and not in the job, because compute nodes often have no network.

    Raises:
        UserError: Weights or head are not available, or do not match the model or the classes.
    """
    model = recipe.model
    if os.path.isfile(model.pretrained) or model.pretrained not in coming:
        return check_initial_model(
            model.name, model.pretrained, model.head, train.classes, mean=model.mean, std=model.std
        ).info
    own = coming[model.pretrained]
    classes = tuple(wnid for wnid, _ in train.classes)
    if model.head:
        check_head(model.head, classes)
    elif own.classes != classes:
        raise UserError(
            f"{model.pretrained} will have a head for the {len(own.classes)} classes of the first evaluation set; "
            f"{train.root} has {len(classes)}, or another order of them. Convert both with one class list."
        )
    return described(own, model.name, model.pretrained, mean=model.mean, std=model.std)


def check_best_on(recipe: Recipe, *, allowed: bool) -> bool:
    """``check_selection`` for the set that selects a run's best checkpoint. Warns if the run trains on images of this
    set."""
    name = recipe.run.best_on
    if name is None:
        return False
    chooses, train = (load_set(recipe.data.shards, each) for each in (name, recipe.data.train_split))
    on_test_set = check_selection(f"--best-on {name}", name, chooses, allowed=allowed)
    if shared := trained_on(chooses, train):
        logger.warning(f"--best-on {name}: {shared}")
    return on_test_set


@functools.cache
def load_set(shards: str, name: str) -> Manifest:
    return load_manifest(find_set(shards, name))


def check_same_classes(evaluated: Manifest, train: Manifest) -> None:
    ours, theirs = ([wnid for wnid, _ in m.classes] for m in (train, evaluated))
    if ours != theirs:
        raise UserError(
            f"The class list of the set {evaluated.root} ({len(theirs)} classes) differs from that of {train.root} "
            f"({len(ours)} classes), so their labels mean different classes. Convert both with one class list."
        )
