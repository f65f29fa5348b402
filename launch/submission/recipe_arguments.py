"""The Recipe as command-line flags: a typed flag for each field, with the help text of the field."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from cfmask.errors import did_you_mean
from cfmask.presets import ALIASES, PRESETS, canonical_name
from cfmask.recipe import Recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --preset and a flag for each setting. A setting without a flag keeps the preset's value."""
    parser.add_argument(
        "--preset",
        type=preset_name,
        choices=sorted(PRESETS),
        metavar="ROW",
        help="start from this row of the paper's tables; other flags change it. "
        + ", ".join(PRESETS)
        + ". Other names "
        "are accepted, such as object-mask for object-mask-single-fill, kd for kd-clean, fd for fd-clean",
    )
    for group in dataclasses.fields(Recipe):
        kind = type(group.default)
        section = parser.add_argument_group(group.name, kind.__doc__)
        for setting, hint in _settings(kind):
            default = setting.default
            shown = "" if default in (None, "", ()) else f" (default: {default})"
            section.add_argument(
                flag_of(setting),
                dest=f"{group.name}.{setting.name}",
                default=argparse.SUPPRESS,
                help=setting.metadata["help"].replace("%", "%%") + shown,
                **_parsing(hint, setting),
            )


_NO_TRAINING = {
    "zero-shot": "tools/evaluate.py evaluates the model that a run starts from (RUN/initial.safetensors)",
    "wise-ft": "train with --preset ft, then mix its model with the zero-shot one: tools/wise_ft.py",
    "soup": "train the ingredients, then average them: tools/soup.py",
}
"""Rows of the paper's tables that are not trained, with how to get them."""


def preset_name(text: str) -> str:
    """The name of a preset, for argparse."""
    name = canonical_name(text)
    for row, instead in _NO_TRAINING.items():
        if name.lower().replace("_", "-") in (row, row.replace("-", "")):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not trained: {instead}. launch/reproduce.py --rows {row} does it all."
            )
    if name not in PRESETS:
        near = did_you_mean(text, [*PRESETS, *ALIASES]) or f" Choose from {', '.join(PRESETS)}."
        raise argparse.ArgumentTypeError(f"There is no preset {text!r}.{near}")
    return name


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The unresolved recipe of parsed flags."""
    base = PRESETS[arguments.preset] if arguments.preset else Recipe()
    for group in dataclasses.fields(Recipe):
        given = {
            name.split(".", 1)[1]: tuple(value) if isinstance(value, list) else value
            for name, value in vars(arguments).items()
            if name.startswith(f"{group.name}.")
        }
        base = dataclasses.replace(base, **{group.name: dataclasses.replace(getattr(base, group.name), **given)})
    return base


def given_recipe_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags of settings that are given on the command line."""
    flags = [
        flag_of(setting)
        for group in dataclasses.fields(Recipe)
        for setting, _ in _settings(type(group.default))
        if hasattr(arguments, f"{group.name}.{setting.name}")
    ]
    return flags + (["--preset"] if arguments.preset else [])


def flag_of(setting: dataclasses.Field) -> str:
    return setting.metadata["flag"] or "--" + setting.name.replace("_", "-")


def _number_or(names: Sequence[str]) -> Callable[[str], int | str]:
    def read(text: str) -> int | str:
        try:
            return text if text in names else int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {' or '.join(names)}") from None

    return read


def _settings(kind: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(kind)
    given = [setting for setting in dataclasses.fields(kind) if not setting.metadata["recorded"]]
    return [(setting, hints[setting.name]) for setting in given]


def _parsing(hint: Any, setting: dataclasses.Field) -> dict[str, Any]:
    """argparse's keywords for the types str, int, float, ``X | None``, ``int | Literal[name]``, ``tuple[str, ...]``,
    and ``tuple[float, ...]`` with a value for each channel."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint, *others = [part for part in typing.get_args(hint) if part is not type(None)]
        names = [name for part in others for name in typing.get_args(part)]
        if names:
            return {"type": _number_or(names), "metavar": "|".join(["N", *names])}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is float:
        return {"nargs": 3, "type": float, "metavar": ("R", "G", "B")}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "*", "type": str, "metavar": "SET"}
    if setting.metadata["choices"]:
        return {"type": hint, "choices": setting.metadata["choices"]}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, setting.name.upper())}
