"""Segmentation masks in files: PNGs, COCO's run-length encoding, and their assignment to samples.

Run-length encodings are decoded here and not by pycocotools, which does not check its input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cfmask.data import images
from cfmask.errors import UserError

Mask = NDArray[np.bool_]
"""(H, W): where the object is."""


def shown_size(shape: Sequence[int]) -> str:
    """(H, W) as W × H."""
    height, width = shape
    return f"{width} × {height}"


class Names:
    """Mask files or entries by the names of samples. A name that two of them share finds neither. If a sample's own
    folder has masks, those of other folders are not used."""

    def __init__(self, found: Sequence[Path]) -> None:
        self._folders = {path.parent.name for path in found}
        self._known: dict[str, Path | None] = {}
        for path in found:
            stem = path.with_suffix("")
            for name in {stem.name, "/".join(stem.parts[-2:])}:
                self._known[name] = None if name in self._known else path

    def find(self, key: str, name: str) -> Path | None:
        """The mask of a sample. name: of the original file of its image (folder/file), or ""."""
        parts = Path(name).with_suffix("").parts if name else ()
        candidates = [key, "/".join(parts[-2:])]
        if parts and (len(parts) == 1 or parts[-2] not in self._folders):
            candidates.append(parts[-1])
        for candidate in candidates:
            if found := self._known.get(candidate):
                return found
        return None


def read_json(path: Path) -> Any:
    """Raises UserError."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from None


# --- PNG --------------------------------------------------------------------------------------------------------------


@contextmanager
def open_png(shown: object, data: bytes) -> Iterator[Image.Image]:
    """Open a PNG without reading its pixels. Errors in the ``with`` block become a UserError with its name,
    ``shown``."""
    refused: UserError | None = None
    try:
        with images.opened(data, ("PNG",), is_photograph=False) as image:
            try:
                yield image
            except UserError as error:  # the caller's own
                refused = error
                raise
    except UserError as error:
        raise error if error is refused else UserError(f"{shown} cannot be read as a PNG ({error}).") from None


def read_object_mask(shown: object, data: bytes) -> Mask:
    """The mask in a PNG of one object: 0, and one other value where the object is.

    Raises:
        UserError: not such a PNG.
    """
    with open_png(shown, data) as image:
        pixels = np.array(image)
        if image.mode == "P":  # tools that compress PNGs may reorder palettes, so that white is index 0
            black = ~np.array(image.convert("RGB")).any(2)
            if not np.array_equal(black, pixels == 0):
                raise UserError(
                    f"{shown} has a palette whose index 0 is not black, so the pixels of the object are unclear. Save "
                    "it in greyscale, with 0 outside of the object."
                )
    there: Mask = pixels != 0
    if pixels.ndim == 2 and (pixels.dtype == bool or ((pixels == pixels.max()) == there).all() or not there.any()):
        return there
    what = f"{len(np.unique(pixels))} values" if pixels.ndim == 2 else f"{pixels.shape[2]} channels"
    hint = " If it is a PNG of COCO's panoptic format, give the JSON of its annotations instead."
    raise UserError(
        f"{shown} is not a mask of one object: it has {what}. A mask has one channel, with 0 outside of the object and "
        f"one other value in it.{hint if pixels.ndim == 3 else ''}"
    )


def read_segment_ids(shown: object, data: bytes, size: tuple[int, int]) -> NDArray[np.int32]:
    """The segment ids in a PNG of COCO's panoptic format: R + 256 G + 65536 B.

    Args:
        size: height and width that it has to have.

    Returns:
        (H, W); 0 for pixels of no segment.

    Raises:
        UserError: it has another size or another pixel format.
    """
    with open_png(shown, data) as image:
        if image.size != size[::-1]:
            raise UserError(
                f"{shown} has {shown_size(image.size[::-1])} pixels, its image has {shown_size(size)} according to the "
                f"annotations. Ids cannot be resized: take the PNGs that were distributed with the annotations."
            )
        depth = data[24]  # from the header, because Pillow silently reduces 16 bits to 8
        if image.mode not in ("RGB", "RGBA") or depth != 8:
            raise UserError(
                f"{shown} is not a PNG of COCO's segment ids, which has three channels of 8 bits (R + 256 G + 65536 "
                f"B): it has {depth} bits and Pillow's mode {image.mode}. Use the PNGs that were distributed with the "
                "annotations, and not converted ones."
            )
        pixels = np.array(image)
    if pixels.shape[2] == 4 and (pixels[..., 3] != 255).any():
        raise UserError(
            f"{shown} has transparent pixels, whose segment ids are uncertain: COCO's PNGs have three channels."
        )
    return pixels[..., :3].astype(np.int32) @ np.array([1, 256, 256**2], np.int32)


# --- run-length encoding ----------------------------------------------------------------------------------------------


def decode_mask(entry: Any, path: Path) -> Mask:
    """Decode a run-length encoded mask of the file ``path``: ``{"size": [H, W], "counts": …}``.

    Raises:
        UserError: polygons, or an invalid encoding.
    """
    if isinstance(entry, list):
        raise UserError(
            f"{path} holds polygons, whose pixels depend on the program that draws them. Give COCO's panoptic "
            "annotations (panoptic_val2017.json, with its PNGs), which have exact pixels; or masks with run-length "
            "encoding."
        )
    try:
        (height, width), counts = entry["size"], entry["counts"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f'{path} holds no run-length encoded mask: that is {{"size": [height, width], "counts": …}}.'
        ) from None
    try:
        return decode_runs(counts, height, width)
    except UserError as reason:
        raise UserError(f"{path} holds a mask that cannot be decoded: {reason}.") from None


def decode_runs(counts: str | Sequence[int], height: int, width: int) -> Mask:
    """COCO's run-length encoding → bool (height, width).

    Args:
        counts: lengths of runs, in column order, alternately outside of the object and in it, beginning outside. Or
            COCO's compressed text: characters of six bits from "0" on, with five bits of a number, lowest first, and a
            bit that is set if more follow. From the fourth number on, they are differences to the number two before.
            (pycocotools, maskApi.c)

    Raises:
        UserError: the sum is not height · width, or the text is invalid. The message is only the reason.
    """
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise UserError(f"its size is {height!r} × {width!r}")
    if height * width > 2 * (Image.MAX_IMAGE_PIXELS or 0):
        raise UserError(f"its size is {height} × {width}, more than any image that is read")
    if not isinstance(counts, str | list | tuple):
        raise UserError(f"its counts are a {type(counts).__name__}")
    runs = _uncompressed(counts) if isinstance(counts, str) else list(counts)
    if not all(isinstance(run, int) and run >= 0 for run in runs):
        raise UserError("its counts are not all whole numbers of 0 or more")
    if sum(runs) != height * width:
        raise UserError(f"its runs have {sum(runs)} pixels, and {height} × {width} are {height * width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _uncompressed(text: str) -> list[int]:
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise UserError(f"{character!r} is not a character of compressed counts")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise UserError("its compressed counts end within a number")
    return runs
