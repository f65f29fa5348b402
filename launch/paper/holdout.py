"""The held-out set of a reproduction: checks that it exists and does not overlap the training set, and decides which
checkpoint of each run is evaluated.

The authors hold 10,240 images, stratified by class, out of ImageNet's training set, train on the other 1,270,927, and
evaluate each run's checkpoint that is best on the held-out images.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

from cfmask.data import imagenet
from cfmask.data.benchmarks import TRAIN
from cfmask.data.shards import find_set, load_manifest, manifest_if_there
from cfmask.errors import UserError
from cfmask.evaluation.model_origin import BEST, CHOICES, LAST
from cfmask.evaluation.selection import FLAG, FLAG_HELP, HOLDOUT, check_selection, refuse_idle_flag, trained_on
from cfmask.recipe import Recipe
from launch.allocation.cluster_file import ClusterFile
from launch.submission import training

logger = logging.getLogger(__name__)

IMAGES = 10_240
"""The size of the paper's held-out set."""
_WITHOUT = "--without-holdout"
_MAKE = f"`python tools/make_shards.py imagenet --source … --out … --holdout {IMAGES}`"


def add_holdout_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint, --without-holdout, and the flag of cfmask/evaluation/selection.py."""
    parser.add_argument(
        "--checkpoint",
        choices=CHOICES,
        help="which checkpoint of each run is evaluated, mixed and averaged: best on the held-out set at the end of an "
        "epoch, as the authors evaluate, or last (default: best; last with --without-holdout, and in plans of versions "
        "without this flag). The authors' WiSE-FT mixes the last one",
    )
    parser.add_argument(
        _WITHOUT,
        action="store_true",
        help="train on all images of the training set, without a held-out set, and evaluate the last checkpoints",
    )
    parser.add_argument(FLAG, action="store_true", help=f"--best-on may {FLAG_HELP}")


def settle_choice(arguments: argparse.Namespace, file: ClusterFile, kept: dict[str, Any] | None) -> str:
    """Which checkpoint is evaluated. If it is the best one, the held-out set is added to ``data.eval_sets`` of the
    arguments.

    Args:
        kept: the content of an existing plan.json.

    Raises:
        UserError: flags contradict each other.
    """
    default = LAST if arguments.without_holdout else BEST
    if kept is not None and arguments.checkpoint is None:
        default = kept.get("checkpoint", LAST)
    choice: str = arguments.checkpoint or default
    if choice == BEST and arguments.without_holdout:
        asked = f"--checkpoint {BEST}" if arguments.checkpoint else f"The plan's --checkpoint {BEST}"
        raise UserError(
            f"{asked} and {_WITHOUT} contradict each other: no set would choose the best checkpoint. Remove one of "
            "them, or start another plan with --out."
        )
    if choice == BEST and not hasattr(arguments, "run.best_on"):
        given = getattr(arguments, "data.eval_sets", file.values.get("eval_sets", ()))
        if HOLDOUT not in given:
            setattr(arguments, "data.eval_sets", [*given, HOLDOUT])
    return choice


def check_holdout(
    recipe: Recipe,
    sets: Sequence[str],
    *,
    trains: bool,
    without: bool,
    allow_count_mismatch: bool,
    select_on_test_set: bool,
) -> str:
    """Check that a set is held out of the training set, and that no test set chooses checkpoints.

    Args:
        recipe: the settings that all runs of the plan share.
        sets: names of the sets that the plan evaluates on.
        trains: whether the plan has a training run; otherwise only ``sets`` are needed.
        without: --without-holdout; the other arguments are the flags of their names.

    Returns:
        A sentence that says how many images are trained on and held out.

    Raises:
        UserError: the held-out set is missing, is a test set, or overlaps the training set.
    """
    if not trains:
        refuse_idle_flag(select_on_test_set, False)
        return "Nothing is trained."
    shards, name = recipe.data.shards, recipe.run.best_on or HOLDOUT
    train = training.load_set(shards, recipe.data.train_split)
    where = find_set(shards, name)
    holdout = manifest_if_there(where)
    if holdout is None and os.path.isdir(where):
        load_manifest(where)  # raises the reason
    if without:
        if holdout is not None:
            raise UserError(
                f"{_WITHOUT} would do nothing: {holdout.root} exists. Remove the flag; --checkpoint {LAST} evaluates "
                "last checkpoints without it."
            )
        refuse_idle_flag(select_on_test_set, False)
        logger.warning(
            f"No set is held out of {train.root}: its {train.num_samples:,} images are trained on, and last "
            f"checkpoints are evaluated ({_WITHOUT})."
        )
        return f"Trains on {train.num_samples:,} images; none are held out."
    if holdout is None:
        raise UserError(
            f"There is no held-out set at {where}. The paper trains on {TRAIN.images - IMAGES:,} images of ImageNet "
            f"and chooses each run's checkpoint on {IMAGES:,} held-out images; {train.root} has "
            f"{train.num_samples:,}. Convert the training set with {_MAKE}. Or give {_WITHOUT}, to train on all images "
            "and evaluate last checkpoints."
        )
    on_test_set = check_selection(f"The set {name}", name, holdout, allowed=select_on_test_set)
    refuse_idle_flag(select_on_test_set, on_test_set)
    same = [each for each in sets if each == name or training.load_set(shards, each).digest == holdout.digest]
    if same and not select_on_test_set:
        raise UserError(
            f"The set {name} is one of the --sets ({same[0]}): the set that chooses checkpoints cannot test them. "
            "Remove it from --sets."
        )
    if holdout.digest == train.digest:
        raise UserError(
            f"{holdout.root} and {train.root} have the same images: none is held out. Convert the training set with "
            f"{_MAKE}."
        )
    training.check_same_classes(holdout, train)
    if shared := trained_on(holdout, train):
        raise UserError(f"{shared} Convert the training set with {_MAKE}, which makes both without overlap.")
    deviations = _deviations(train.num_samples, holdout.num_samples)
    if tuple(wnid for wnid, _ in train.classes) == imagenet.wnids() and deviations:
        if not allow_count_mismatch:
            raise UserError(
                f"{train.root} and {holdout.root} are not the paper's: {' and '.join(deviations)}. Convert the "
                f"training set with {_MAKE} into an empty folder, or take these with --allow-count-mismatch."
            )
        logger.warning(f"{' and '.join(deviations)} (--allow-count-mismatch).")
    return f"Trains on {train.num_samples:,} images; {holdout.num_samples:,} are held out ({name})."


def _deviations(trained: int, held_out: int) -> list[str]:
    """Phrases for the numbers of images that are not the paper's."""
    found = {"to train on": (trained, TRAIN.images - IMAGES), "held out": (held_out, IMAGES)}
    return [f"{has:,} images {what} instead of {should:,}" for what, (has, should) in found.items() if has != should]
