"""Verify records behind a URL: the files that are there, and the SHA-256 of each, without keeping any of it."""

import hashlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

from imnet_prep import remote
from imnet_prep.check.verify import VerifyResult, check_expectation
from imnet_prep.cluster import run_tasks
from imnet_prep.errors import IntegrityError, RecordsError, RemoteError
from imnet_prep.process_pool import Advance, in_order
from imnet_prep.records.check import Problem, listed_files
from imnet_prep.records.elsewhere import open_records
from imnet_prep.records.manifest import MANIFEST, Manifest
from imnet_prep.types import Progress, ProgressCallback

_File = tuple[str, int, str]  # name, size in bytes, SHA-256


def verify_url(
    url: str,
    level: str,
    workers: int,
    progress: ProgressCallback,
    expect: str | None = None,
    *,
    scheduler: str | None = None,
) -> VerifyResult:
    """Compare records behind a URL with their manifest.

    Files that have the digests of the manifest have the headers, indexes and rows that the conversion wrote.

    Args:
        url: Where the records are.
        level: ``quick`` for the names and sizes of the files, ``hash`` for their bytes as well.
        workers: Number of files read at a time.
        progress: Called with the bytes read.
        expect: As for a folder.
        scheduler: Address of a Dask scheduler whose workers read the files; None for this machine.

    Raises:
        RecordsError: ``level`` is ``decode``, or ``expect`` is unknown.
        RemoteError: There is no manifest, or a file that is there cannot be read.
    """
    if level == "decode":
        raise RecordsError(
            f"{remote.shown(url)}: records behind a URL are not decoded",
            expected="level quick or hash",
            remedy="copy the records to a folder to decode them",
        )
    url = url.rstrip("/")
    try:
        folder = open_records(url)
    except IntegrityError as error:
        return VerifyResult(level, 0, 0, (Problem("manifest", MANIFEST, str(error)),))
    manifest = folder.manifest
    files = list(_files(manifest))
    problems = [*check_expectation(manifest, expect), *_check_unlisted(url, manifest)]
    done, total = 0, sum(size for _, size, _ in files)
    with closing(_check_files(url, level, files, workers, scheduler)) as found:
        for (_, size, _), problem in zip(files, found, strict=True):
            problems += [problem] if problem else []
            done += size
            progress(Progress(done, total, "bytes"))
    return VerifyResult(level, len(folder.shards), folder.records, tuple(problems))


def _files(manifest: Manifest) -> Iterator[_File]:
    yield from listed_files(manifest)
    if entry := manifest.rejected:
        yield str(entry["file"]), entry["size_bytes"], entry["sha256"]


def _check_unlisted(url: str, manifest: Manifest) -> Iterator[Problem]:
    """Find files that the manifest does not list, where the store can list any: a web server cannot."""
    if url.startswith("http"):
        return
    known = {name for name, _, _ in _files(manifest)}
    for name in remote.list_files(url):
        if name not in known and (name.count("/") == 1 or ("/" not in name and ".mindrecord" in name)):
            yield Problem("unexpected", name, "is not in the manifest")


def _check_files(
    url: str, level: str, files: list[_File], workers: int, scheduler: str | None
) -> Generator[Problem | None, None, None]:
    """Yield the problem of each file, or None, in their order."""
    if scheduler is None:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(partial(_check_file, url, level), files)
    else:
        check = partial(_check_on_worker, url, level)
        yield from in_order(run_tasks(check, enumerate(files), workers, scheduler, lambda *_: None, task="file"))


def _check_on_worker(url: str, level: str, task: tuple[int, _File], _advance: Advance) -> tuple[int, Problem | None]:
    number, file = task
    return number, _check_file(url, level, file)


def _check_file(url: str, level: str, wanted: _File) -> Problem | None:
    """Return the problem of a file, if it has one."""
    name, size, expected = wanted
    try:
        file = remote.look_up(f"{url}/{name}")
    except RemoteError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return Problem("missing", name, "is not there, or may not be read")
    if file is None:
        return Problem("missing", name, "is a folder")
    if file.size_bytes not in (None, size):
        return Problem("size", name, f"has {file.size_bytes} bytes, expected {size}")
    if level == "quick":
        return None
    digest = hashlib.sha256()
    for data in remote.read(file):
        digest.update(data)
    got = digest.hexdigest()
    return None if got == expected else Problem("digest", name, f"expected SHA-256 {expected[:12]}, got {got[:12]}")
