"""Paths and labels in Parquet files, as the Hugging Face hub distributes image sets. Each row is an image (a
struct of its bytes and path) and a label.

    data/train-00000-of-00294.parquet  …  validation-00000-of-00014.parquet  …  test-00000-of-00028.parquet
    data/train-00000-of-00002-704ee106f89006a9.parquet            an older upload
    default/train/0000.parquet  0001.parquet  …                   the hub's own conversion
    train/part-00000-….parquet  …                                 written by Spark or Dask
    test.parquet                                                  one file

Labels are class names, or numbers that the file's metadata (``huggingface``) gives names to. Values are compressed page
by page, so an image cannot be read in place: unpacking.py unpacks each file once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cfmask.convert.request import Request
from cfmask.convert.sources.listing import Listing, is_image
from cfmask.data.blobs import SourceFile
from cfmask.errors import UserError

_NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})(-[0-9a-f]{16})?")
_ONLY_NUMBER = re.compile(r"(?:part[-.])?(?P<number>(?<=part[-.])\d+|\d{4,})([-.].*)?")
_LFS = b"version https://git-lfs"

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "wnid", "synset")


@dataclass(frozen=True)
class Columns:
    """Columns of a file.

    image: name of the images' column.
    nested: it is a struct of bytes and path; otherwise it holds the bytes themselves.
    has_path: the struct has a path.
    label: name of the labels' column.
    names: class names of the labels 0, 1, …; None if the file does not give them.
    """

    image: str
    nested: bool
    has_path: bool
    label: str
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class ParquetTable:
    """The rows of a Parquet file, without the images.

    split: the split that its file name gives.
    number: of the file in the split.
    paths: of each row, None where there is none.
    labels: of each row, None where there is none.
    num_bytes: estimate for all images.
    """

    file: SourceFile
    split: str
    number: int
    columns: Columns
    paths: list[str | None]
    labels: list[int | str | None]
    num_bytes: int


def holds_parquet(source: Path) -> bool:
    """Whether a source is a Parquet file, or has one in it or in the two levels of folders below it.

    The search leaves a folder below the source at its first image: a tree of a million images is not listed twice.
    """
    return _holds_parquet(str(source), 0) if os.path.isdir(source) else source.suffix == ".parquet"


def _holds_parquet(folder: str, depth: int) -> bool:
    folders = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.endswith(".parquet"):
                    return True
                if depth and is_image(entry.name):
                    return False
                if depth < 2 and entry.is_dir():
                    folders.append(entry.path)
    except OSError:  # the walk over the source reports it
        return False
    return any(_holds_parquet(path, depth + 1) for path in folders)


def list_parquet(listing: Listing) -> list[Path]:
    """The Parquet files of a source; others are ignored."""
    if not listing.source.is_dir():
        return [listing.source]
    files = []
    for found in listing:
        if found.parts[-1].endswith(".parquet"):
            files.append(Path(found.blob.path))
        elif is_image(found.parts[-1]):
            raise UserError(
                f"{listing.source} holds Parquet files and also images, such as {'/'.join(found.parts)}. Name the "
                f"folder of the files that are the set as --source."
            )
        else:
            listing.ignore(found)
    if not files:
        raise UserError(
            f"The Parquet files of {listing.source} are links to files that do not exist: copy those as well."
        )
    return files


def read_tables(files: Sequence[Path], is_wanted: Callable[[str], bool], request: Request) -> list[ParquetTable]:
    """Paths and labels of the files, by split and number. is_wanted: whether to read a split of this name."""
    by_split: dict[str, list[tuple[int, int | None, Path]]] = {}
    for path in files:
        split, number, total = _place(path)
        if is_wanted(split):
            by_split.setdefault(split, []).append((number, total, path))
    for split, places in by_split.items():
        _check_complete(split, places, request.allow_count_mismatch)
    tables = [
        _read(path, split, number, request)
        for split, places in sorted(by_split.items())
        for number, _, path in sorted(places)
    ]
    for table in tables:
        if table.columns != tables[0].columns:
            what = "class names" if table.columns.names != tables[0].columns.names else "columns"
            raise UserError(
                f"{table.file.path} and {tables[0].file.path} have different {what}: they are not of one set. Name the "
                f"folder of one set as --source."
            )
    return tables


def _place(path: Path) -> tuple[str, int, int | None]:
    """Split, number and total of a file; None for an unknown total."""
    if match := _NUMBERED.fullmatch(path.stem):
        return match["split"], int(match["number"]), int(match["total"])
    if match := _ONLY_NUMBER.fullmatch(path.stem):
        return path.parent.name.removesuffix(".parquet"), int(match["number"]), None
    return path.stem, 0, 1


def _check_complete(split: str, places: list[tuple[int, int | None, Path]], partial: bool) -> None:
    folders = {path.parent for _, _, path in places}
    numbers = [number for number, _, _ in places]
    totals = {total for _, total, _ in places}
    if len(set(numbers)) < len(numbers) or len(totals) > 1 or len(folders) > 1:
        shown = " and ".join(str(path) for *_, path in sorted(places, key=lambda place: place[:1])[:2])
        raise UserError(
            f"The source has several copies of the split {split}: {shown}. Name the folder of one copy as --source, or "
            f"move the other one out of it."
        )
    total = totals.pop()
    expected = max(numbers) + 1 if total is None else total
    missing = sorted(set(range(expected)) - set(numbers))
    if split.startswith("partial-"):
        missing = missing or [expected]
    if missing and not partial:
        raise UserError(
            f"{len(missing)} of the {expected} files of the split {split} are missing from {places[0][2].parent}, "
            f"such as number {missing[0]:05d}: images would be missing from the set. Download the rest."
        )


def _read(path: Path, split: str, number: int, request: Request) -> ParquetTable:
    try:
        source = SourceFile.listed(path)
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` in its clone.")
        with pq.ParquetFile(path, pre_buffer=False) as parquet:
            columns = _columns(path, parquet.schema_arrow, request)
            wanted = [columns.label, *([f"{columns.image}.path"] if columns.has_path else [])]
            table = parquet.read(columns=wanted, use_threads=False)
            paths: list[str | None] = [None] * table.num_rows
            if columns.has_path:
                paths = [row and row["path"] for row in table[columns.image].to_pylist()]
            labels = table[columns.label].to_pylist()
            if table.num_rows != parquet.metadata.num_rows:
                raise pa.ArrowInvalid(f"{table.num_rows} rows instead of {parquet.metadata.num_rows}")
            num_bytes = _image_bytes(parquet.metadata, columns)
    except pa.ArrowException as error:
        raise damaged(path, error) from None
    except OSError as error:
        raise UserError(f"The source {path} cannot be read ({error.strerror or error}).") from None
    return ParquetTable(source, split, number, columns, paths, labels, num_bytes)


def damaged(path: str | Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    return UserError(f"{path} cannot be read as Parquet ({reason}): it is truncated or damaged. Download it again.")


def _image_bytes(metadata: pq.FileMetaData, columns: Columns) -> int:
    inner = f"{columns.image}.bytes" if columns.nested else columns.image
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == inner)


# --- columns --------------------------------------------------------------------------------------------------------


def _columns(path: Path, schema: pa.Schema, request: Request) -> Columns:
    features = _features(schema)
    images = [field.name for field in schema if _is_image(field.type)]
    image = _chosen(path, schema, "image", request.image_column, images, _IMAGE_NAMES)
    numbers = [field.name for field in schema if pa.types.is_integer(_values(field.type))]
    labels = [name for name in numbers if _names(features.get(name)) is not None]
    labels = labels or [field.name for field in schema if field.name in numbers or _is_text(field.type)]
    label = _chosen(path, schema, "label", request.label_column, labels, _LABEL_NAMES)
    kind = schema.field(image).type
    nested = pa.types.is_struct(kind)
    at = kind.get_field_index("path") if nested else -1
    names = _names(features.get(label)) if label in numbers else None
    return Columns(image, nested, at >= 0 and _is_text(kind.field(at).type), label, names)


def _chosen(
    path: Path, schema: pa.Schema, what: str, given: str | None, fitting: list[str], usual: tuple[str, ...]
) -> str:
    """The given column, else the only one that fits, else the only one with a usual name among those that fit."""
    shown = ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema) or "no columns"
    if given is not None:
        if given not in fitting:
            raise UserError(
                f"{path} has no {what} column {given!r}; it has {shown}. Give one of "
                f"{', '.join(fitting) or 'another set'}."
            )
        return given
    for names in (fitting, [name for name in fitting if name.lower() in usual]):
        if len(names) == 1:
            return names[0]
    if not fitting:
        kind = "binary, or a struct with the field bytes" if what == "image" else "of whole numbers or names"
        raise UserError(f"{path} has no {what} column ({kind}): it has {shown}.")
    raise UserError(
        f"{path} has several possible {what} columns: {', '.join(fitting)}. Choose one with --{what}-column NAME."
    )


def _values(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    kind = _values(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_bytes(kind.field(at).type)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What the library ``datasets`` recorded about each column; {} if nothing."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _names(feature: Any) -> tuple[str, ...] | None:
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list):
        return tuple(map(str, feature["names"]))
    return None
