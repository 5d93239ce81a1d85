"""Parquet files for tests, with the schema that the ``datasets`` package writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = tuple[str, str | None, bytes | None]  # class, path, bytes


def rows_of(folder: Path) -> list[Row]:
    """Return the images of ``<folder>/<class>/<image>``, class by class."""
    return [(path.parent.name, path.name, path.read_bytes()) for path in sorted(folder.glob("*/*"))]


def write_parquet(
    path: Path,
    rows: Sequence[Row],
    names: Sequence[str] | None = None,
    *,
    labels: Sequence[Any] | None = None,
    others: Mapping[str, Sequence[Any]] | None = None,
    image: str = "image",
    label: str = "label",
    **options: Any,
) -> Path:
    """Write rows as ``datasets`` does: a struct of bytes and path, a ClassLabel with its names in the schema.

    Args:
        path: The file; its folder is made.
        rows: Class, path and bytes of each image.
        names: The class names in label order; by default those of the rows, sorted.
        labels: What to write in place of each row's number.
        others: Further columns.
        image: The name of the column of images. label: Likewise.
        options: For pyarrow's ``write_table``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = sorted({row[0] for row in rows}) if names is None else names
    features: dict[str, Any] = {image: {"_type": "Image"}}
    if names:
        features[label] = {"names": list(names), "_type": "ClassLabel"}
    columns = {
        image: pa.array(
            [None if name is None and data is None else {"bytes": data, "path": name} for _, name, data in rows],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        label: pa.array([names.index(row[0]) for row in rows] if labels is None else list(labels)),
        **{name: pa.array(list(values)) for name, values in (others or {}).items()},
    }
    table = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path, **options)
    return path
