"""Convert archives and folders to a records folder, or show the plan and its cost first."""

import json
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from imnet_prep.build.job import ConvertResult, Job, interruptible, named_failures, run_job
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.build.plan import CONVENTIONS, PLAN_VERSION, Plan, load_plan, make_plan, shard_refs
from imnet_prep.build.workdir import DIGESTS, PLAN_FRESH, STAGED, Workdir, check_out
from imnet_prep.errors import Interrupted, SourceError
from imnet_prep.files import write_atomically
from imnet_prep.images.check import validate
from imnet_prep.images.in_use import SLOWER_CONVERSION, describe_decoder
from imnet_prep.process_pool import process_count
from imnet_prep.records.manifest import Manifest
from imnet_prep.records.publish import remove
from imnet_prep.remote import is_url
from imnet_prep.sources import Source, detect, merge, read
from imnet_prep.sources.base import Digests, digests
from imnet_prep.sources.staging import Staging
from imnet_prep.types import Progress, ProgressCallback, Rejected, Stop

LOG = logging.getLogger(__name__)
SAMPLE_IMAGES = 64  # per split, timed for the estimate of a dry run


def convert(
    paths: Sequence[Path | str],
    out: Path,
    split: str | None,
    plan_options: PlanOptions,
    options: ConvertOptions,
    progress: ProgressCallback,
    stop: Stop,
) -> ConvertResult:
    """Convert sources to a records folder.

    Args:
        paths: Archives, folders and URLs of archives, in any order.
        out: The records folder to write.
        split: The split of sources that do not tell it.
        plan_options: What determines the result.
        options: How to compute it.
        progress: Called with the number of images found, hashed and stored.
        stop: Returns whether to stop once the shards in progress are finished.

    Raises:
        SourceError: A source is missing, empty, damaged or of no known layout.
        PlanError: ``out`` is in use or holds other files; the disk is full; a worker was killed.
        BudgetError: More images were rejected than ``options.max_rejected``.
        Interrupted: ``stop`` returned True; finished shards are kept.
    """
    return run_job(_SourcesJob(paths, split, plan_options, options), out, options, progress, stop)


class _SourcesJob(Job):
    """The conversion of archives and folders."""

    def __init__(
        self, paths: Sequence[Path | str], split: str | None, options: PlanOptions, how: ConvertOptions
    ) -> None:
        self.paths, self._given, self._split, self._options, self._how = local_paths(paths), paths, split, options, how
        self._sources: list[Source] = []
        self._states: dict[Path, list[Any] | None] = {}  # of the archives, before any is read
        self._key: str | None = None  # what the plan depends on; None with a folder, which is listed again
        self._known: dict[str, Any] = {}  # by the state of a source: its description, as kept in DIGESTS
        self._hashing = _Hashing()

    def plan(self, workdir: Workdir, progress: ProgressCallback) -> Plan:
        """Return the plan that was begun from the same archives, or make one."""
        options, staging = self._options, Staging(workdir.work / STAGED, progress)
        self._sources = detect(self._given, self._split, staging, options.class_names(), salvage=options.salvage)
        states = [_file_state(source.path) for source in self._sources]
        self._states = {path: _file_state(path) for source in self._sources for path in source.archives()}
        depends = [PLAN_VERSION, states, self._split, options.content(), options.seed, options.label_names()]
        self._key = None if None in states else json.dumps(depends, sort_keys=True)
        with suppress(OSError, ValueError):
            self._known = json.loads((workdir.work / DIGESTS).read_bytes())
        begun = workdir.begun()
        if self._key is not None and begun is not None and begun.get("key") == self._key:
            plan = load_plan(workdir.database, self._options)
            if plan is not None and plan.digest == begun["plan"]:
                return plan
        if not workdir.out.exists():  # else it may be finished, and no digest needed
            archives = [source for source in self._sources if source.is_hashed and not self._hashed(source)]
            self._hashing.begin(source.path for source in archives)
        plan = make_plan(merge(self._sources), workdir.work / PLAN_FRESH, self._options, progress)
        _check_numbers(self._sources, options)
        staging.forget_others()
        return plan

    def describe(self, workdir: Workdir, progress: ProgressCallback) -> dict[str, Any]:
        """Describe the sources; the digests of an archive are kept until it changes."""
        work = f"processes: at most {process_count(self._how.workers)}"
        if self._how.scheduler is not None:
            work = f"the Dask workers of {self._how.scheduler} use their own"
        LOG.info("%s; %s", describe_decoder(SLOWER_CONVERSION), work)
        entries: list[dict[str, Any]] = []
        for source in self._sources:
            state = _state_of(source)
            if self._key is None or self._known.get(state, {}).get("key") != self._key:
                hashed = self._hashed(source) or self._hashing.result(source.path, progress)
                info = source.info(progress, hashed)
                self._known[state] = {"info": info, "notes": source.notes, "key": self._key}
                write_atomically(workdir.work / DIGESTS, json.dumps(self._known).encode())
            entries.append(self._known[state])
            for note in entries[-1]["notes"]:
                LOG.warning("%s", note)
        infos, notes = [entry["info"] for entry in entries], [note for entry in entries for note in entry["notes"]]
        return {"inputs": infos, "infos": infos, "key": self._key, "notes": notes}

    def _hashed(self, source: Source) -> Digests | None:
        """Return the digests of an archive that an earlier run noted, or None."""
        info = self._known.get(_state_of(source), {}).get("info", {})
        return (info["size_bytes"], info["md5"], info["sha256"]) if info.get("sha256") else None

    def close(self) -> None:
        """End the hashing that an error has made useless."""
        self._hashing.stop()

    def seal(self, workdir: Workdir, manifest: Manifest) -> Manifest:
        """Check that no archive has changed since it was listed: its digest and its images would be of two archives.

        Raises:
            SourceError: One has. Nothing is kept of what was read.
        """
        for path, before in self._states.items():
            with suppress(OSError):
                if _file_state(path) == before:
                    continue
            remove(workdir.note)
            raise SourceError(
                f"{path}: changed while it was read", remedy="run the same command again once it is complete"
            )
        return manifest


class _Hashing:
    """Compute the digests of archives in another thread, while they are listed."""

    def __init__(self) -> None:
        self._stopped = Event()
        self._progress: ProgressCallback = _silent
        self._results: dict[Path, Future[Digests]] = {}

    def begin(self, archives: Iterable[Path]) -> None:
        """Begin with these, one after another."""
        thread = ThreadPoolExecutor(1)
        self._results = {path: thread.submit(digests, path, self._report) for path in archives}
        thread.shutdown(wait=False)

    def result(self, archive: Path, progress: ProgressCallback) -> Digests | None:
        """Wait for the digests of an archive, and return them; None for one that was not begun."""
        if archive not in self._results:
            return None
        self._progress = progress
        hashed = self._results[archive].result()
        progress(Progress(hashed[0], hashed[0], "bytes", hashed[0], note=archive.name))
        return hashed

    def stop(self) -> None:
        """Leave the rest undone."""
        self._stopped.set()

    def _report(self, state: Progress) -> None:
        if self._stopped.is_set():
            raise Interrupted("stopped before the first shard", remedy="run the same command again")
        self._progress(state)


def _silent(state: Progress) -> None:
    """Show nothing: the listing is shown."""


def local_paths(given: Sequence[Path | str]) -> list[Path]:
    """Return the sources that are on this machine, without the URLs."""
    return [Path(path) for path in given if not (isinstance(path, str) and is_url(path))]


def _state_of(source: Source) -> str:
    return json.dumps([source.kind, _file_state(source.path)])


def _file_state(path: Path) -> list[Any] | None:
    """Return a fingerprint of a file that detects a replaced one, or None for a folder."""
    state = path.stat()
    return None if path.is_dir() else [str(path.absolute()), state.st_size, state.st_mtime_ns, state.st_ino]


def _check_numbers(sources: Sequence[Source], options: PlanOptions) -> None:
    """Check that sources that number their classes number the same ones, once all images were listed.

    Raises:
        SourceError: Class 7 is ``7`` in one and ``07`` in another; ``--classes`` is given, and none numbers them.
    """
    if options.classes is not None and not any(source.has_numbers for source in sources):
        raise SourceError("--classes is for sources that number their classes", got="none", remedy="leave it out")
    widths = {source.digits: source.name for source in sources if source.digits}
    if len(widths) > 1:
        raise SourceError(
            f"{' and '.join(widths.values())} number their classes with {' and '.join(map(str, widths))} digits",
            expected="the same names: 7 in one would be another class than 07 in another",
            remedy="give the names of all in label order (--classes FILE), or one folder that holds all files",
        )


def dry_run(
    paths: Sequence[Path | str],
    out: Path,
    split: str | None,
    plan_options: PlanOptions,
    options: ConvertOptions,
    progress: ProgressCallback,
    stop: Stop,
) -> dict[str, Any]:
    """Make the plan, time a few images, and remove everything written.

    Returns:
        The object that ``--json`` prints: sources, images, classes, shards, bytes, estimated time and disk space.

    Raises:
        SourceError: A source is missing, empty, damaged or of no known layout.
        PlanError: A class list cannot be read, or ``out`` cannot be created.
        Interrupted: ``stop`` returned True.
    """
    workdir = check_out(out, local_paths(paths), force=options.force)
    parent = next(folder for folder in workdir.out.parents if folder.exists())
    with named_failures(workdir), tempfile.TemporaryDirectory(prefix="imnet-prep-") as folder:
        staging = Staging(Path(folder) / STAGED, interruptible(progress, stop))
        sources = detect(paths, split, staging, plan_options.class_names(), salvage=plan_options.salvage)
        plan = make_plan(merge(sources), Path(folder) / "plan", plan_options, interruptible(progress, stop))
        _check_numbers(sources, plan_options)
        seconds = _estimate_seconds(plan) / process_count(options.workers)
    return {
        "sources": [
            {
                "kind": source.kind,
                "name": source.name,
                "notes": list(source.notes),
                **({} if source.skipped_bytes is None else {"skipped_bytes": source.skipped_bytes}),
            }
            for source in sources
        ],
        "images": plan.images,
        "classes": len(plan.classes),
        "shards": sum(part.shards for part in plan.splits.values()),
        "rejected": dict(Counter(item.reason.value for item in plan.rejected)),
        "splits": {
            name: {
                "images": part.images,
                "shards": part.shards,
                "bytes": part.bytes,
                "page_size": part.layout.page_size,
            }
            for name, part in plan.splits.items()
        },
        "bytes": plan.bytes,
        "seconds_estimated": round(seconds, 1),
        "disk_needed": sum(part.stored_bytes for part in plan.splits.values()),
        "disk_free": shutil.disk_usage(parent).free,
        "label_convention": CONVENTIONS[plan.label_space],
    }


def _estimate_seconds(plan: Plan) -> float:
    """Check a few images of each split, and scale their time by the bytes."""
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
