"""Read and check the manifest of a records folder, which lists its contents down to the digest of each file.

``manifest.json`` is written last, so a folder that has one is complete. It stores no time, host or path: the same
input, seed and options give the same bytes. ``records.jsonl.gz`` beside each split's shards has one line per record.
Source: ``manifests/records.schema.json`` and ``docs/manifest.md`` define the file formats.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from imnet_prep import catalog
from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import open_plain
from imnet_prep.records.record_list import RECORDS
from imnet_prep.types import ShardInfo

FORMAT = "imnet-prep/records"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MIN_ROW_BYTES = 16  # the minimum size of a row in a data file: two lengths
COLUMNS = {"file_name": "string", "image": "bytes", "label": "int32"}  # ImageNetToMR's, so any MindDataset reads them


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """One split of a records folder.

    Attributes:
        found: Number of images in the source: ``images`` plus the sum of ``rejected``.
        images: Number of records.
        rejected: Number of images by :class:`~imnet_prep.types.Reason`.
        changes: Number of images by :class:`~imnet_prep.types.Change`.
        duplicates: Number of records with the same source bytes as an earlier record.
        class_counts: Number of images by label.
        header_size: Bytes reserved for the header of each data file.
        page_size: Size of a page in bytes, the same in every shard.
        records: Name, size and digest of ``records.jsonl.gz``.
        shards: The data files, in reading order.
    """

    found: int
    images: int
    rejected: dict[str, int]
    changes: dict[str, int]
    duplicates: int
    class_counts: tuple[int, ...]
    header_size: int
    page_size: int
    records: dict[str, Any]
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of ``manifest.json``.

    ``plan`` is the digest of the plan (empty for adopted files); ``columns`` are the fields of the data files;
    ``rejected`` is name, size and digest of ``rejected.jsonl`` (empty without one); ``digest`` is the SHA-256 (hex) of
    the bytes of the manifest, empty if it is not yet written.
    """

    classes: tuple[str, ...]
    class_words: tuple[str, ...]
    label_space: str
    label_convention: str
    seed: int
    options: dict[str, Any]
    sources: tuple[dict[str, Any], ...]
    made_with: dict[str, str]
    plan: str
    splits: dict[str, SplitInfo]
    columns: dict[str, str] = field(default_factory=lambda: dict(COLUMNS))
    rejected: dict[str, Any] = field(default_factory=dict)
    digest: str = field(default="", compare=False)

    def to_bytes(self) -> bytes:
        """Return the bytes of ``manifest.json``: sorted keys, an indent of two spaces, a final newline."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "classes": [
                {"name": name, "words": words} for name, words in zip(self.classes, self.class_words, strict=True)
            ],
            "columns": self.columns,
            "label_space": self.label_space,
            "label_convention": self.label_convention,
            "seed": self.seed,
            "options": self.options,
            "sources": list(self.sources),
            "made_with": self.made_with,
            "plan": self.plan,
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            **({"rejected": self.rejected} if self.rejected else {}),
        }
        return _canonical({**document, "self_sha256": _self_digest(document)})

    def split(self, records: Path | str, name: str) -> SplitInfo:
        """Return a split that has images.

        Raises:
            RecordsError: The folder has no such split, or it is empty; the message lists the splits it has.
        """
        found = self.splits.get(name)
        if found is None or not found.images:
            there = ", ".join(f"{key} ({value.images} images)" for key, value in self.splits.items())
            raise RecordsError(f"{records}: no images in split {name!r}", expected=f"one of: {there}")
        return found


def _canonical(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _self_digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of the canonical bytes without the digest itself; it detects edits by hand."""
    rest = {key: value for key, value in document.items() if key != "self_sha256"}
    return hashlib.sha256(_canonical(rest)).hexdigest()


def load_manifest(records: Path) -> Manifest:
    """Read and check the manifest of a records folder.

    Raises:
        RecordsError: No such folder, no manifest in it, or another format version.
        IntegrityError: The manifest is damaged or was changed.
    """
    path = records / MANIFEST
    try:
        with open_plain(path) as file:
            return parse_manifest(file.read(), str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(records) from error
    except OSError as error:
        raise RecordsError(f"{path}: cannot be read", got=error.strerror or str(error)) from error


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Check the bytes of a manifest.

    Args:
        data: The bytes.
        path: Where they were read, for messages.

    Raises:
        RecordsError: Another format version.
        IntegrityError: The manifest is damaged or was changed.
    """
    remedy = "restore the file, or convert again"
    try:
        document = json.loads(data)
        canonical = _canonical(document)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not JSON", got=str(error), remedy=remedy) from error
    said = document if isinstance(document, dict) else {"format": type(document).__name__}
    if (said.get("format"), said.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise RecordsError(
            f"{path}: this version cannot read the manifest",
            expected=f"{FORMAT} version {FORMAT_VERSION}",
            got=f"{said.get('format')} version {said.get('format_version')}",
            remedy="use the imnet-prep that wrote it, or convert again",
        )
    _check_schema(path, document)
    if document["self_sha256"] != _self_digest(document) or data != canonical:
        raise IntegrityError(
            f"{path}: was changed after it was written",
            expected=f"self_sha256 {document['self_sha256'][:12]}",
            got=_self_digest(document)[:12],
            remedy=remedy,
        )
    manifest = _from_document(document, hashlib.sha256(data).hexdigest())
    if wrong := _contradiction(manifest):
        raise IntegrityError(f"{path}: contradicts itself", got=wrong, remedy=remedy)
    return manifest


def _contradiction(manifest: Manifest) -> str:
    """Return the first contradiction among the numbers of a manifest, or an empty string: readers rely on them."""
    files = [shard.file for split in manifest.splits.values() for shard in split.shards]
    for what, items in (("shard", files), ("class", manifest.classes)):
        if len(set(items)) != len(items):
            return f"a {what} is listed twice"
    for name, split in manifest.splits.items():
        rows, labelled = sum(shard.rows for shard in split.shards), sum(split.class_counts)
        checks = (
            (rows == split.images, f"{split.images} images, but its shards have {rows} rows"),
            (
                split.found == split.images + sum(split.rejected.values()),
                f"found {split.found} is not images + rejected",
            ),
            (len(split.class_counts) == len(manifest.classes), f"{len(split.class_counts)} class_counts"),
            (
                labelled == split.images or (name == "test" and labelled < split.images),
                f"{split.images} images, but class_counts add to {labelled}",
            ),
            (split.records["file"] == f"{name}/{RECORDS}", f"a record list {split.records['file']}"),
            (
                all(shard.file.startswith(f"{name}/") or "/" not in shard.file for shard in split.shards),
                "a shard in the folder of another split",
            ),
            (
                all(shard.rows * MIN_ROW_BYTES <= shard.size_bytes for shard in split.shards),
                "a shard with more rows than its bytes can hold",
            ),
        )
        if wrong := [text for good, text in checks if not good]:
            return f"split {name}: {wrong[0]}"
    return ""


def _missing(records: Path) -> RecordsError:
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(records)):  # a path has lost one of the slashes
        remedy = "only verify, info, bench, mbv2 train and mbv2 eval read records behind a URL: copy them to a folder"
        return RecordsError(f"{records}: a URL", expected="a folder", remedy=remedy)
    if not records.is_dir():
        return RecordsError(f"{records}: no such folder", expected="a folder made by `imnet-prep to-mindrecord`")
    unfinished = "an unfinished conversion: run the same to-mindrecord command again"
    return RecordsError(
        f"{records}: no {MANIFEST} in this folder",
        got=unfinished if records.name.endswith(".partial") else "",
        remedy="convert with `imnet-prep to-mindrecord`, or `imnet-prep adopt` MindRecord files that others made",
    )


def _check_schema(path: str, document: dict[str, Any]) -> None:
    import jsonschema  # ~0.1 s to import, so not with the module

    draft = jsonschema.Draft202012Validator
    whole = draft.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)  # by the draft 3.0 is one, too
    validator = jsonschema.validators.extend(draft, type_checker=whole)(dict(catalog.manifest_schema()))
    error = next(iter(validator.iter_errors(document)), None)
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "the document"
        raise IntegrityError(f"{path}: {where} is not as the format says", got=error.message[:200])


def _from_document(document: dict[str, Any], digest: str) -> Manifest:
    return Manifest(
        classes=tuple(entry["name"] for entry in document["classes"]),
        class_words=tuple(entry["words"] for entry in document["classes"]),
        label_space=document["label_space"],
        label_convention=document["label_convention"],
        seed=document["seed"],
        options=document["options"],
        sources=tuple(document["sources"]),
        made_with=document["made_with"],
        plan=document["plan"],
        splits={name: _split_from(entry) for name, entry in document["splits"].items()},
        columns=document["columns"],
        rejected=document.get("rejected", {}),
        digest=digest,
    )


def _split_from(entry: dict[str, Any]) -> SplitInfo:
    shards = tuple(ShardInfo(**_known(ShardInfo, shard)) for shard in entry["shards"])
    return SplitInfo(**{**_known(SplitInfo, entry), "class_counts": tuple(entry["class_counts"]), "shards": shards})


def _known(kind: type, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a type. Additions of later versions are ignored; others change the format version."""
    return {field.name: entry[field.name] for field in fields(kind)}
