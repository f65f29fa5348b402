"""Checks of an evaluation's models and sets before a job is queued. Nothing here imports torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from cfmask.checkpoint.best import POINTER
from cfmask.data import benchmarks
from cfmask.data.shards import Manifest, find_set, load_sets, manifest_if_there
from cfmask.errors import UserError
from cfmask.evaluation.model_origin import BEST, is_training_run, origin_of
from cfmask.evaluation.selection import check_selection, refuse_idle_flag
from cfmask.evaluation_spec import Evaluation, UniformSoup, WiseFT
from cfmask.models.head import ModelInfo, check_same_kind, read_info
from cfmask.run_search import find_model
from cfmask.runs import RunFolder
from cfmask.urls import is_remote

logger = logging.getLogger(__name__)

# --- models and sets as the flags name them ---------------------------------------------------------------------------


def chosen_models(paths: Sequence[str], checkpoint: str) -> list[Path]:
    """Models as the flags name them, with --checkpoint applied to the folders of training runs.

    Raises:
        UserError: --checkpoint would do nothing, or a run has no model yet.
    """
    runs = [Path(path) for path in paths if is_training_run(path)]
    if checkpoint == BEST:
        if not runs:
            raise UserError(
                f"--checkpoint {BEST} would do nothing: it applies to folders of training runs, and none of the models "
                "is one. Leave it out, or name a run's folder."
            )
        return [RunFolder(path).checkpoints / POINTER if path in runs else path for path in map(Path, paths)]
    for path in runs:
        if not RunFolder(path).final.exists():
            find_model(path)  # a run without any model is refused before the note
            logger.info(f"note: {path} has not finished; its latest checkpoint is used.")
    return [Path(path) for path in paths]


def set_folder(shards: str, name: str) -> str:
    """The folder under --shards for a name in flags: a folder's name, or the short name of one of the paper's sets."""
    if name in benchmarks.ALIASES and (is_remote(shards) or not (Path(shards) / name).is_dir()):
        return benchmarks.ALIASES[name]
    return name


# --- sets -------------------------------------------------------------------------------------------------------------


def check_set(manifest: Manifest, *, allow_count_mismatch: bool = False) -> None:
    """Refuse an incomplete or altered copy of a known set, whose accuracy would be wrong without any error.

    Raises:
        UserError: counts or classes differ from the published ones.
    """
    deviations = benchmarks.deviations_of(manifest)
    if deviations and not allow_count_mismatch:
        raise UserError(
            f"{manifest.root} is not a complete copy of {manifest.split}: {', '.join(deviations)}. Convert a complete "
            "copy, or accept this one with --allow-count-mismatch."
        )


def check_classes(manifest: Manifest, classes: Sequence[str]) -> None:
    """Refuse a set whose class list differs from the model's.

    Raises:
        UserError: other classes, or another order.
    """
    if tuple(wnid for wnid, _ in manifest.classes) != tuple(classes):
        raise UserError(
            f"The set {manifest.root} ({manifest.num_classes} classes) and the model ({len(classes)} classes) have "
            "different class lists, or another order: labels and predictions would not mean the same. Convert the set "
            "with the class list that the model was trained on."
        )


def load_sets_of(evaluation: Evaluation, *, check_files: bool = True) -> dict[str, Manifest]:
    """The sets that an evaluation reads, by name. Raises UserError if one is missing, incomplete or altered."""
    names = [*evaluation.sets, *([evaluation.chooses_on] if evaluation.chooses_on else [])]
    sets = load_sets(evaluation.shards, names, check_files=check_files)
    for manifest in sets.values():
        check_set(manifest, allow_count_mismatch=evaluation.allow_count_mismatch)
    return sets


# --- models and sets together -----------------------------------------------------------------------------------------


def check_models_and_sets(evaluation: Evaluation) -> None:
    """Check everything about models and sets that can be known before a job is queued.

    Raises:
        UserError: models or sets that do not fit together, or are incomplete or altered.
    """
    infos: list[ModelInfo] = []
    for path in evaluation.models:
        info = read_info(path)
        if info is None or not info.classes:
            raise UserError(
                f"{path} is not a cfmask model file with a head. Training writes one to RUN/model.safetensors; "
                "tools/build_head.py converts checkpoints of other programs."
            )
        if infos and isinstance(evaluation, (WiseFT, UniformSoup)):
            check_same_kind(info, infos[0], path, than=evaluation.models[0])
        elif infos and info.classes != infos[0].classes:
            raise UserError(f"{path} and {evaluation.models[0]} differ in classes. Evaluate them in two commands.")
        infos.append(info)
    if is_remote(evaluation.shards):
        return  # sets behind a URL are read by the job, through the nodes' cache
    sets = load_sets_of(evaluation)
    for manifest in sets.values():
        if infos:
            check_classes(manifest, infos[0].classes)
    holdout = sets.get(evaluation.chooses_on or "")
    for name in evaluation.sets:
        if holdout is not None and sets[name].digest == holdout.digest:
            raise UserError(
                f"--holdout {evaluation.chooses_on} and the set {name} of --sets have the same images: a set that "
                "chooses a model cannot test it as well. Omit one of them."
            )


def check_choices(evaluation: Evaluation, models: Sequence[Path], *, allowed: bool) -> None:
    """Refuse test sets that choose a model (``check_selection``); log which checkpoint each held-out set has chosen.

    Args:
        models: from ``chosen_models``.
        allowed: whether a test set may choose.

    Raises:
        UserError: a test set chooses and ``allowed`` is false; ``allowed`` has no effect; or a soup has a model twice.
    """
    on_test_set = False
    if evaluation.chooses_on is not None:
        where = find_set(evaluation.shards, evaluation.chooses_on)
        what = f"--holdout {evaluation.chooses_on}"
        on_test_set = check_selection(what, evaluation.chooses_on, manifest_if_there(where), allowed=allowed)
    steps: dict[tuple[str, int], str] = {}
    for path, file in zip(models, evaluation.models, strict=True):
        origin = origin_of(file)
        if isinstance(evaluation, UniformSoup) and origin.run is not None and origin.step is not None:
            other = steps.setdefault((origin.run, origin.step), file)
            if other != file:
                raise UserError(
                    f"{other} and {file} are the same model (step {origin.step} of {origin.run}), which would count "
                    "twice in the soup. Omit one of them."
                )
        if path.name != POINTER or origin.run is None or origin.chosen_on is None:
            continue
        accuracy = f"{origin.top1:.2f} % on {origin.chosen_on}"
        so_far = "" if RunFolder(Path(origin.run)).final.exists() else "; the run has not finished"
        logger.info(f"{origin.run}: the best checkpoint is that of step {origin.step} ({accuracy}{so_far}).")
        manifest = manifest_if_there(find_set(RunFolder(Path(origin.run)).recipe().data.shards, origin.chosen_on))
        what = f"The best checkpoint of {origin.run}"
        on_test_set |= check_selection(what, origin.chosen_on, manifest, allowed=allowed)
        for name in evaluation.sets:
            tested = manifest_if_there(find_set(evaluation.shards, name))
            if name == origin.chosen_on or (manifest and tested and manifest.digest == tested.digest):
                what = f"{origin.chosen_on} has chosen the checkpoint of {origin.run}"
                logger.warning(f"{what}: its accuracy on {name} is too high.")
    refuse_idle_flag(allowed, on_test_set)
