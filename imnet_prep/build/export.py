"""Export the images of a records folder to class folders or WebDataset tars: the way back.

Everything is written to ``<out>.partial``, which is renamed at the end. An interrupted export starts over.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imnet_prep.build.export_formats import FORMATS, ClassFolders, Names, Tars, Writer
from imnet_prep.build.reshard import MultisetHash
from imnet_prep.build.workdir import refuse_url
from imnet_prep.errors import IntegrityError, Interrupted, PlanError
from imnet_prep.files import exclusive_lock, flush_all, write_atomically
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.publish import Move, finish, publish, refuse_inside_records, remove
from imnet_prep.records.record_list import RecordLine
from imnet_prep.types import Progress, ProgressCallback, Stop

NOTE = "export.json"  # in an exported folder: what it was made from
_REPORT_EVERY = 64
_TAR_OVERHEAD = 4 * 1024  # bytes of a sample beyond its image: three headers, the padding, label and JSON
_FILE_OVERHEAD = 4096


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The result of an export.

    Attributes:
        path: The folder. to: Its format.
        images: By split.
        size_bytes: Of the images.
        proof: The digest of all records, as resharding computes it.
        renamed: Images whose file has another name than their record, as not every file system can hold that.
        seconds: The duration of this run.
        already_done: The folder was there before.
    """

    path: Path
    to: str
    images: Mapping[str, int]
    size_bytes: int
    proof: str
    renamed: int
    seconds: float
    already_done: bool

    def note(self) -> dict[str, Any]:
        """Return what the folder itself says of the export."""
        return {
            "format": self.to, "images": dict(self.images), "bytes": self.size_bytes, "proof": self.proof,
            "renamed": self.renamed,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        total = {"images": sum(self.images.values()), "splits": dict(self.images), "out": str(self.path)}
        return {**self.note(), **total, "seconds": round(self.seconds, 3), "already_done": self.already_done}


def export(
    records: Path,
    out: Path,
    to: str,
    split: str | None,
    progress: ProgressCallback,
    stop: Stop = lambda: False,
) -> ExportResult:
    """Write the images of a records folder as other tools read them, byte for byte as stored.

    Args:
        records: The records folder.
        out: The folder to write, which must not exist yet.
        to: ``imagefolder`` (``<split>/<class>/<name>``) or ``webdataset`` (tars of image, ``.cls`` and ``.json``).
        split: The only split to export, or None for all.
        progress: Called with the number of images written.
        stop: Returns whether to stop.

    Raises:
        RecordsError: The records folder is missing, or cannot be read.
        IntegrityError: A record is not what was stored, or the written files are not all there.
        PlanError: ``out`` exists, cannot be written, or the disk is full; unknown format or split.
        Interrupted: ``stop`` returned True; nothing is left.
    """
    started = time.monotonic()
    if to not in FORMATS:
        raise PlanError("unknown --to", expected=" or ".join(FORMATS), got=to)
    folder = RecordsFolder.open(records)
    splits = [name for name in folder.manifest.splits if split in (None, name)]
    if not splits:
        have = ", ".join(folder.manifest.splits)
        raise PlanError(f"{records}: has no {split} split", expected=have, got=str(split))
    refuse_url(out)
    target = out.absolute()
    partial, lock, journal = (
        target.with_name(target.name + ending) for ending in (".partial", ".partial.lock", ".partial.publish")
    )
    refuse_inside_records(target)
    with _named_failures(target):
        _done(target)  # or refuse, before anything is made
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(lock):
            finish(journal, among=(partial, target))
            if (done := _done(target)) is not None:
                return _same(target, done, folder, splits, to, started)
            if os.path.lexists(partial) and not _is_ours(partial):
                raise PlanError(f"{partial}: holds files that no export made", remedy="choose another --out")
            remove(partial)
            partial.mkdir()
            try:
                (partial / f".{NOTE}").touch()  # marks the folder as ours
                result = _Export(folder, partial, target, to, splits, progress, stop).run(started)
                write_atomically(partial / NOTE, json.dumps(result.note(), indent=1, sort_keys=True).encode() + b"\n")
                remove(partial / f".{NOTE}")
                flush_all(partial)
                with suppress(FileNotFoundError):
                    target.rmdir()  # an empty folder
                publish(journal, [Move(partial, target)])
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return result


def _done(out: Path) -> dict[str, Any] | None:
    """Return the note of a finished export, or None where there is nothing.

    Raises:
        PlanError: There is something else.
    """
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return None
    with suppress(OSError, ValueError):
        note = json.loads((out / NOTE).read_bytes())
        if isinstance(note, dict) and note.get("format") in FORMATS:
            return note
    raise PlanError(f"{out}: already exists", remedy="choose another --out, or delete it yourself")


def _same(
    out: Path, note: dict[str, Any], folder: RecordsFolder, splits: list[str], to: str, started: float
) -> ExportResult:
    """Return the result of a finished export of the same records.

    Raises:
        PlanError: It is another one.
    """
    expected = sum((record[1] for name in splits for record in _listed(folder, name)), MultisetHash())
    if (note.get("format"), note.get("proof")) != (to, expected.digest):
        raise PlanError(
            f"{out}: holds another export",
            expected=f"{to} of {expected.records} records of digest {expected.digest[:16]}",
            got=f"{note.get('format')} of {str(note.get('proof'))[:16]}",
            remedy="choose another --out, or delete it yourself",
        )
    images = {name: folder.manifest.splits[name].images for name in splits}
    size_bytes, renamed = int(note.get("bytes", 0)), int(note.get("renamed", 0))
    seconds = time.monotonic() - started
    return ExportResult(out, to, images, size_bytes, expected.digest, renamed, seconds, already_done=True)


def _is_ours(partial: Path) -> bool:
    """Return whether an export made the folder; only then may it be deleted."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return any((partial / name).is_file() for name in (f".{NOTE}", NOTE)) or not any(partial.iterdir())


def _listed(folder: RecordsFolder, split: str) -> Iterator[tuple[RecordLine, MultisetHash]]:
    """Yield the records of a split with their hashes."""
    classes = folder.manifest.classes
    for line in folder.lines(split):
        class_name = classes[line.label] if 0 <= line.label < len(classes) else ""
        yield line, MultisetHash.of(split, class_name, line.file_name, line.sha256)


@contextmanager
def _named_failures(out: Path) -> Iterator[None]:
    """Turn an error of the file system into one line."""
    try:
        yield
    except BlockingIOError as error:
        raise PlanError(f"{out}.partial: another export is at work", remedy="wait for it, or stop it") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else "cannot be written or read"
        raise PlanError(
            f"{error.filename or out}: {what}",
            got=error.strerror or str(error),
            remedy="nothing was left; run it again",
        ) from error


@dataclass(slots=True)
class _Export:
    """An export in progress."""

    folder: RecordsFolder
    partial: Path
    target: Path
    to: str
    splits: list[str]
    progress: ProgressCallback
    stop: Stop
    images: Counter[str] = field(default_factory=Counter)
    size_bytes: int = 0
    renamed: int = 0
    proof: MultisetHash = field(default_factory=MultisetHash)

    def run(self, started: float) -> ExportResult:
        self._check_space()
        classes, is_folders = self.folder.manifest.classes, self.to == "imagefolder"
        writer: Writer = ClassFolders(self.partial) if is_folders else Tars(self.partial, classes)
        with closing(writer):
            for split in self.splits:
                self.folder.check_list(split)
                names = Names(self.folder, split, self.to)
                for position, (line, record) in enumerate(_listed(self.folder, split), self.folder.span(split).start):
                    if self.images.total() % _REPORT_EVERY == 0:
                        self._report()
                    image, path = self._image(position, line), names.path(line)
                    writer.write(split, path, image, line)
                    self.images[split] += 1
                    self.size_bytes += len(image)
                    self.renamed += is_folders and path != line.file_name
                    self.proof += record
                writer.end_split(split, self.images[split])
        self._report()
        return ExportResult(
            self.target, self.to, dict(self.images), self.size_bytes, self.proof.digest, self.renamed,
            time.monotonic() - started, already_done=False,
        )  # fmt: skip

    def _report(self) -> None:
        if self.stop():
            raise Interrupted("stopped; nothing was left", remedy="run the same command again to start over")
        self.progress(Progress(self.images.total(), self._total, "images", self.size_bytes))

    @property
    def _total(self) -> int:
        return sum(self.folder.manifest.splits[split].images for split in self.splits)

    def _image(self, position: int, line: RecordLine) -> bytes:
        """Read an image, and compare it with its digest."""
        row = self.folder.row(position)
        image = row.image
        if hashlib.sha256(image).hexdigest() != line.sha256:
            raise IntegrityError(
                f"{self.folder.path / row.file}: row {row.row} ({line.file_name}) is not what was stored",
                expected=f"SHA-256 {line.sha256[:12]}",
                got="other bytes",
                remedy="`imnet-prep verify` lists the damage, `imnet-prep repair-index` repairs what it can",
            )
        return image

    def _check_space(self) -> None:
        """Check that the disk has room for all images; their shards are about as large."""
        stored = sum(s.size_bytes for split in self.splits for s in self.folder.manifest.splits[split].shards)
        needed = stored + self._total * (_FILE_OVERHEAD if self.to == "imagefolder" else _TAR_OVERHEAD) // 2
        if needed > (free := shutil.disk_usage(self.partial).free):
            raise OSError(errno.ENOSPC, f"about {needed:,} bytes are needed, {free:,} are free", str(self.target))
