"""What can be checked of an evaluation's models and sets before a job is queued. Nothing here imports torch."""

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
from cfmask.runs import RunFolder
from cfmask.urls import is_remote

logger = logging.getLogger(__name__)

# --- models and sets as the flags name them ---------------------------------------------------------------------------


def chosen_models(paths: Sequence[str], checkpoint: str) -> list[Path]:
    """Models as the flags name them, with --checkpoint applied to the folders of training runs. Raises UserError if it
    would do nothing."""
    runs = [Path(path) for path in paths if is_training_run(path)]
    if checkpoint == BEST:
        if not runs:
            raise UserError(
                f"--checkpoint {BEST} would do nothing: none of the models is the folder of a training run, and other "
                "paths are taken as they are. Leave it out, or name the run's folder."
            )
        return [RunFolder(path).checkpoints / POINTER if path in runs else path for path in map(Path, paths)]
    for path in runs:
        if not RunFolder(path).final.exists():
            logger.info(f"note: {path} has not finished: its latest checkpoint stands for it.")
    return [Path(path) for path in paths]


def set_folder(shards: str, name: str) -> str:
    """The folder under --shards that a name stands for: the folder's name, or a short name of a set of the paper."""
    if name in benchmarks.ALIASES and (is_remote(shards) or not (Path(shards) / name).is_dir()):
        return benchmarks.ALIASES[name]
    return name


# --- sets -------------------------------------------------------------------------------------------------------------


def check_set(manifest: Manifest, *, allow_count_mismatch: bool = False) -> None:
    """Refuse a copy of a known set that is not what it should be: it gives a wrong number without any error.

    Raises:
        UserError: other counts, or other classes, than the set of this name has.
    """
    deviations = benchmarks.deviations_of(manifest)
    if deviations and not allow_count_mismatch:
        raise UserError(
            f"{manifest.root} is no whole copy of {manifest.split}: {', '.join(deviations)}. Convert a whole copy, or "
            "take this one with --allow-count-mismatch."
        )


def check_classes(manifest: Manifest, classes: Sequence[str]) -> None:
    """Refuse a set with another class list than a model's, in its order.

    Raises:
        UserError: labels and answers would not mean the same.
    """
    if tuple(wnid for wnid, _ in manifest.classes) != tuple(classes):
        raise UserError(
            f"The set {manifest.root} has {manifest.num_classes} classes, the model {len(classes)}, or they are in "
            "another order: labels and answers would not mean the same. Convert the set with the class list that the "
            "model was trained on."
        )


def load_sets_of(evaluation: Evaluation, *, check_files: bool = True) -> dict[str, Manifest]:
    """The sets that an evaluation reads, by name. Raises UserError if a set is not what it should be."""
    names = [*evaluation.sets, *([evaluation.chooses_on] if evaluation.chooses_on else [])]
    sets = load_sets(evaluation.shards, names, check_files=check_files)
    for manifest in sets.values():
        check_set(manifest, allow_count_mismatch=evaluation.allow_count_mismatch)
    return sets


# --- models and sets together -----------------------------------------------------------------------------------------


def check_models_and_sets(evaluation: Evaluation) -> None:
    """Check everything about models and sets that is known before a job is queued.

    Raises:
        UserError: models or sets that do not belong together, or are not what they should be.
    """
    infos: list[ModelInfo] = []
    for path in evaluation.models:
        info = read_info(path)
        if info is None or not info.classes:
            raise UserError(
                f"{path} is not a cfmask model file with a head. cfmask writes one to RUN/model.safetensors; "
                "tools/build_head.py makes one of other programs' checkpoints."
            )
        if infos and isinstance(evaluation, (WiseFT, UniformSoup)):
            check_same_kind(info, infos[0], path, than=evaluation.models[0])
        elif infos and info.classes != infos[0].classes:
            raise UserError(
                f"{path} and {evaluation.models[0]} differ in classes: they cannot be evaluated side by side."
            )
        infos.append(info)
    if is_remote(evaluation.shards):
        return  # read when they are needed, through the nodes' cache
    sets = load_sets_of(evaluation)
    for manifest in sets.values():
        if infos:
            check_classes(manifest, infos[0].classes)
    holdout = sets.get(evaluation.chooses_on or "")
    for name in evaluation.sets:
        if holdout is not None and sets[name].digest == holdout.digest:
            raise UserError(
                f"--holdout {evaluation.chooses_on} and the set {name} of --sets have the same images: a set that "
                "chooses a model cannot test it as well. Leave one of them out."
            )


def check_choices(evaluation: Evaluation, models: Sequence[Path], *, allowed: bool) -> None:
    """Refuse test sets that choose a model (``check_selection``); print which checkpoint each held-out set has chosen.

    Args:
        models: as ``chosen_models`` gives them.
        allowed: whether a test set may choose.

    Raises:
        UserError: a test set chooses and ``allowed`` is false, or the other way round; a soup with one model twice.
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
                    f"{other} and {file} are one model, that of step {origin.step} of {origin.run}, which would count "
                    "twice in the soup. Leave one of them out."
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
                logger.warning(f"{what}, which is overrated on {name}.")
    refuse_idle_flag(allowed, on_test_set)
