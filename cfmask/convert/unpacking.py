"""Images of Parquet files are unpacked once, each file into one flat file, before they are shuffled into shards.

    OUT/.unpacked/imagenet-0123abcd/train-00000.json    size and kind of each image: the record that the next is whole
                                    train-00000.json.bytes     the images, one after the other; removed at the end

Shards are made of samples from all over a set, and a row of a Parquet file cannot be read without the rows about it:
read in shuffled order, each file would be decompressed hundreds of times. The records are small and stay, so that the
same command knows the plan of a finished set without unpacking it again. Unpacked files have the time of change of the
file that they were made of, so that one that is made again is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cfmask.convert.sources.blobs import Blob, SourceFile
from cfmask.convert.sources.parquet import Columns, ParquetPart, damaged
from cfmask.data import images
from cfmask.errors import UserError
from cfmask.runtime.files import disk_is_full, written_aside

FOLDER = ".unpacked"
_ROWS_AT_ONCE = 32
"""Rows in memory at a time, whatever the size of a row group."""


@dataclass(frozen=True)
class Unpack:
    """One file to unpack. num_bytes: of its images, about. record: path of the record that it gets."""

    source: SourceFile
    columns: Columns
    rows: int
    num_bytes: int
    record: Path

    @property
    def bytes_file(self) -> Path:
        return self.record.with_name(f"{self.record.name}.bytes")


@dataclass(frozen=True)
class Unpacked:
    """Of each row: the place of its image, None if there is none; and its extension by its content, or ""."""

    blobs: list[Blob | None]
    extensions: list[str]


def folder_of(out: Path, kind: str, source: Path) -> Path:
    """Where a set is unpacked: other sets may be made below the same ``out``, also at the same time."""
    return out / FOLDER / f"{kind}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}"


def unpack_of(part: ParquetPart, folder: Path) -> Unpack:
    record = folder / f"{part.split}-{part.number:05d}.json"
    return Unpack(part.file, part.columns, len(part.labels), part.num_bytes, record)


def read_record(task: Unpack) -> Unpacked | None:
    """Where the images of a file are or will be; None if it was not unpacked, or changed since."""
    try:
        record = json.loads(task.record.read_bytes())
        source = [Path(task.source.path).name, task.source.size, task.source.mtime_ns]
        if record["source"] != source or record["column"] != task.columns.image or len(record["sizes"]) != task.rows:
            return None
        sizes, extensions = record["sizes"], record["extensions"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ends = list(accumulate(max(size, 0) for size in sizes))
    file = SourceFile(str(task.bytes_file), ends[-1] if ends else 0, _mtime_ns(task.source))
    places = zip(sizes, ends, strict=True)
    return Unpacked([None if size < 0 else Blob(file, end - size, size) for size, end in places], extensions)


def is_unpacked(task: Unpack) -> bool:
    """Whether the images are there, not the record alone."""
    try:
        status = os.stat(task.bytes_file)
    except OSError:
        return False
    record = read_record(task)
    first = next((blob for blob in record.blobs if blob), None) if record else None
    return record is not None and (first is None or first.file == SourceFile.of(task.bytes_file, status))


def pending(files: Sequence[Unpack], needed: Callable[[], Iterable[str]]) -> list[Unpack]:
    """What has to be unpacked next.

    Args:
        files: those of a set.
        needed: gives paths of the files with unpacked images that are to be read; called when all records are there.
    """
    if unknown := [task for task in files if read_record(task) is None]:
        return unknown
    paths = set(needed()) if files else set()
    return [task for task in files if str(task.bytes_file) in paths and not is_unpacked(task)]


def unpack(task: Unpack) -> tuple[int, int]:
    """Unpack one file, unless it is.

    Returns:
        Numbers of rows, and of bytes written.

    Raises:
        UserError: the file cannot be read, is damaged or changed since it was listed; the disk is full.
    """
    if is_unpacked(task):
        return task.rows, 0
    task.record.parent.mkdir(parents=True, exist_ok=True)
    sizes: list[int] = []
    extensions: list[str] = []
    try:
        with written_aside(task.record) as record:
            with open(record.with_name(task.bytes_file.name), "wb") as out:
                for image in _images(task):
                    sizes.append(-1 if image is None else len(image))
                    extensions.append(images.extension_of(bytes(image[:16])) if image else "")
                    out.write(image or b"")
            os.utime(out.name, ns=(_mtime_ns(task.source),) * 2)
            if not any(size > 0 for size in sizes) and sizes:
                raise UserError(
                    f"No row of {task.source.path} has the bytes of its image: they name files that are not in it. Use "
                    f"a copy that holds the images, or convert those files."
                )
            source = [Path(task.source.path).name, task.source.size, task.source.mtime_ns]
            record.write_text(
                json.dumps({"source": source, "column": task.columns.image, "sizes": sizes, "extensions": extensions})
            )
    except OSError as error:
        if disk_is_full(error):
            raise UserError(
                f"The disk of {task.record.parent} is full. Free some space and run the same command again: what is "
                f"unpacked is kept."
            ) from None
        raise UserError(f"{task.bytes_file} cannot be written ({error.strerror}).") from None
    return task.rows, sum(max(size, 0) for size in sizes)


def _mtime_ns(source: SourceFile) -> int:
    """In whole seconds, which every file system can keep."""
    return source.mtime_ns // 10**9 * 10**9


def _images(task: Unpack) -> Iterable[memoryview | None]:
    """The images of a file, row group by row group."""
    path, column = task.source.path, task.columns.image
    rows = 0
    with task.source.opened():  # a file that changes meanwhile is an error
        try:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as parquet:
                wanted = [f"{column}.bytes" if task.columns.nested else column]
                for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=wanted, use_threads=False):
                    values = batch.column(0)
                    if task.columns.nested:
                        values = values.flatten()[0]
                    for value in values:
                        yield None if (buffer := value.as_buffer()) is None else memoryview(buffer)
                    rows += len(values)
        except pa.ArrowException as error:
            raise damaged(path, error) from None
        except OSError as error:
            raise UserError(f"The source {path} cannot be read ({error.strerror or error}).") from None
    if rows != task.rows:
        raise UserError(
            f"{path} has {rows} rows, and {task.rows} of them have labels: it is damaged. Download it again."
        )


def remove_unpacked(files: Iterable[Unpack]) -> None:
    """Remove the unpacked images; their records stay."""
    for file in files:
        file.bytes_file.unlink(missing_ok=True)
