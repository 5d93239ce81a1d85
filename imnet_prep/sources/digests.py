"""The digests of an archive, compared with those of the official archives."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.types import Progress, ProgressCallback

_CHUNK_BYTES = 8 << 20


def digests(path: Path, progress: ProgressCallback | None = None) -> tuple[int, str, str]:
    """Read a file once and return its size in bytes, its MD5 and its SHA-256, both computed at the same time."""
    total = path.stat().st_size
    done, md5, sha256 = 0, hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as thread:
        while chunk := file.read(_CHUNK_BYTES):
            pending = thread.submit(md5.update, chunk)
            sha256.update(chunk)
            pending.result()
            done += len(chunk)
            if progress is not None:
                progress(Progress(done, total, unit="bytes", bytes_done=done, note=path.name))
    return done, md5.hexdigest(), sha256.hexdigest()


def check_official(path: Path, size_bytes: int, md5: str, sha256: str) -> tuple[bool, str]:
    """Compare an archive with the official ones.

    Returns:
        Whether it is an official archive, and a note for the user (may be empty).

    Raises:
        SourceError: It has an official name and size but other bytes, or it is an official archive under another's
            name.
    """
    named, same = catalog.archives().get(path.name), catalog.archive_with_digest(md5)
    pair, mix_up = catalog.mix_up()
    if same is not None and (not same.sha256 or same.sha256 == sha256):
        if named is not None and named.file_name != same.file_name:
            swapped = {named.file_name, same.file_name} == pair
            raise SourceError(
                f"{path} is {same.file_name} ({same.what}) under another name",
                expected=f"MD5 {named.md5}",
                got=f"MD5 {md5}",
                remedy=mix_up if swapped else f"rename it to {same.file_name}",
            )
        return True, ""
    if named is None:
        return False, ""
    if size_bytes == named.size_bytes:
        raise SourceError(
            f"{path} is damaged: it has the official size, but other bytes",
            expected=f"MD5 {named.md5}",
            got=f"MD5 {md5}",
            remedy="download it again" + (f"; note that {mix_up}" if named.file_name in pair else ""),
        )
    return False, f"{path.name} is not the official archive of this name: MD5 {named.md5} expected, {md5} found"
