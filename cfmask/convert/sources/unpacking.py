"""Unpacks the images of Parquet files once, each Parquet file into one flat file, before they are shuffled into shards.

    OUT/.unpacked/imagenet-0123abcd/train-00000.json          record: size and kind of each image; it is written last
                                    train-00000.json.bytes    the images, one after the other; removed at the end

A shard has samples from all over the set, and a row of a Parquet file cannot be read without the rows near it: without
this step, each file would be decompressed hundreds of times. The records are small and are kept, so that the same
command knows the plan of a finished set without unpacking it again. An unpacked file has the modification time of its
Parquet file, so unpacking again gives an identical file.
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

from cfmask.convert.sources.parquet_files import Columns, ParquetTable, damaged
from cfmask.data import images
from cfmask.data.blobs import Blob, SourceFile
from cfmask.errors import UserError
from cfmask.runtime.files import disk_is_full, written_aside

_ROWS_AT_ONCE = 32
"""Rows in memory at a time, for row groups of any size."""


@dataclass(frozen=True)
class UnpackTask:
    """A Parquet file to unpack.

    num_bytes: estimate for its images.
    record: path of the record to write.
    """

    source: SourceFile
    columns: Columns
    rows: int
    num_bytes: int
    record: Path

    @classmethod
    def of(cls, table: ParquetTable, folder: Path) -> UnpackTask:
        record = folder / f"{table.split}-{table.number:05d}.json"
        return cls(table.file, table.columns, len(table.labels), table.num_bytes, record)

    @property
    def bytes_file(self) -> Path:
        return self.record.with_name(f"{self.record.name}.bytes")


@dataclass(frozen=True)
class Unpacked:
    """A record.

    blobs: the image of each row; None if the row has none.
    extensions: of each image, by its content; "" if unknown.
    """

    blobs: list[Blob | None]
    extensions: list[str]


def unpack_folder(out: Path, kind: str, source: Path) -> Path:
    """Where a source is unpacked. Each source has its own folder: several may be converted below one ``out``."""
    return out / ".unpacked" / f"{kind}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}"


def read_record(task: UnpackTask) -> Unpacked | None:
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


def is_unpacked(task: UnpackTask) -> bool:
    """Whether the images exist, not only the record."""
    try:
        status = os.stat(task.bytes_file)
    except OSError:
        return False
    record = read_record(task)
    first = next((blob for blob in record.blobs if blob), None) if record else None
    return record is not None and (first is None or first.file == SourceFile.of(task.bytes_file, status))


def pending(tasks: Sequence[UnpackTask], needed: Callable[[], Iterable[str]]) -> list[UnpackTask]:
    """The tasks of a set to do next.

    Args:
        needed: paths of the unpacked files to be read. Called once all records exist.
    """
    if unknown := [task for task in tasks if read_record(task) is None]:
        return unknown
    paths = set(needed()) if tasks else set()
    return [task for task in tasks if str(task.bytes_file) in paths and not is_unpacked(task)]


def unpack(task: UnpackTask) -> tuple[int, int]:
    """Unpack one file, unless it is unpacked already.

    Returns:
        Numbers of rows, and of bytes written.
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
            if sizes and max(sizes) <= 0:
                raise UserError(
                    f"No row of {task.source.path} has the bytes of its image: the rows name files outside it. Use a "
                    f"copy that holds the images, or convert those files."
                )
            source = [Path(task.source.path).name, task.source.size, task.source.mtime_ns]
            record.write_text(
                json.dumps({"source": source, "column": task.columns.image, "sizes": sizes, "extensions": extensions})
            )
    except OSError as error:
        if disk_is_full(error):
            raise UserError(
                f"The disk of {task.record.parent} is full. Free some space and run the same command again: unpacked "
                f"files are kept."
            ) from None
        raise UserError(f"{task.bytes_file} cannot be written ({error.strerror}).") from None
    return task.rows, sum(max(size, 0) for size in sizes)


def _mtime_ns(source: SourceFile) -> int:
    """In whole seconds, which every file system can store."""
    return source.mtime_ns // 10**9 * 10**9


def _images(task: UnpackTask) -> Iterable[memoryview | None]:
    """The images of a file, row group by row group."""
    path, column = task.source.path, task.columns.image
    rows = 0
    with task.source.opened():  # raises if the file changes meanwhile
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
        raise UserError(f"{path} has {rows} images and {task.rows} labels: it is damaged. Download it again.")


def remove_unpacked(tasks: Iterable[UnpackTask]) -> None:
    """Remove the unpacked images; the records are kept."""
    for task in tasks:
        task.bytes_file.unlink(missing_ok=True)
