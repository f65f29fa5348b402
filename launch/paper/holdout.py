"""The held-out set of a reproduction: that it is there, that it was taken out of what is trained on, and which
checkpoint of each run it chooses.

The authors take 10,240 images, stratified by class, out of ImageNet's training set, train on the other 1,270,927, and
evaluate each run's checkpoint that is best on the held-out ones.
"""

from __future__ import annotations

import argparse
import os
import sys
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

IMAGES = 10_240
"""Of the paper's held-out set."""
_WITHOUT = "--without-holdout"
_MAKE = f"`python tools/make_shards.py imagenet --source … --out … --holdout {IMAGES}`"


def add_holdout_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --without-holdout and the flag of cfmask/selection.py."""
    parser.add_argument(
        "--checkpoint",
        choices=CHOICES,
        help="which checkpoint of each run is evaluated, mixed and averaged: that of the epoch's end that is best on "
        "the held-out set, as the authors evaluate; or that of the last step (default: best; last with "
        "--without-holdout, and in plans of versions that had no choice). The authors' WiSE-FT mixes the last one",
    )
    parser.add_argument(
        _WITHOUT,
        action="store_true",
        help="train although no set is held out, on all images of the training set; the last checkpoints are evaluated",
    )
    parser.add_argument(FLAG, action="store_true", help=f"--best-on may {FLAG_HELP}")


def settle_choice(arguments: argparse.Namespace, file: ClusterFile, kept: dict[str, Any] | None) -> str:
    """Which checkpoint counts. Where that is the best, runs are evaluated on the held-out set: ``data.eval_sets`` of
    the arguments gets it.

    Args:
        kept: the plan.json of a plan that was begun before.

    Raises:
        UserError: flags that contradict each other.
    """
    default = LAST if arguments.without_holdout else BEST
    if kept is not None and arguments.checkpoint is None:
        default = kept.get("checkpoint", LAST)
    choice: str = arguments.checkpoint or default
    if choice == BEST and arguments.without_holdout:
        asked = f"--checkpoint {BEST}" if arguments.checkpoint else f"The plan that was begun with --checkpoint {BEST}"
        raise UserError(
            f"{asked} and {_WITHOUT} contradict each other: nothing would choose the best checkpoint. Leave one of "
            "them out, or begin another plan with --out."
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
    """See that a set is held out of the training set, and has chosen nothing that it is to test.

    Args:
        recipe: what all runs of the plan have in common.
        sets: names of those that the plan evaluates on.
        trains: whether the plan has a training run; without one, no set is needed beside ``sets``.
        without: whether --without-holdout was given; the others are the flags of these names.

    Returns:
        A sentence: how many images are trained on, and held out.

    Raises:
        UserError: the held-out set is missing, is a test set, or is not what is missing in the training set.
    """
    if not trains:
        refuse_idle_flag(select_on_test_set, False)
        return "Nothing is trained."
    shards, name = recipe.data.shards, recipe.run.best_on or HOLDOUT
    train = training.load_set(shards, recipe.data.train_split)
    where = find_set(shards, name)
    holdout = manifest_if_there(where)
    if holdout is None and os.path.isdir(where):
        load_manifest(where)  # says what is wrong with it
    if without:
        if holdout is not None:
            raise UserError(
                f"{_WITHOUT} would do nothing: {holdout.root} is there. Leave it out; --checkpoint {LAST} evaluates "
                "last checkpoints all the same."
            )
        refuse_idle_flag(select_on_test_set, False)
        print(
            f"warning: no set is held out of {train.root}: its {train.num_samples:,} images are trained on, and last "
            f"checkpoints are evaluated ({_WITHOUT}).",
            file=sys.stderr,
        )
        return f"Trains on {train.num_samples:,} images; none are held out."
    if holdout is None:
        raise UserError(
            f"There is no held-out set at {where}. The paper trains on {TRAIN.images - IMAGES:,} images of ImageNet "
            f"and chooses each run's checkpoint on {IMAGES:,} that are held out; {train.root} has "
            f"{train.num_samples:,}. Convert the training set with {_MAKE}. {_WITHOUT} trains on what is there, and "
            "evaluates last checkpoints."
        )
    on_test_set = check_selection(f"The set {name}", name, holdout, allowed=select_on_test_set)
    refuse_idle_flag(select_on_test_set, on_test_set)
    same = [each for each in sets if each == name or training.load_set(shards, each).digest == holdout.digest]
    if same and not select_on_test_set:
        raise UserError(
            f"The set {name} is one of the --sets ({same[0]}): a set that chooses checkpoints cannot test them as "
            "well. Leave it out of them."
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
        print(f"warning: {' and '.join(deviations)} (--allow-count-mismatch).", file=sys.stderr)
    return f"Trains on {train.num_samples:,} images; {holdout.num_samples:,} are held out ({name})."


def _deviations(trained: int, held_out: int) -> list[str]:
    """Of ImageNet's numbers of images, in words."""
    found = {"to train on": (trained, TRAIN.images - IMAGES), "held out": (held_out, IMAGES)}
    return [f"{has:,} images {what} instead of {should:,}" for what, (has, should) in found.items() if has != should]
