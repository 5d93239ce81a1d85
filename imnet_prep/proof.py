"""A digest over all records of a folder that does not depend on how they lie in shards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from imnet_prep.records.manifest import Manifest
from imnet_prep.records.mindrecord import Shard
from imnet_prep.types import Progress, ProgressCallback, ShardInfo
from imnet_prep.workers import Advance, run_processes, worker_count

_MODULUS = 1 << 256


@dataclass(frozen=True, slots=True)
class Proof:
    """A digest over a multiset of (split, class, file_name, SHA-256 of the image), whatever their order.

    ``digest`` is the sum modulo 2^256 of the records' own SHA-256s, in hex.
    Source: Clarke et al., "Incremental multiset hash functions", 2003, section 4 (MSet-Add-Hash).
    """

    records: int = 0
    total: int = 0

    def add(self, split: str, class_name: str, file_name: str, sha256: str) -> Proof:
        """Give the proof with one more record."""
        text = json.dumps([split, class_name, file_name, sha256]).encode()
        own = int.from_bytes(hashlib.sha256(text).digest(), "big")
        return Proof(self.records + 1, (self.total + own) % _MODULUS)

    def __add__(self, other: Proof) -> Proof:
        return Proof(self.records + other.records, (self.total + other.total) % _MODULUS)

    @property
    def digest(self) -> str:
        """The sum in hex."""
        return f"{self.total:064x}"


@dataclass(frozen=True, slots=True)
class _ProofTask:
    records: Path
    split: str
    shard: ShardInfo
    classes: tuple[str, ...]


def prove(records: Path, manifest: Manifest, workers: int | None, progress: ProgressCallback) -> Proof:
    """Take the proof of a folder from its data files: every image is read and hashed."""
    tasks = [
        _ProofTask(records, name, shard, manifest.classes)
        for name, split in manifest.splits.items()
        for shard in split.shards
    ]
    total = sum(task.shard.rows for task in tasks)

    def report(images: int, size: int, _bad: int) -> None:
        progress(Progress(min(images, total), total, "proved", size))

    width = min(worker_count(workers, sum(task.shard.size_bytes for task in tasks)), len(tasks))
    return sum(run_processes(prove_shard, tasks, width, report), Proof())


def prove_shard(task: _ProofTask, advance: Advance) -> Proof:
    """Take the proof of one data file; for a worker process."""
    proof = Proof()
    with Shard(task.records / task.shard.file) as shard:
        for row in range(len(shard)):
            fields, image = shard.fields(row), shard.image(row)
            class_name = task.classes[fields["label"]] if fields["label"] >= 0 else ""
            proof = proof.add(task.split, class_name, fields["file_name"], hashlib.sha256(image).hexdigest())
            advance(1, len(image), 0)
    return proof
