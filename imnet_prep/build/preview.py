"""What ``--dry-run`` shows: the plan of a conversion, and its cost by a few images; nothing that stays is written."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from imnet_prep.build.job import ConvertOptions, heeding, named_failures
from imnet_prep.build.plan import Plan, PlanOptions, shard_refs
from imnet_prep.build.planner import make_plan
from imnet_prep.build.workdir import check_out
from imnet_prep.images.check import validate
from imnet_prep.process_pool import process_count
from imnet_prep.sources import SourceSummary, detect, merge, read
from imnet_prep.types import ProgressCallback, Rejected, Stop

SAMPLE_IMAGES = 64  # of each split, timed for the estimate


@dataclass(frozen=True, slots=True)
class Preview:
    """What ``--dry-run`` says: the plan, what it will cost, and what was noticed on the way."""

    plan: Plan
    sources: tuple[SourceSummary, ...]
    seconds: float
    disk_free: int

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        return {
            "sources": [
                {"kind": source.kind, "name": source.name, "notes": list(source.notes)} for source in self.sources
            ],
            "images": self.plan.images,
            "classes": len(self.plan.classes),
            "shards": sum(part.shards for part in self.plan.splits.values()),
            "rejected": dict(Counter(item.reason.value for item in self.plan.rejected)),
            "splits": {
                name: {
                    "images": part.images,
                    "shards": part.shards,
                    "bytes": part.bytes,
                    "page_size": part.layout.page_size,
                }
                for name, part in self.plan.splits.items()
            },
            "bytes": self.plan.bytes,
            "seconds_estimated": round(self.seconds, 1),
            "disk_needed": sum(part.stored_bytes for part in self.plan.splits.values()),
            "disk_free": self.disk_free,
            "label_convention": self.plan.label_convention,
        }


def dry_run(
    paths: Sequence[Path],
    out: Path,
    split: str | None,
    plan_options: PlanOptions,
    options: ConvertOptions,
    progress: ProgressCallback,
    stop: Stop,
) -> Preview:
    """Make the plan, time a few images of it, and write nothing that stays.

    Raises:
        SourceError: A source is missing, empty, damaged or of no known layout.
        PlanError: A class list cannot be read, or ``out`` cannot be made.
        Interrupted: ``stop`` said so.
    """
    sources = detect(paths, split)
    space = check_out(out, paths, force=options.force)
    parent = next(folder for folder in space.out.parents if folder.exists())
    with named_failures(space), tempfile.TemporaryDirectory(prefix="imnet-prep-") as folder:
        plan = make_plan(merge(sources), Path(folder) / "plan", plan_options, heeding(progress, stop))
        seconds = _estimate_seconds(plan) / process_count(options.workers)
    return Preview(plan, tuple(source.summary() for source in sources), seconds, shutil.disk_usage(parent).free)


def _estimate_seconds(plan: Plan) -> float:
    """Check a few images of each split and scale their time by the bytes."""
    total = 0.0
    for part in plan.splits.values():
        refs = list(islice(shard_refs(plan.database, part.first, part.first + part.images), SAMPLE_IMAGES))
        started = time.perf_counter()
        for ref in refs:
            raw = read(ref)
            if not isinstance(raw, Rejected):
                validate(raw, plan.options.store)
        total += (time.perf_counter() - started) * part.bytes / max(1, sum(ref.size_bytes for ref in refs))
    return total
