"""Draw the demo's data set: folders of images of shapes on textures, whose backgrounds are a spurious cue.

    OUT/classes.txt                                     folder<TAB>display name, one class a line
    OUT/pretrain/n90000001/n90000001_00000_dots.JPEG    every object on every background, in more styles
    OUT/train/…                                         95 % of the images show their class's own background
    OUT/val/…                                           like train, other images
    OUT/shift-random/…                                  the background is independent of the class
    OUT/shift-swapped/…                                 the background is always that of another class
    OUT/shift-style/…                                   outline drawings on plain paper
    OUT-masks/val/n90000001/n90000001_00000_stripes.png exact object masks of val: 255 on the object

The own background of class k is kind k. A file name ends in the kind of background, so class and file name together
are a caption. Size, place, angle and colours vary in every image, so neither colour nor place identifies a class. The
object lies within the centre square that the recipe crops.

An image is a pure function of (seed, split, class, number in the class). With the same versions of Pillow and numpy,
the files are identical byte for byte on any number of processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cfmask.runtime.pool import map_in_processes
from cfmask.runtime.progress import progress_bar

Array = np.ndarray
Rng = np.random.Generator

CLASSES = ("star", "ring", "arrow", "cross", "crescent", "heart", "house", "fish", "key", "mug")
PAPER = "paper"
BACKGROUNDS = ("stripes", "checks", "dots", "noise", "waves", "gradient", "bricks", "circles", "clouds", "grid")
OWN, ANY, OTHER = "own", "any", "other"
MASK_SPLITS = ("val",)

_OVERSAMPLING = 3


@dataclass(frozen=True)
class Split:
    """How a split is drawn."""

    per_class: int
    """Images of each class."""
    own: float
    """Share of images on the class's own background."""
    rest: str
    """Background of the remaining images: ANY, or OTHER than the class's own."""
    sketched: float = 0.0
    """Share of outline drawings."""
    paper: float = 0.0
    """Share of images on plain paper."""
    turn: float = 15.0
    """Largest rotation, in degrees."""


SPLITS = {
    "pretrain": Split(500, 0.0, ANY, sketched=0.2, paper=0.15, turn=20.0),
    "train": Split(200, 0.95, OTHER),
    "val": Split(100, 0.95, OTHER),
    "shift-random": Split(100, 0.0, ANY),
    "shift-swapped": Split(100, 0.0, OTHER),
    "shift-style": Split(100, 0.0, ANY, sketched=1.0, paper=1.0),
}


def class_folder(label: int) -> str:
    """A folder name that looks like a WordNet id. No WordNet id starts with n9, so it is never taken for ImageNet's."""
    return f"n9{label + 1:07d}"


def draw_tree(out: Path, *, seed: int = 0, processes: int | None = None, progress: bool = True) -> None:
    """Draw all splits below ``out``, and the object masks of MASK_SPLITS below ``out`` + "-masks".

    Args:
        out: a folder; existing images are overwritten.
        seed: decides every pixel.
        processes: number of processes, by default one per core. It does not change the images.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"{class_folder(label)}\t{name}\n" for label, name in enumerate(CLASSES)]
    (out / "classes.txt").write_text("".join(lines), encoding="utf-8")
    jobs = [
        (out, seed, split, label, settings.per_class)
        for split, settings in SPLITS.items()
        for label in range(len(CLASSES))
    ]
    total = sum(settings.per_class for settings in SPLITS.values()) * len(CLASSES)
    processes = processes or len(os.sched_getaffinity(0))

    with progress_bar(total=total, unit=" images", desc="draw", disable=not progress) as bar:
        map_in_processes(_draw_class, jobs, workers=processes, progress=bar.update)


def _draw_class(job: tuple[Path, int, str, int, int]) -> int:
    out, seed, split, label, count = job
    folder = out / split / class_folder(label)
    folder.mkdir(parents=True, exist_ok=True)
    masks = out.with_name(out.name + "-masks") / split / class_folder(label)
    if split in MASK_SPLITS:
        masks.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, mask, kind = draw_image(seed, split, label, number)
        name = f"{class_folder(label)}_{number:05d}_{kind}"
        Image.fromarray(image).save(folder / f"{name}.JPEG", format="JPEG", quality=90)
        if split in MASK_SPLITS:
            Image.fromarray(mask).save(masks / f"{name}.png")
    return count


def draw_image(seed: int, split: str, label: int, number: int) -> tuple[Array, Array, str]:
    """One image of a split.

    Returns:
        Image, uint8 (H, W, 3); mask, uint8 (H, W), 255 on the object and 0 elsewhere; kind of background.
    """
    settings = SPLITS[split]
    rng = np.random.default_rng([seed, list(SPLITS).index(split), label, number])
    short = int(rng.integers(64, 89))
    long = int(min(96, short * rng.uniform(1.0, 1.35)))
    width, height = (long, short) if rng.random() < 0.5 else (short, long)

    number_of_kind = _background_kind(settings, label, rng)
    sketched = rng.random() < settings.sketched
    if rng.random() < settings.paper:
        kind = PAPER
        canvas = rng.uniform(200, 255, 3).astype(np.float32) + _grain(height, width, 4, rng)
    else:
        kind = BACKGROUNDS[number_of_kind]
        first, second = _two_colours(rng)
        tone = _TEXTURES[number_of_kind](height, width, rng).astype(np.float32)[..., None]
        canvas = first + (second - first) * tone + _grain(height, width, 6, rng)

    body, marks = _object(CLASSES[label], height, width, settings.turn, rng)
    colour, mark_colour, line_colour = _object_colours(canvas, body, rng)
    outline = _outline(body)[..., None]
    if sketched:
        ink = np.maximum(outline, _outline(marks)[..., None])
        canvas = canvas + (line_colour - canvas) * ink
    else:
        shade = np.linspace(1, 1 + rng.uniform(-0.4, 0.4), height, dtype=np.float32)[:, None, None]
        canvas = canvas + (colour * shade - canvas) * body[..., None]
        canvas = canvas + (mark_colour - canvas) * (marks * body)[..., None]
        canvas = canvas + (line_colour - canvas) * outline * np.float32(rng.uniform(0.5, 1.0))
    return np.clip(canvas, 0, 255).astype(np.uint8), np.where(body > 0.5, 255, 0).astype(np.uint8), kind


def _grain(height: int, width: int, amount: float, rng: Rng) -> Array:
    """Noise with standard deviation ``amount``, equal in all channels: (height, width, 1)."""
    return rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(amount)


def _background_kind(settings: Split, label: int, rng: Rng) -> int:
    """The number of a background. Both draws are always made, so that later draws do not depend on the choice."""
    other = (label + 1 + int(rng.integers(len(BACKGROUNDS) - 1))) % len(BACKGROUNDS)
    anything = int(rng.integers(len(BACKGROUNDS)))
    if rng.random() < settings.own:
        return label
    return other if settings.rest == OTHER else anything


# --- colours --------------------------------------------------------------------------------------------------------


def _luminance(colour: Array) -> float:
    return float(colour @ np.array([0.299, 0.587, 0.114]))


def _two_colours(rng: Rng) -> tuple[Array, Array]:
    """The two tones of a texture: any hue, dark to medium, 35 to 80 levels of brightness apart."""
    dark = rng.uniform(15, 95, 3)
    light = np.clip(dark + rng.uniform(35, 80) + rng.uniform(-25, 25, 3), 0, 255)
    dark, light = dark.astype(np.float32), light.astype(np.float32)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _object_colours(canvas: Array, body: Array, rng: Rng) -> tuple[Array, Array, Array]:
    """Colours of the object (any hue, lighter than the background), of its markings, and of its dark outline."""
    behind = _luminance(np.einsum("hwc,hw->c", np.broadcast_to(canvas, (*body.shape, 3)), body) / body.sum())
    colour = rng.uniform(60, 255, 3)
    colour = np.clip(colour + max(0.0, behind + 50 - _luminance(colour)), 0, 255)
    marking, line = colour * rng.uniform(0.3, 0.55), rng.uniform(0, 40, 3)
    return colour.astype(np.float32), marking.astype(np.float32), line.astype(np.float32)


# --- textures: tone in 0…1 (height, width) --------------------------------------------------------------------------


def _plane(height: int, width: int, rng: Rng, turn: float = math.pi) -> tuple[Array, Array]:
    """Pixel coordinates, rotated by up to ±turn and shifted at random."""
    angle = rng.uniform(-turn, turn)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    shift = rng.uniform(0, 100, 2)
    return (
        x * math.cos(angle) + y * math.sin(angle) + shift[0],
        -x * math.sin(angle) + y * math.cos(angle) + shift[1],
    )


def _stripes(height: int, width: int, rng: Rng) -> Array:
    u, _ = _plane(height, width, rng)
    period = rng.uniform(8, 14)
    return (u % period < period / 2).astype(float)


def _checks(height: int, width: int, rng: Rng) -> Array:
    u, v = _plane(height, width, rng, 0.4)
    side = rng.uniform(6, 10)
    return ((u // side + v // side) % 2).astype(float)


def _dots(height: int, width: int, rng: Rng) -> Array:
    u, v = _plane(height, width, rng, 0.6)
    period = rng.uniform(10, 15)
    radius = period * rng.uniform(0.24, 0.36)
    return (np.hypot(u % period - period / 2, v % period - period / 2) < radius).astype(float)


def _noise(height: int, width: int, rng: Rng) -> Array:
    grain = 2
    coarse = rng.random((height // grain + 1, width // grain + 1))
    return np.kron(coarse, np.ones((grain, grain)))[:height, :width]


def _waves(height: int, width: int, rng: Rng) -> Array:
    u, v = _plane(height, width, rng, 0.5)
    bend = rng.uniform(4, 7) * np.sin(2 * math.pi * u / rng.uniform(22, 34))
    return 0.5 + 0.5 * np.sin(2 * math.pi * (v + bend) / rng.uniform(11, 16))


def _gradient(height: int, width: int, rng: Rng) -> Array:
    u, _ = _plane(height, width, rng)
    u = u - u.min()
    return u / u.max()


def _bricks(height: int, width: int, rng: Rng) -> Array:
    u, v = _plane(height, width, rng, 0.3)
    row_height, length = rng.uniform(9, 12), rng.uniform(18, 24)
    row = v // row_height
    joint = (v % row_height < 2) | ((u + row % 2 * length / 2) % length < 2)
    return np.where(joint, 1.0, 0.25 * ((row * 7 + (u + row % 2 * length / 2) // length * 3) % 3) / 2)


def _circles(height: int, width: int, rng: Rng) -> Array:
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width))
    period = rng.uniform(10, 15)
    return (radius % period < period / 2).astype(float)


def _clouds(height: int, width: int, rng: Rng) -> Array:
    total = np.zeros((height, width))
    for cells, weight in ((4, 1.0), (8, 0.5), (16, 0.25)):
        coarse = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        total += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    low, high = np.min(total), np.max(total)
    return (total - low) / (high - low)


def _grid(height: int, width: int, rng: Rng) -> Array:
    u, v = _plane(height, width, rng, 0.8)
    period = rng.uniform(9, 13)
    return ((u % period < 2) | (v % period < 2)).astype(float)


_TEXTURES: tuple[Callable[[int, int, Rng], Array], ...] = (
    _stripes,
    _checks,
    _dots,
    _noise,
    _waves,
    _gradient,
    _bricks,
    _circles,
    _clouds,
    _grid,
)

# --- objects --------------------------------------------------------------------------------------------------------
# A form is a list of polygons in the square -1…1 (y down), in the order of painting. A polygon adds to the body, cuts a
# hole into it, or is a marking.

BODY, HOLE, MARK = "body", "hole", "mark"
Points = list[tuple[float, float]]


def _round(x: float, y: float, rx: float, ry: float | None = None, start: float = 0.0, end: float = 360.0) -> Points:
    """An ellipse or an arc of it, in degrees clockwise from the right."""
    angles = np.radians(np.linspace(start, end, 33))
    return [(x + rx * math.cos(a), y + (ry or rx) * math.sin(a)) for a in angles]


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star() -> Points:
    radii = (1.0, 0.42)
    return [(radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)]


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 49)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(a / 17, -b / 17 - 0.1) for a, b in zip(x, y, strict=True)]


_FORMS: dict[str, list[tuple[str, Points]]] = {
    "star": [(BODY, _star()), (MARK, _round(0, 0, 0.22))],
    "ring": [(BODY, _round(0, 0, 0.95)), (HOLE, _round(0, 0, 0.52)), (MARK, _box(-0.15, -1, 0.15, -0.45))],
    "arrow": [
        (BODY, [(-0.95, -0.25), (0.1, -0.25), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.25), (-0.95, 0.25)]),
        (MARK, _box(-0.95, -0.3, -0.65, 0.3)),
    ],
    "cross": [
        (BODY, _box(-0.3, -0.95, 0.3, 0.95)),
        (BODY, _box(-0.95, -0.3, 0.95, 0.3)),
        (MARK, _box(-0.2, -0.2, 0.2, 0.2)),
    ],
    "crescent": [(BODY, _round(0, 0, 0.98)), (HOLE, _round(0.42, -0.12, 0.78)), (MARK, _round(-0.72, 0.1, 0.14))],
    "heart": [(BODY, _heart()), (MARK, _round(-0.45, -0.4, 0.17, 0.24))],
    "house": [
        (BODY, [(-0.7, -0.1), (0, -0.95), (0.7, -0.1), (0.7, 0.9), (-0.7, 0.9)]),
        (MARK, _box(-0.18, 0.3, 0.2, 0.9)),
        (MARK, [(-0.7, -0.1), (0, -0.95), (0.7, -0.1)]),
    ],
    "fish": [
        (BODY, _round(-0.2, 0, 0.78, 0.48)),
        (BODY, [(0.4, 0), (1, -0.55), (0.85, 0), (1, 0.55)]),
        (MARK, _round(-0.62, -0.1, 0.11)),
        (MARK, [(-0.1, -0.5), (0.05, -0.5), (0.05, 0.5), (-0.1, 0.5)]),
    ],
    "key": [
        (BODY, _round(-0.55, 0, 0.43)),
        (HOLE, _round(-0.55, 0, 0.19)),
        (BODY, _box(-0.15, -0.13, 1, 0.13)),
        (BODY, _box(0.42, 0, 0.6, 0.5)),
        (BODY, _box(0.8, 0, 1, 0.42)),
    ],
    "mug": [
        (BODY, _round(0.5, 0, 0.45, 0.5)),
        (HOLE, _round(0.5, 0, 0.24, 0.28)),
        (BODY, _box(-0.75, -0.8, 0.45, 0.8)),
        (MARK, _box(-0.8, -0.35, 0.5, 0)),
    ],
}


def _object(name: str, height: int, width: int, turn: float, rng: Rng) -> tuple[Array, Array]:
    """Coverage of the body and of its markings, 0…1 (height, width), at a random place in the centre square."""
    short = min(height, width)
    radius = short * rng.uniform(0.26, 0.38)
    reach = short / 2 - radius * 1.05
    x, y = width / 2 + rng.uniform(-reach, reach), height / 2 + rng.uniform(-reach, reach)
    angle = math.radians(rng.uniform(-turn, turn))
    stretch = rng.uniform(0.85, 1.0, 2) * (rng.choice([-1, 1]), 1)
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)

    size = (width * _OVERSAMPLING, height * _OVERSAMPLING)
    body, marks = Image.new("L", size), Image.new("L", size)
    on_body, on_marks = ImageDraw.Draw(body), ImageDraw.Draw(marks)
    for role, points in _FORMS[name]:
        placed = [
            (
                _OVERSAMPLING * (x + cos * stretch[0] * px - sin * stretch[1] * py),
                _OVERSAMPLING * (y + sin * stretch[0] * px + cos * stretch[1] * py),
            )
            for px, py in points
        ]
        (on_marks if role == MARK else on_body).polygon(placed, fill=0 if role == HOLE else 255)
    return _coverage(body), _coverage(marks)


def _coverage(image: Image.Image) -> Array:
    return np.asarray(image.reduce(_OVERSAMPLING), dtype=np.float32) / 255


def _outline(coverage: Array) -> Array:
    """The range of coverage within a pixel's neighbourhood: a line about two pixels wide around the shape."""
    wide, narrow = coverage.copy(), coverage.copy()
    for axis in (0, 1):
        for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:-1], np.s_[1:])):
            here, there = ((a, slice(None)), (b, slice(None))) if axis == 0 else ((slice(None), a), (slice(None), b))
            np.maximum(wide[here], coverage[there], out=wide[here])
            np.minimum(narrow[here], coverage[there], out=narrow[here])
    return wide - narrow
