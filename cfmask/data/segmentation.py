"""Segmentation masks: where the object of a sample is, from files that are there.

    DIR/…/KEY.png                one mask a sample: 0, and one other value where the object is
    DIR/…/KEY.json               the same run-length encoded: {"size": [H, W], "counts": …}, as COCO has it; or a list
                                 of such, whose union it is
    FILE.json                    COCO annotations of a whole set: panoptic ones (with their PNGs of segment ids in a
                                 folder beside the file, which is named like it), or run-length encoded instances
    SET/manifest.json            shards of masks, as tools/segment.py writes them

Masks belong to the images as they were before the recipe's resize and crop, and go through the same, each pixel taking
the value of the nearest one. A sample's mask is found by its key; or where its image was a file of another name, by
FOLDER/NAME (DIR/…/n02085620/n02085620_1.png) or NAME, without ending, of that file.
"""

from __future__ import annotations

import io
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cfmask.data import imagenet, images
from cfmask.data.shards import MANIFEST, Manifest, ShardReader, load_manifest
from cfmask.errors import UserError
from cfmask.masking.validation import Coverage, coverage

Mask = NDArray[np.bool_]

MADE_BY = "segment"
"""``made["tool"]`` in the manifest of shards of masks."""

_FORMS = (
    "Give a folder of PNGs or run-length JSONs named by sample key, a COCO annotation file (.json), or shards of masks "
    "that tools/segment.py made."
)


class Masks(Protocol):
    """Where masks are read from. Threads may share it."""

    def read(self, key: str, name: str, category: str) -> Mask | None:
        """The mask of one sample.

        Args:
            key: of the sample. name: of the file that its image was (folder/file), or "".
            category: COCO's name of what the sample shows; masks of one object a sample need none.

        Returns:
            bool (H, W), possibly without any pixel; None if there is no mask for this sample.

        Raises:
            UserError: it cannot be read, or is no mask.
        """
        ...


def open_masks(where: str | Path) -> Masks:
    """The masks that a path names.

    Raises:
        UserError: there is nothing, or nothing of the forms above.
    """
    path = Path(where)
    if path.is_file() and path.suffix == ".json":
        return _Coco(path)
    if (path / MANIFEST).is_file() or any(path.glob(f"*/{MANIFEST}")):  # of a folder of sets, its error says which
        return _Shards(load_manifest(path))
    if path.is_dir():
        return _Files(path)
    raise UserError(f"There are no masks at {path}. {_FORMS}")


# --- classes ----------------------------------------------------------------------------------------------------------

ALL = "all"

Classes = Sequence[tuple[str, str]]
"""(wnid or folder name, display name) by class id."""


def categories(classes: Classes) -> list[str]:
    """COCO's name of what each class shows: its super-class, or else its own name."""
    known = imagenet.super_class_of()
    return [known.get(folder, name) for folder, name in classes]


def class_groups(classes: Classes, names: Sequence[str] | None = None) -> dict[str, frozenset[int]]:
    """Class ids by group.

    Args:
        names: dog, cat, bird: ImageNet's classes of these super-classes (``imagenet.SUPER_CLASSES``); all: those of all
            three, or every class of a set that has none of them; or a single class, by folder or display name. By
            default, those of the first four that the set has.

    Raises:
        UserError: a group that is none of these, or that is named twice.
    """
    known = imagenet.super_class_of()
    groups = {
        name: frozenset(i for i, (folder, _) in enumerate(classes) if known.get(folder) == name)
        for name in imagenet.SUPER_CLASSES
    }
    groups = {name: ids for name, ids in groups.items() if ids}
    groups[ALL] = frozenset().union(*groups.values()) or frozenset(range(len(classes)))
    if names is None:
        return groups
    for i, (folder, name) in enumerate(classes):
        groups.setdefault(folder, frozenset([i]))
        groups.setdefault(name, frozenset([i]))
    for name in names:
        if name in imagenet.SUPER_CLASSES and name not in groups:
            raise UserError(
                f"The set has none of ImageNet's {len(imagenet.SUPER_CLASSES[name])} classes of the group {name}: its "
                f"{len(classes)} classes begin with {classes[0][0]}. Leave --groups out, or name classes of the set."
            )
        if name not in groups:
            raise UserError(
                f"There is no group {name!r}: groups are {', '.join(imagenet.SUPER_CLASSES)}, {ALL}, and each class of "
                f"the set by its folder or display name ({', '.join(classes[0])}, for one)."
            )
    if len(set(names)) != len(names):
        raise UserError(f"--groups names a group twice: {' '.join(names)}.")
    return {name: groups[name] for name in names}


# --- forms ----------------------------------------------------------------------------------------------------------


class _Names:
    """Files or entries by what a sample may call them. A bare name that two of them share names none."""

    def __init__(self, found: Sequence[Path]) -> None:
        self._known: dict[str, Path | None] = {}
        for path in found:
            stem = path.with_suffix("")
            for name in {stem.name, "/".join(stem.parts[-2:])}:
                self._known[name] = None if name in self._known else path

    def find(self, key: str, name: str) -> Path | None:
        parts = Path(name).with_suffix("").parts if name else ()
        for candidate in (key, "/".join(parts[-2:]), parts[-1] if parts else ""):
            if found := self._known.get(candidate):
                return found
        return None


class _Files:
    def __init__(self, root: Path) -> None:
        found = sorted(path for path in root.rglob("*") if path.suffix in (".png", ".json") and path.is_file())
        if not found:
            raise UserError(f"{root} holds no masks: there is no .png or .json in it. {_FORMS}")
        twice = {path.with_suffix("") for path in found if path.suffix == ".json"} & {
            path.with_suffix("") for path in found if path.suffix == ".png"
        }
        if twice:
            raise UserError(f"{min(twice)} is there as .png and as .json: which of them is the mask? Keep one kind.")
        self._names = _Names(found)

    def read(self, key: str, name: str, category: str) -> Mask | None:
        path = self._names.find(key, name)
        if path is None:
            return None
        if path.suffix == ".png":
            return _two_values(_read_png(path, path.read_bytes()), path)
        entry = _read_json(path)
        encoded = entry if isinstance(entry, list) else [entry]
        if not encoded:
            raise UserError(f"{path} is an empty list: a mask without any pixel has its size, and counts [H · W].")
        parts = [_decode(part, path) for part in encoded]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"{path} holds masks of several sizes, which cannot be of one image.")
        return np.logical_or.reduce(parts)


class _Coco:
    """COCO's panoptic or instance annotations."""

    def __init__(self, path: Path) -> None:
        self._path = path
        raw = _read_json(path)
        try:
            self._categories = {str(entry["name"]): entry["id"] for entry in raw["categories"]}
            sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in raw["images"]}
            files = {entry["id"]: Path(entry["file_name"]) for entry in raw["images"]}
            self._annotations: dict[Path, list[dict[str, Any]]] = {file: [] for file in files.values()}
            self._sizes = {files[number]: size for number, size in sizes.items()}
            for annotation in raw["annotations"]:
                self._annotations[files[annotation["image_id"]]].append(annotation)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a file of COCO annotations ({error!r}): it needs images (id, file_name, height, "
                f"width), categories (id, name) and annotations (image_id; segments_info and file_name, or category_id "
                f"and segmentation). A file that is one mask goes into a folder, named by the sample's key."
            ) from None
        self._names = _Names(list(files.values()))

    def read(self, key: str, name: str, category: str) -> Mask | None:
        image = self._names.find(key, name)
        if image is None:
            return None
        if category not in self._categories:
            known = ", ".join(sorted(self._categories)[:12])
            raise UserError(
                f"{self._path} has no category {category!r}, which the sample {key} shows. Its categories: {known}"
                f"{' …' if len(self._categories) > 12 else ''}. Choose --groups that it has, or masks of one object a "
                "sample (PNGs)."
            )
        number = self._categories[category]
        mask: Mask = np.zeros(self._sizes[image], bool)
        for annotation in self._annotations[image]:
            try:
                part = self._part(annotation, number)
            except (KeyError, TypeError) as error:
                raise UserError(f"{self._path} has an annotation of {image} that is not COCO's ({error!r}).") from None
            if part is not None and part.shape != mask.shape:
                raise UserError(
                    f"{self._path} says that {image} has {_shown(mask.shape)} pixels, and an annotation of it has "
                    f"{_shown(part.shape)}."
                )
            mask |= False if part is None else part
        return mask

    def _part(self, annotation: Mapping[str, Any], category: int) -> Mask | None:
        """The pixels of this category in an annotation; None if it is of another."""
        if "segments_info" not in annotation:
            return _decode(annotation["segmentation"], self._path) if annotation["category_id"] == category else None
        wanted = [segment["id"] for segment in annotation["segments_info"] if segment["category_id"] == category]
        if not wanted:
            return None
        png = self._path.with_suffix("") / annotation["file_name"]
        try:
            colours = _read_png(png, png.read_bytes())
        except OSError as error:
            raise UserError(
                f"{self._path} names {png}, which cannot be read ({error.strerror}): COCO's PNGs of segment ids lie in "
                f"the folder {png.parent}."
            ) from None
        if colours.ndim != 3:
            raise UserError(f"{png} is no PNG of COCO's segment ids: those have three channels.")
        return np.isin(colours[..., :3].astype(np.int64) @ [1, 256, 256**2], wanted)


class _Shards:
    def __init__(self, manifest: Manifest) -> None:
        if manifest.made.get("tool") != MADE_BY:
            raise UserError(f"{manifest.root} is a set of images, not of masks. {_FORMS}")
        self._reader = ShardReader(manifest)
        first = np.concatenate([[0], np.cumsum(manifest.sample_counts)])
        self._ids = {
            key.decode(): int(first[number]) + row
            for number, shard in enumerate(manifest.shards)
            for row, key in enumerate(manifest.open_index(shard).keys.tolist())
        }

    def read(self, key: str, name: str, category: str) -> Mask | None:
        if key not in self._ids:
            return None
        sample = self._reader.read(self._ids[key])
        shown = f"{key} of {sample['__url__']}"
        return _two_values(_read_png(shown, sample["png"]), shown)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from None


def _read_png(shown: object, data: bytes) -> NDArray[Any]:
    """(H, W), or (H, W, channels)."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.array(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{shown} cannot be read as a PNG ({error}).") from None


def _two_values(pixels: NDArray[Any], shown: object) -> Mask:
    there = pixels != 0
    if pixels.ndim == 2 and (pixels.dtype == bool or ((pixels == pixels.max()) == there).all() or not there.any()):
        return there
    what = f"{len(np.unique(pixels))} values" if pixels.ndim == 2 else f"{pixels.shape[2]} channels"
    raise UserError(
        f"{shown} is no mask of one object: it has {what}, where a mask has one channel, 0 for what is not the object "
        f"and one other value for what is."
    )


# --- run-length encoding ----------------------------------------------------------------------------------------------


def _decode(entry: Any, path: Path) -> Mask:
    if isinstance(entry, list):
        raise UserError(f"{path} holds polygons, whose pixels depend on who draws them: encode the mask run by run.")
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
        counts: lengths of runs of pixels that are not and are the object, in turn, beginning with the first; columns
            one after the other. Or COCO's compressed text of them: six bits a character from "0" on, five of the number
            with the lowest first and one that says that it goes on; from the fourth on, differences to the one before
            the last. (pycocotools, maskApi.c)

    Raises:
        UserError: they do not add up to height · width, or are no such text. The message is the reason alone.
    """
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
            raise UserError(f"{character!r} is no character of compressed counts")
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


# --- samples with their masks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segmented:
    """A sample and where its object is.

    image: uint8 (3, S, S). mask: bool (S, S); None if there is none for it. label: class id.
    """

    key: str
    label: int
    image: Tensor
    mask: Tensor | None


def segmented_samples(
    manifest: Manifest,
    ids: Sequence[int],
    masks: Masks,
    *,
    image_size: int,
    category: Callable[[int], str],
    threads: int,
) -> Iterator[Segmented]:
    """Samples of a set with their masks, in the order of ``ids``.

    Args:
        category: COCO's name of what a class id's samples show.
        threads: that read and decode; 0 does it in this one, when a sample is asked for.

    Raises:
        UserError: a sample or its mask cannot be read, or the mask is of another size than the image.
    """
    with ShardReader(manifest) as reader:

        def read(sample_id: int) -> Segmented:
            sample = reader.read(sample_id)
            key, label = sample["__key__"], sample["__label__"]
            extension = next((name for name in sample if name in images.MEMBERS), None)
            if extension is None:
                raise UserError(f"Sample {key} of shard {sample['__url__']} has no image among its members.")
            about = facts_of(sample)
            image = images.pixels(sample[extension], extension, image_size, border=manifest.border)
            mask = masks.read(key, about.get("name", ""), category(label))
            if mask is None:
                return Segmented(key, label, image, None)
            _check_size(mask, sample, extension, about, manifest, image_size)
            if manifest.border and not manifest.image_size:
                mask = mask[manifest.border : -manifest.border, manifest.border : -manifest.border]
            return Segmented(key, label, image, images.crop_mask(torch.from_numpy(mask.copy()), image_size))

        if threads == 0:
            yield from map(read, ids)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="cfmask-masks") as pool:
            under_way: deque[Future[Segmented]] = deque()
            try:
                for sample_id in ids:
                    under_way.append(pool.submit(read, sample_id))
                    if len(under_way) > 8 * threads:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def facts_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What make_shards wrote beside a sample's image (name, width, height …); {} for shards of another maker."""
    try:
        facts = json.loads(bytes(sample.get("json", b"{}")))
    except ValueError:
        return {}
    known = isinstance(facts, dict) and isinstance(facts.get("name"), str) and {"width", "height"} <= facts.keys()
    return facts if known else {}


def _check_size(
    mask: Mask, sample: Mapping[str, Any], extension: str, about: Mapping[str, Any], manifest: Manifest, size: int
) -> None:
    if about:
        right = (about["height"], about["width"])
    elif manifest.image_size:
        return  # crops of another maker: nothing tells what they were cut from
    else:
        facts = images.inspect(sample[extension])
        right = (facts.height, facts.width)
    # Of a crop, a mask of the crop is as good.
    if mask.shape != right and not (manifest.image_size and mask.shape == (size, size)):
        raise UserError(
            f"The mask of sample {sample['__key__']} has {_shown(mask.shape)} pixels, its image had {_shown(right)}: "
            f"it is the mask of another image, or of a resized one. Masks belong to the images as they were before any "
            f"resizing."
        )


def _shown(shape: Sequence[int]) -> str:
    height, width = shape
    return f"{width} × {height}"


# --- in training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectReader:
    """Reads where the objects of training samples are, as far as patch masks can tell; by key alone.

    classes: COCO's name of what a class's samples show, by class id, for those classes that masks are validated on.
    size, patch_size: of the model.
    """

    masks: Masks
    classes: Mapping[int, str]
    size: int
    patch_size: int

    def read(self, key: str, label: int) -> Coverage | None:
        """Of one sample, N = 1; None if it is of another class, or there is no mask for it. A mask that cannot be used
        is none, with a warning: what is only measured ends no training."""
        if label not in self.classes:
            return None
        try:
            mask = self.masks.read(key, "", self.classes[label])
            cropped = None if mask is None else images.crop_mask(torch.from_numpy(mask.copy()), self.size)
        except UserError as error:
            warnings.warn(f"{key} takes no part in the validation of masks: {error}", stacklevel=2)
            return None
        return None if cropped is None else coverage(cropped[None], self.patch_size)
