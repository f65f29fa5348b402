"""The preprocessing of weights: mean and standard deviation, and the resize, which here is always that of
``data.images.crop`` (short side, bicubic, centre crop).

A wrong mean changes all results without an error, so it is never assumed. Sources:

    file            a cfmask model file, an archive or state dict of OpenAI's, a checkpoint that tools/export.py wrote
    tag             open_clip's configuration of a pretrained tag
    folder          ``preprocess_cfg`` of an open_clip_config.json beside the weights
    --model         ``preprocess_cfg`` of a configuration file
    --mean, --std   the user

All sources that state it must agree. If none does, the values on which open_clip's tags of that model agree are used;
otherwise it is an error. The same holds for the resize, which many open_clip_config.json do not state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cfmask.errors import UserError
from cfmask.models.open_clip_tables import tags_of_model

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""open_clip.OPENAI_DATASET_MEAN and _STD; open_clip takes seconds to import."""

RESIZE_MODE, INTERPOLATIONS = "shortest", ("bicubic", "random")
"""open_clip's names of the resize of ``data.images.crop``; its "random" is bicubic except in training."""
_SAME, _LEAST_STD = 1e-6, 1e-3


@dataclass(frozen=True)
class Preprocessing:
    """Mean and standard deviation of a tower's input."""

    mean: tuple[float, ...]
    """Per channel (R, G, B), for pixels in 0…1, like ``std``."""
    std: tuple[float, ...]

    def __str__(self) -> str:
        return f"mean {_shown(self.mean)} and standard deviation {_shown(self.std)}"

    def agrees(self, other: Preprocessing) -> bool:
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std), strict=True)
        return all(abs(ours - theirs) <= _SAME for ours, theirs in pairs)


OPENAI = Preprocessing(OPENAI_MEAN, OPENAI_STD)


class Statement(NamedTuple):
    """The preprocessing that a source states."""

    source: str
    """A description with which errors begin."""
    preprocessing: Preprocessing
    resize: bool = False
    """Whether it also states how images are resized."""


def flags_statement(mean: Sequence[float] | None, std: Sequence[float] | None) -> list[Statement]:
    """The statement of --mean and --std; empty if they were not given.

    Raises:
        UserError: one without the other, or values that are impossible for pixels in 0…1.
    """
    if mean is None and std is None:
        return []
    if mean is None or std is None:
        raise UserError("--mean and --std belong together: give both, R G B each, for pixels in 0…1.")
    return [Statement("--mean and --std", checked_values("--mean and --std", mean, std))]


def config_statement(source: str, preprocess: Any, image_size: int | None) -> list[Statement]:
    """The statement of a ``preprocess_cfg``, or of open_clip's configuration of a tag; empty if it has no mean.

    Args:
        image_size: side of the model's images; None if the weights may have been trained on another.

    Raises:
        UserError: it states another resize than ``data.images.crop``, or is invalid.
    """
    if not preprocess:
        return []
    if not isinstance(preprocess, Mapping):
        raise UserError(f"{source}: preprocess_cfg is {preprocess!r}, not an object with mean and std.")
    check_resize(source, preprocess)
    size = preprocess.get("size")
    if None not in (size, image_size) and size not in (image_size, [image_size] * 2, (image_size, image_size)):
        raise UserError(
            f"{source}: preprocess_cfg has the size {size}, and the model takes images of {image_size} × {image_size} "
            "pixels (vision_cfg.image_size). Correct the one that is wrong."
        )
    mean, std = preprocess.get("mean"), preprocess.get("std")
    if mean is None and std is None:
        return []
    if mean is None or std is None:
        raise UserError(f"{source}: preprocess_cfg has {'std' if mean is None else 'mean'} alone. Add the other.")
    return [Statement(source, checked_values(source, mean, std), resize=bool(preprocess.get("resize_mode")))]


def check_resize(source: str, preprocess: Mapping[str, Any]) -> None:
    """Raises UserError if weights were trained on images with another resize, crop or order of channels: results would
    differ from published ones without an error."""
    resize_mode = preprocess.get("resize_mode") or RESIZE_MODE
    interpolation = preprocess.get("interpolation") or INTERPOLATIONS[0]
    mode = preprocess.get("mode") or "RGB"
    crop_share, crop_mode = preprocess.get("crop_pct") or 1, preprocess.get("crop_mode") or "center"
    wrong = [
        words
        for words, is_wrong in (
            (f"resize_mode is {resize_mode!r}, not {RESIZE_MODE!r}", resize_mode != RESIZE_MODE),
            (f"interpolation is {interpolation!r}, not {INTERPOLATIONS[0]!r}", interpolation not in INTERPOLATIONS),
            (f"mode is {mode!r}, not 'RGB'", mode != "RGB"),
            # timm's
            (f"crop_pct is {crop_share!r}, not 1", crop_share != 1),
            (f"crop_mode is {crop_mode!r}, not 'center'", crop_mode != "center"),
        )
        if is_wrong
    ]
    if wrong:
        raise UserError(
            f"{source}: the weights were trained with another preprocessing ({'; '.join(wrong)}). cfmask resizes the "
            "short side bicubically and crops the centre, as the paper does, so zero-shot accuracies and distilled "
            "features would differ from those of these weights. Choose other weights. To fine-tune these nevertheless, "
            "give the path of their file, in a folder without an open_clip_config.json, with --model "
            f'FILE.json, a model configuration whose "preprocess_cfg" has "resize_mode": "{RESIZE_MODE}", '
            f'"interpolation": "{INTERPOLATIONS[0]}" and their mean and std.'
        )


def checked_values(source: str, mean: Any, std: Any) -> Preprocessing:
    """Mean and standard deviation of a source. Raises UserError if they are impossible for pixels in 0…1."""
    found = []
    for name, value, least in (("mean", mean, 0.0), ("std", std, _LEAST_STD)):
        # In open_clip a single number stands for all three channels.
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
        if len(values) != 3 or not all(type(x) in (int, float) and least <= x <= 1 for x in values):
            raise UserError(
                f"{source}: {name} is {value!r}; it must be three numbers (R, G, B) in {least:g}…1, for pixels in 0…1."
            )
        found.append(tuple(float(x) for x in values))
    return Preprocessing(*found)


def resolve(statements: Sequence[Statement], what: str) -> Preprocessing | None:
    """The preprocessing that all statements agree on; None without statements.

    Args:
        what: what it is the preprocessing of, for errors.

    Raises:
        UserError: statements contradict each other.
    """
    for other in statements[1:]:
        if not statements[0].preprocessing.agrees(other.preprocessing):
            raise UserError(
                f"Two sources contradict each other about the preprocessing of {what}. {statements[0].source}: "
                f"{statements[0].preprocessing}. {other.source}: {other.preprocessing}. Correct or leave out the one "
                "that is wrong."
            )
    return statements[0].preprocessing if statements else None


def of_tags(name: str, what: str, *, quick_gelu: bool, given: bool, image_size: int | None) -> Preprocessing | None:
    """The preprocessing on which open_clip's pretrained tags of a model agree.

    Args:
        name: open_clip's name of the model; a configuration file has no tags.
        what: the weights, for errors.
        quick_gelu: of the model. Tags of the other activation are used only if there are no others.
        given: mean and standard deviation are known, and only the resize is checked.

    Raises:
        UserError: the tags do not agree, or agree on another resize than ``data.images.crop``.
    """
    found: dict[tuple[Any, ...], list[str]] = {}
    tags = tags_of_model(name)
    alike = {tag: preprocess for tag, preprocess in tags.items() if bool(preprocess.get("quick_gelu")) == quick_gelu}
    for tag, preprocess in (alike or tags).items():
        resize = tuple(preprocess.get(key) for key in ("resize_mode", "interpolation"))
        normalisation = (
            () if given else (tuple(preprocess.get("mean", OPENAI_MEAN)), tuple(preprocess.get("std", OPENAI_STD)))
        )
        found.setdefault((*resize, *normalisation), []).append(tag)
    if len(found) == 1:
        [names] = found.values()
        source = f"open_clip's pretrained {name} ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})"
        [statement] = config_statement(source, tags[names[0]], image_size)
        return statement.preprocessing
    if given and not found:
        return None
    kinds = "; ".join(f"{names[0]}: {_said(kind)}" for kind, names in found.items())
    raise UserError(
        f"The preprocessing of {what} is unknown: no open_clip_config.json beside them states it, and "
        + (f"open_clip's pretrained {name} differ ({kinds}). " if found else f"open_clip has no pretrained {name}. ")
        + "With another mean, standard deviation or resize, all results would be wrong without an error. "
        + (
            f'If the short side was resized, as cfmask does, write "resize_mode": "{RESIZE_MODE}" into the '
            "preprocess_cfg of an open_clip_config.json beside them, or of --model FILE.json."
            if given
            else "Copy the open_clip_config.json of the repository that they come from beside them, or give --mean "
            f"R G B --std R G B (OpenAI's: --mean {' '.join(map(str, OPENAI_MEAN))} --std "
            f"{' '.join(map(str, OPENAI_STD))}), or --model FILE.json, a model configuration with preprocess_cfg."
        )
    )


def _said(kind: tuple[Any, ...]) -> str:
    resize_mode, interpolation, *normalisation = kind
    return ", ".join([f"{resize_mode}, {interpolation}", *(f"mean {_shown(mean)}" for mean in normalisation[:1])])


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
