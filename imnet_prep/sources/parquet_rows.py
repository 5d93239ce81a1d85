"""Take the images out of a Parquet file, with pyarrow. Memory holds a few rows, however large a row group is."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from imnet_prep.errors import SourceError
from imnet_prep.images.formats import sniff
from imnet_prep.sources.base import meta_text
from imnet_prep.sources.staging import check_room
from imnet_prep.types import ImageFault, Progress, ProgressCallback

BLOB, LISTED = "images.bin", "rows.jsonl"
START = b"IMAGES\r\n"  # of the flat file: no image begins at byte 0, which means a file of its own
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes", "content")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "class_name", "category", "target", "wnid", "synset")
_BATCH_BYTES = 4 << 20  # of images in memory at a time; larger blocks would be mapped anew for each
_MAX_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20  # of each column that is read
_SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


def _pyarrow(part: str = "") -> Any:
    try:
        return import_module(f"pyarrow{part}")
    except ImportError as error:
        raise SourceError(
            "Parquet files need pyarrow, which cannot be loaded",
            got=str(error).splitlines()[0],
            remedy="pip install 'imnet-prep[parquet]'",
        ) from error


@contextmanager
def _opened(path: Path, given: str) -> Iterator[Any]:
    """Open a file, and turn what pyarrow raises for a damaged one into one line."""
    pa = _pyarrow()
    try:
        with _pyarrow(".parquet").ParquetFile(
            path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as file:
            yield file
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise SourceError(
            f"{given} is not a whole Parquet file",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="download it again",
        ) from error


def holds_images(path: Path) -> bool:
    """Return whether a Parquet file has a column of images."""
    with _opened(path, str(path)) as file:
        return bool(_image_columns(file.schema_arrow))


def extract(path: Path, given: str, folder: Path, progress: ProgressCallback) -> dict[str, Any]:
    """Write the images of a file to one flat file, and the rest of each row to a list.

    A line of the list is the JSON of ``[size, label, name, meta]``: size is that in the flat file, or -1 - size without
    an image; label is a number, a text or null; name is the base name in the file, or a suffix such as ``.jpg`` where
    it has none.

    Args:
        path: The file.
        given: What it was given as, for messages.
        folder: Where to write.
        progress: Called with the rows read.

    Returns:
        The number of ``rows`` and the ``columns``: ``image``, ``label`` (or None), its ``kind`` (``number`` or
        ``text``), its ``names`` (or None), and the ``others``.

    Raises:
        SourceError: It is damaged, has no column of images, or holds only their paths; the disk has no room.
    """
    with _opened(path, given) as file:
        columns = _columns(file.schema_arrow, given)
        check_room(folder, path.stat().st_size, given)
        total, rows, images = file.metadata.num_rows, 0, 0
        mean = max(1, path.stat().st_size // max(1, total))
        size = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // mean))
        wanted = [columns["image"], columns["label"], *columns["others"]]
        batches = file.iter_batches(size, columns=[name for name in wanted if name is not None])
        with (
            (folder / BLOB).open("xb") as blob,
            (folder / LISTED).open("x", encoding="utf-8", newline="\n") as listed,
            ThreadPoolExecutor(1) as thread,  # writes while the next rows are read and decompressed
        ):
            written = thread.submit(blob.write, START)
            for batch in batches:
                data, lines = _lines(batch, columns)
                images += sum(line[0] >= 0 for line in lines)
                listed.writelines(f"{json.dumps(line)}\n" for line in lines)
                rows += len(lines)
                written.result()
                progress(Progress(rows, total, "rows", blob.tell(), note=path.name))
                written = thread.submit(blob.write, data)
            written.result()
    if rows != total:
        raise SourceError(f"{given} is damaged", expected=f"{total} rows", got=str(rows), remedy="download it again")
    if rows and not images:
        raise SourceError(
            f"{given} holds no images: all of column {columns['image']!r} are null",
            expected="the bytes of the images in the file",
            remedy="embed them: datasets.table.embed_table_storage does it in a batched map",
        )
    return {"rows": rows, "columns": columns}


def _lines(batch: Any, columns: dict[str, Any]) -> tuple[memoryview, list[list[Any]]]:
    """Return the images of some rows, one after another, and the lines of the rows."""
    pa, compute = _pyarrow(), _pyarrow(".compute")
    image = batch.column(columns["image"])
    paths: Sequence[str | None] = [None] * len(batch)
    if pa.types.is_struct(image.type):
        names = [field.name for field in image.type]
        if "path" in names:
            paths = compute.struct_field(image, "path").to_pylist()
        image = compute.struct_field(image, "bytes")
    image = image.cast(pa.large_binary())
    _, offsets, data = image.buffers()
    ends = np.frombuffer(offsets, np.int64)[image.offset : image.offset + len(image) + 1]
    whole = memoryview(data) if data is not None else memoryview(b"")
    sizes = np.where(np.asarray(image.is_valid()), np.diff(ends), -1 - np.diff(ends)).tolist()
    labels: Sequence[Any] = (
        [None] * len(batch) if columns["label"] is None else batch.column(columns["label"]).to_pylist()
    )
    others = {name: batch.column(name).to_pylist() for name in columns["others"]}
    lines: list[list[Any]] = []
    for row, (size, label, path) in enumerate(zip(sizes, labels, paths, strict=True)):
        base = (path or "").replace("\\", "/").rstrip("/").rpartition("/")[2]
        if not base or base.startswith("."):
            base = _suffix(bytes(whole[ends[row] : ends[row] + 64]))
        meta = meta_text({name: values[row] for name, values in others.items()}) if others else ""
        lines.append([size, label, base, meta])
    return whole[ends[0] : ends[-1]], lines


def _suffix(data: bytes) -> str:
    try:
        return _SUFFIX.get(sniff(data), ".img")
    except ImageFault:
        return ".img"


# --- columns ---------------------------------------------------------------------------------------------------------


def _columns(schema: Any, given: str) -> dict[str, Any]:
    """Choose the columns by the features of Hugging Face, else by type and name."""
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise SourceError(f"{given} has two columns of one name", got=twice[0], remedy="rename one")
    features = _features(schema)
    images = _image_columns(schema)
    marked = [name for name in images if features.get(name, {}).get("_type") == "Image"]
    image = _choose(images, marked, _IMAGE_NAMES)
    if image is None:
        raise SourceError(
            f"{given} has no column of images that can be told by type and name",
            expected="one struct with bytes, or one binary column, or one of several that is called image",
            got=", ".join(f"{field.name} ({_short(field.type)})" for field in schema) or "no column",
            remedy="rename the column",
        )
    scalars = [field.name for field in schema if field.name not in images and _kind(field.type)]
    possible = [name for name in scalars if _kind(schema.field(name).type) in ("number", "text")]
    marked = [name for name in possible if features.get(name, {}).get("_type") == "ClassLabel"]
    label = _choose(possible, marked, _LABEL_NAMES)
    names = features.get(label or "", {}).get("names")
    return {
        "image": image,
        "label": label,
        "kind": _kind(schema.field(label).type) if label is not None else None,
        "names": [str(name) for name in names] if isinstance(names, list) and names else None,
        "others": [name for name in scalars if name != label],
    }


def _features(schema: Any) -> dict[str, Any]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _image_columns(schema: Any) -> list[str]:
    types = _pyarrow().types

    def is_binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))

    return [
        field.name
        for field in schema
        if is_binary(field.type)
        or (types.is_struct(field.type) and any(part.name == "bytes" and is_binary(part.type) for part in field.type))
    ]


def _kind(kind: Any) -> str:
    """Return ``number`` or ``text`` for what can be a class, ``scalar`` for other small values, else nothing."""
    types = _pyarrow().types
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_integer(kind):
        return "number"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    return "scalar" if types.is_floating(kind) or types.is_boolean(kind) else ""


def _choose(possible: Sequence[str], marked: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column that is marked, if one is; else the first of a known name; else the only possible one."""
    among = marked or possible
    if len(among) == 1:
        return among[0]
    by_name = {name.lower(): name for name in reversed(among)}
    return next((by_name[name] for name in names if name in by_name), None)


def _short(kind: Any) -> str:
    return text if len(text := str(kind)) < 40 else text[:36] + "..."
