"""Parquet files like the Hugging Face hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_parquet(
    path: Path,
    rows: list[tuple[bytes | None, str | None, Any]],
    *,
    names: list[str] | None = None,
    label: str = "label",
    label_type: pa.DataType | None = None,
    group: int = 3,
    more: dict[str, pa.Array] | None = None,
) -> Path:
    """rows: bytes and path of the image, label. names: of the classes, for the metadata. group: rows in a row group."""
    images = pa.array(
        [None if data is None and name is None else {"bytes": data, "path": name} for data, name, _ in rows],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    labels = pa.array([value for *_, value in rows], label_type or (pa.int64() if names is not None else None))
    table = pa.table({"image": images, label: labels, **(more or {})})
    if names is not None:
        features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path
