"""Records folders to one with another number of shards, merged, filtered or with classes renamed: no image is touched.

It is a conversion whose source is records: the same plan, so an image's place is its rank by a keyed hash of its name,
and the result depends on what is in the folders and on nothing else. That every record arrived is proved by a digest
over all of them that does not depend on their order, taken from the lists before and from the files after.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from imnet_prep.build.job import ConvertOptions, ConvertResult, carry_out
from imnet_prep.build.plan import Plan, PlanOptions, read_names
from imnet_prep.build.planner import make_plan
from imnet_prep.build.workdir import PLAN_FRESH, Workspace
from imnet_prep.errors import IntegrityError, PlanError
from imnet_prep.images.check import ValidateOptions
from imnet_prep.process_pool import worker_count
from imnet_prep.records.check import check_shard
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import Manifest
from imnet_prep.records.record_list import RecordLine
from imnet_prep.records.scan import Row, map_rows
from imnet_prep.types import ImageRef, ProgressCallback, Rejected, name_fault

_MODULUS = 1 << 256


@dataclass(frozen=True, slots=True)
class ReshardOptions:
    """What is to become of the records.

    Attributes:
        shards: Number of shards of a split, or None for the usual number.
        seed: Of the order; None takes the first folder's.
        keep_classes: The path of a file of class names to keep, or None for all.
        rename_classes: The path of a file of ``old<TAB>new`` class names, or None.
        workers: Worker processes; one a usable core where None. Changes no byte.
        force: Replace a finished folder once the new one is whole.
    """

    shards: int | None = None
    seed: int | None = None
    keep_classes: Path | None = None
    rename_classes: Path | None = None
    workers: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Proof:
    """A digest over a multiset of (split, class, file_name, SHA-256 of the image), whatever their order.

    ``digest`` is the sum modulo 2^256 of the records' own SHA-256s, in hex.
    Source: Clarke et al., "Incremental multiset hash functions", 2003, section 4 (MSet-Add-Hash).
    """

    records: int = 0
    total: int = 0

    def add(self, split: str, class_name: str, file_name: str, sha256: str) -> Proof:
        """Return the proof with one more record."""
        text = json.dumps([split, class_name, file_name, sha256]).encode()
        return self + Proof(1, int.from_bytes(hashlib.sha256(text).digest(), "big"))

    def __add__(self, other: Proof) -> Proof:
        return Proof(self.records + other.records, (self.total + other.total) % _MODULUS)

    @property
    def digest(self) -> str:
        """The sum in hex."""
        return f"{self.total:064x}"


@dataclass(frozen=True, slots=True)
class ReshardResult:
    """What was made; ``labels_unchanged`` where every class has the label that it had before."""

    built: ConvertResult
    proof: Proof
    labels_unchanged: bool

    @property
    def manifest(self) -> Manifest:
        """Of the whole folder."""
        return self.built.manifest

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        told = self.built.to_json()
        return {
            "images": self.proof.records,
            "proof": self.proof.digest,
            "labels_unchanged": self.labels_unchanged,
            **{name: told[name] for name in ("shards", "bytes", "seconds", "manifest", "already_done")},
        }


def reshard(
    folders: Sequence[Path],
    out: Path,
    options: ReshardOptions,
    progress: ProgressCallback,
    stop: Callable[[], bool] = lambda: False,
) -> ReshardResult:
    """Write the records of some folders into new shards.

    Args:
        folders: Records folders, in any order.
        out: The records folder to make.
        options: What is to become of them.
        progress: Told of records found, written and read again.
        stop: Asked between shards whether to leave after those in hand.

    Raises:
        RecordsError: A folder is missing or has no manifest.
        IntegrityError: A folder is damaged, or what was written does not prove equal.
        PlanError: ``out`` is in use or holds something else; two records have the same name.
        Interrupted: ``stop`` said so; the same command goes on.
    """
    job = _Records(folders, options, progress)
    size = sum(shard.size_bytes for item in job.inputs for _, _, shard in item.shards)
    how = ConvertOptions(worker_count(options.workers, size), "100%", force=options.force)
    built = carry_out(job, out, how, progress, stop)
    if built.already_done:
        job.prove(out, built.manifest)
    after = built.manifest.classes
    unchanged = all(after[: len(item.manifest.classes)] == item.manifest.classes for item in job.inputs)
    return ReshardResult(built, job.proof, unchanged)


class _Records:
    """Records folders as the source of a conversion; see :class:`imnet_prep.build.job.Job`."""

    def __init__(self, folders: Sequence[Path], options: ReshardOptions, progress: ProgressCallback) -> None:
        self.paths = folders
        self.inputs = [RecordsFolder.open(folder) for folder in sorted(folders)]
        self.proof = Proof()  # of what there is to be written
        self._manifests = [item.manifest for item in self.inputs]
        self._options, self._progress = options, progress
        self._renames = read_renames(options.rename_classes)
        self._keep = None if options.keep_classes is None else frozenset(read_names(options.keep_classes))

    def plan(self, space: Workspace, progress: ProgressCallback) -> Plan:
        """Make the plan, and take the proof of what is in it."""
        self.proof = Proof()
        options = self._plan_options()
        return make_plan(self._refs(), space.work / PLAN_FRESH, options, progress)

    def _refs(self) -> Iterator[ImageRef | Rejected]:
        for folder in self.inputs:
            for line, ref in records_of(folder, self._renames):
                if self._keep is None or not ref.class_name or ref.class_name in self._keep:
                    self.proof = self.proof.add(ref.split, ref.class_name, ref.file_name, line.sha256)
                yield ref
            for rejected in folder.rejected():
                class_name, slash, base = rejected.file_name.partition("/")
                yield replace(rejected, file_name=f"{self._renames.get(class_name, class_name)}{slash}{base}")

    def state(self, space: Workspace, progress: ProgressCallback) -> dict[str, Any]:
        """Describe where the records came from first."""
        infos = {json.dumps(source, sort_keys=True): source for item in self._manifests for source in item.sources}
        return {"inputs": None, "infos": list(infos.values()), "notes": []}

    def seal(self, space: Workspace, manifest: Manifest) -> Manifest:
        """Prove that every record arrived; what the inputs' manifests agree in stays as it was."""
        self.prove(space.partial, manifest)
        manifests, first = self._manifests, self._manifests[0]
        agreed = {
            name: value
            for name, value in first.options.items()
            if name not in ("names", "shards")  # how adopted files spell theirs; what was asked for now
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

    def prove(self, out: Path, manifest: Manifest) -> None:
        """Compare the proof of the data files, every image read and hashed, with that of what was to be written.

        Raises:
            IntegrityError: They differ.
        """
        prove = partial(proof_of, manifest.classes)
        rows = map_rows(RecordsFolder(out, manifest), prove, self._options.workers, self._progress, unit="proved")
        after = sum(rows, Proof())
        if after != self.proof:
            raise IntegrityError(
                f"{out}: what was written is not what was read",
                expected=f"{self.proof.records} records of digest {self.proof.digest[:16]}",
                got=f"{after.records} of {after.digest[:16]}",
                remedy="check the disk and memory of this machine, then run the same command again",
            )

    def _plan_options(self) -> PlanOptions:
        """Choose the label space so that labels stay where they can, and the options that shaped the images."""
        options, renames, manifests = self._options, self._renames, self._manifests
        first = manifests[0]
        same = all(manifest.classes == first.classes for manifest in manifests)
        counts = [split.class_counts for manifest in manifests for split in manifest.splits.values()]
        found = same and list(first.classes) == sorted(first.classes) and all(map(any, zip(*counts, strict=True)))
        if unknown := sorted(set(renames) - {name for manifest in manifests for name in manifest.classes}):
            raise PlanError(f"{options.rename_classes}: classes that are not there", got=", ".join(unknown[:5]))
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


def proof_of(classes: Sequence[str], row: Row) -> Proof:
    """Take the proof of one record from its data file.

    Raises:
        RecordsError: It cannot be read.
    """
    fields = row.fields
    class_name = classes[fields["label"]] if fields["label"] >= 0 else ""
    return Proof().add(row.split, class_name, fields["file_name"], hashlib.sha256(row.image).hexdigest())


def read_renames(path: Path | None) -> dict[str, str]:
    """Read lines of ``old<TAB>new`` class names; nothing where there is no file.

    Raises:
        PlanError: It cannot be read, or is not such a list.
    """
    if path is None:
        return {}
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read as a list of renamed classes", got=str(error)) from error
    pairs = [tuple(part.strip() for part in line.split("\t")) for line in lines]
    good = [len(pair) == 2 and not any(map(name_fault, pair)) for pair in pairs]
    wrong = next((line for line, is_good in zip(lines, good, strict=True) if not is_good), None)
    if wrong is not None or len({pair[0] for pair in pairs}) != len(pairs) or not pairs:
        raise PlanError(
            f"{path}: not a list of renamed classes", expected="lines of old<TAB>new", got=repr(wrong or "twice")
        )
    return {pair[0]: pair[1] for pair in pairs}


def records_of(folder: RecordsFolder, renames: dict[str, str]) -> Iterator[tuple[RecordLine, ImageRef]]:
    """Yield the records of a folder with the place of each image in its shard.

    Raises:
        IntegrityError: The folder is not what its manifest says.
        RecordsError: A record list is damaged.
    """
    classes = folder.manifest.classes
    for split, info in folder.manifest.splits.items():
        for shard in info.shards:
            if problems := check_shard(folder.path, folder.manifest, info, shard):
                raise _damaged(folder, problems[0].to_line())
        folder.check_list(split)
        first = folder.span(split).start
        for position, line in enumerate(folder.lines(split), first):
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
    remedy = "`imnet-prep verify` lists what is damaged, `imnet-prep repair-index` mends what can be"
    return IntegrityError(f"{folder.path}: is not what its manifest says", got=got, remedy=remedy)
