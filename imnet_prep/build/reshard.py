"""Write the records of some folders into other shards: merge folders, select or rename classes.

This is a conversion whose source is records. It uses the same plan, so the result depends only on the records. No image
is encoded again. A hash of all records that does not depend on their order is computed from the lists before, and from
the written files afterwards: equal hashes prove that every record arrived unchanged.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from imnet_prep.build.job import ConvertResult, Job, run_job
from imnet_prep.build.options import ConvertOptions, PlanOptions, read_names, read_renames
from imnet_prep.build.plan import Plan, make_plan
from imnet_prep.build.workdir import PLAN_FRESH, Workdir
from imnet_prep.errors import IntegrityError, PlanError
from imnet_prep.images.check import ValidateOptions
from imnet_prep.process_pool import worker_count
from imnet_prep.records.check import check_shard
from imnet_prep.records.folder import RecordsFolder, Row, map_rows
from imnet_prep.records.manifest import Manifest
from imnet_prep.records.record_list import RecordLine
from imnet_prep.sources import Found
from imnet_prep.types import ImageRef, ProgressCallback, Stop

_MODULUS = 1 << 256


@dataclass(frozen=True, slots=True)
class ReshardOptions:
    """The options of resharding.

    Attributes:
        shards: Number of shards per split, or None for the usual number.
        seed: Determines the order; None takes the first folder's.
        keep_classes: The path of a file of class names to keep, or None for all.
        rename_classes: The path of a file of ``old<TAB>new`` class names, or None.
        workers: Worker processes; None for one per core. The result does not depend on it.
        force: Replace a finished folder once the new one is whole.
    """

    shards: int | None = None
    seed: int | None = None
    keep_classes: Path | None = None
    rename_classes: Path | None = None
    workers: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class MultisetHash:
    """A hash of a multiset of (split, class, file_name, SHA-256 of the image), which does not depend on their order.

    Source: Clarke et al., "Incremental multiset hash functions", 2003, section 4 (MSet-Add-Hash).

    Attributes:
        records: Number of records.
        total: The sum modulo 2^256 of the SHA-256 of each record.
    """

    records: int = 0
    total: int = 0

    @classmethod
    def of(cls, split: str, class_name: str, file_name: str, sha256: str) -> Self:
        """Return the hash of one record."""
        return cls(
            1,
            int.from_bytes(hashlib.sha256(json.dumps([split, class_name, file_name, sha256]).encode()).digest(), "big"),
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(self.records + other.records, (self.total + other.total) % _MODULUS)

    @property
    def digest(self) -> str:
        """The sum in hex."""
        return f"{self.total:064x}"


@dataclass(frozen=True, slots=True)
class ReshardResult:
    """The result of resharding.

    Attributes:
        built: The folder.
        written: The hash of its records.
        labels_unchanged: Every class has the label that it had before.
    """

    built: ConvertResult
    written: MultisetHash
    labels_unchanged: bool

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        built = self.built.to_json()
        return {
            "images": self.written.records,
            "proof": self.written.digest,
            "labels_unchanged": self.labels_unchanged,
            **{name: built[name] for name in ("shards", "bytes", "seconds", "manifest", "already_done")},
        }


def reshard(
    folders: Sequence[Path],
    out: Path,
    options: ReshardOptions,
    progress: ProgressCallback,
    stop: Stop = lambda: False,
) -> ReshardResult:
    """Write the records of some folders into new shards.

    Args:
        folders: Records folders, in any order.
        out: The records folder to write.
        options: What to change.
        progress: Called with the number of records found, written and read again.
        stop: Returns whether to stop once the shards in progress are finished.

    Raises:
        RecordsError: A folder is missing or has no manifest.
        IntegrityError: A folder is damaged, or the written records differ from those read.
        PlanError: ``out`` is in use or holds other files; two records have the same name.
        Interrupted: ``stop`` returned True; the same command continues.
    """
    job = _RecordsJob(folders, options, progress)
    size = sum(shard.size_bytes for item in job.inputs for _, _, shard in item.shards)
    built = run_job(
        job, out, ConvertOptions(worker_count(options.workers, size), "100%", force=options.force), progress, stop
    )
    if built.already_done:
        job.verify_written(out, built.manifest)
    after = built.manifest.classes
    unchanged = all(after[: len(item.manifest.classes)] == item.manifest.classes for item in job.inputs)
    return ReshardResult(built, job.expected, unchanged)


class _RecordsJob(Job):
    """The conversion of records folders."""

    def __init__(self, folders: Sequence[Path], options: ReshardOptions, progress: ProgressCallback) -> None:
        self.paths = folders
        self.inputs = [RecordsFolder.open(folder) for folder in sorted(folders)]
        self.expected = MultisetHash()  # of the records to be written
        self._manifests = [item.manifest for item in self.inputs]
        self._options, self._progress = options, progress
        self._renames = read_renames(options.rename_classes)
        self._keep = None if options.keep_classes is None else frozenset(read_names(options.keep_classes))

    def plan(self, workdir: Workdir, progress: ProgressCallback) -> Plan:
        """Make the plan, and compute the hash of the records in it."""
        self.expected = MultisetHash()
        return make_plan(self._refs(), workdir.work / PLAN_FRESH, self._plan_options(), progress)

    def _refs(self) -> Iterator[Found]:
        for folder in self.inputs:
            for line, ref in _records_of(folder, self._renames):
                if self._keep is None or not ref.class_name or ref.class_name in self._keep:
                    self.expected += MultisetHash.of(ref.split, ref.class_name, ref.file_name, line.sha256)
                yield ref
            for rejected in folder.rejected():
                class_name, slash, base = rejected.file_name.partition("/")
                yield replace(rejected, file_name=f"{self._renames.get(class_name, class_name)}{slash}{base}")

    def describe(self, workdir: Workdir, progress: ProgressCallback) -> dict[str, Any]:
        """Return the sources that the records were first made from."""
        infos = {json.dumps(source, sort_keys=True): source for item in self._manifests for source in item.sources}
        return {"inputs": None, "infos": list(infos.values()), "notes": []}

    def seal(self, workdir: Workdir, manifest: Manifest) -> Manifest:
        """Verify the written records; keep the entries of the manifest in which all inputs agree."""
        self.verify_written(workdir.partial, manifest)
        manifests, first = self._manifests, self._manifests[0]
        agreed = {
            name: value
            for name, value in first.options.items()
            if name not in ("names", "shards")  # the spelling of adopted names; the new number of shards
            and all(other.options.get(name) == value for other in manifests)
        }
        if manifest.options["keep_classes"] is not None:
            agreed["keep_classes"] = manifest.options["keep_classes"]
        words = {name: word for m in manifests for name, word in zip(m.classes, m.class_words, strict=True)}
        named = zip(manifest.classes, manifest.class_words, strict=True)
        same_space = len({m.label_space for m in manifests}) == 1
        labels = first if same_space and manifest.classes == first.classes else manifest
        return replace(
            manifest,
            options={**manifest.options, **agreed},
            class_words=tuple(word or words.get(name, "") for name, word in named),
            made_with=first.made_with if all(m.made_with == first.made_with for m in manifests) else manifest.made_with,
            label_space=labels.label_space,
            label_convention=labels.label_convention,
        )

    def verify_written(self, out: Path, manifest: Manifest) -> None:
        """Read and hash every written record, and compare the hash of all with the expected one.

        Raises:
            IntegrityError: They differ.
        """
        rows = map_rows(
            RecordsFolder(out, manifest),
            partial(record_hash, manifest.classes),
            self._options.workers,
            self._progress,
            unit="proved",
        )
        written = sum(rows, MultisetHash())
        if written != self.expected:
            raise IntegrityError(
                f"{out}: what was written is not what was read",
                expected=f"{self.expected.records} records of digest {self.expected.digest[:16]}",
                got=f"{written.records} of {written.digest[:16]}",
                remedy="check the disk and memory of this machine, then run the same command again",
            )

    def _plan_options(self) -> PlanOptions:
        """Choose the label space that keeps the labels where possible, and the options that shaped the images."""
        options, renames, manifests = self._options, self._renames, self._manifests
        first = manifests[0]
        same = all(manifest.classes == first.classes for manifest in manifests)
        counts = [split.class_counts for manifest in manifests for split in manifest.splits.values()]
        found = same and list(first.classes) == sorted(first.classes) and all(map(any, zip(*counts, strict=True)))
        if unknown := sorted(set(renames) - {name for manifest in manifests for name in manifest.classes}):
            raise PlanError(f"{options.rename_classes}: unknown classes", got=", ".join(unknown[:5]))
        label_space: str | tuple[str, ...]
        if all(manifest.label_space == "imagenet1k" for manifest in manifests):
            label_space = "imagenet1k"
        elif not same or found or (first.label_space == "found" and (options.keep_classes or renames)):
            label_space = "found"
        else:
            label_space = tuple(dict.fromkeys(renames.get(name, name) for name in first.classes))
        sides = {manifest.options.get("short_side") for manifest in manifests}
        store = ValidateOptions(short_side=sides.pop() if len(sides) == 1 else None)
        if store.short_side is not None and first.options.get("quality"):
            store = replace(store, quality=first.options["quality"])
        return PlanOptions(
            seed=first.seed if options.seed is None else options.seed,
            shards=options.shards,
            label_space=label_space,
            keep_classes=options.keep_classes,
            store=store,
        )


def record_hash(classes: Sequence[str], row: Row) -> MultisetHash:
    """Read one record from its data file and return its hash.

    Raises:
        RecordsError: It cannot be read.
    """
    fields = row.fields
    class_name = classes[fields["label"]] if fields["label"] >= 0 else ""
    return MultisetHash.of(row.split, class_name, fields["file_name"], hashlib.sha256(row.image).hexdigest())


def _records_of(folder: RecordsFolder, renames: Mapping[str, str]) -> Iterator[tuple[RecordLine, ImageRef]]:
    """Yield the records of a folder with the place of each image in its shard.

    Raises:
        IntegrityError: The folder differs from its manifest.
        RecordsError: A record list is damaged.
    """
    classes = folder.manifest.classes
    for split, info in folder.manifest.splits.items():
        for shard in info.shards:
            if problems := check_shard(folder.path, folder.manifest, info, shard):
                raise _damaged(folder, problems[0].to_line())
        folder.check_list(split)
        for position, line in enumerate(folder.lines(split), folder.span(split).start):
            row = folder.row(position)
            class_name = classes[line.label] if 0 <= line.label < len(classes) else ""
            prefix = f"{class_name}/" if class_name else ""
            if not line.file_name.startswith(prefix) or line.label >= len(classes):
                raise _damaged(
                    folder, f"{row.file} row {line.row} ({line.file_name}): label {line.label} is another class"
                )
            renamed = renames.get(class_name, class_name)
            name = f"{renamed}/{line.file_name.removeprefix(prefix)}" if class_name else line.file_name
            place, listed = row.opened.image_place(row.row), replace(line, file_name=name).to_json()
            yield line, ImageRef(split, renamed, name, str(row.opened.path), *place, line.url, line.status, listed)


def _damaged(folder: RecordsFolder, got: str) -> IntegrityError:
    remedy = "`imnet-prep verify` lists the damage, `imnet-prep repair-index` repairs what it can"
    return IntegrityError(f"{folder.path}: differs from its manifest", got=got, remedy=remedy)
