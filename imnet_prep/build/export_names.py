"""Names of exported files that every file system can hold, and no two of which differ in case alone."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping

import numpy as np

from imnet_prep.files import is_possible_name
from imnet_prep.sources.base import is_hidden, is_image_name

_FORBIDDEN = re.compile(r'[<>:"\\|?*\x00-\x1f\x7f]')  # by Windows
_MAX_BYTES = 200  # of 255: an ending is added
_DIGITS = 12


def safe_path(name: str) -> str:
    """Return a relative path that can be made on every file system, with ``/`` between its parts."""
    return "/".join(_safe_part(part) for part in name.split("/"))


def _safe_part(name: str) -> str:
    safe = _FORBIDDEN.sub("_", name)
    if safe != (shown := safe.rstrip(". ")):
        safe = shown + "_" * (len(safe) - len(shown))
    if not safe or is_hidden(safe) or not is_possible_name(safe, windows=True):
        safe = f"_{safe}"
    if len(safe.encode()) > _MAX_BYTES:
        stem, dot, suffix = safe.rpartition(".")
        ending = (f".{suffix}" if dot and stem and len(suffix) < 10 else "") if is_image_name(safe) else ""
        cut = safe.encode()[: _MAX_BYTES - len(ending)].decode("utf-8", "ignore")
        safe = with_digest(cut.rstrip(". ") + ending, name)
    return safe


def image_path(name: str) -> str:
    """Return the path of an image by its record's name; an image suffix is added where it has none."""
    safe = safe_path(name)
    return safe if is_image_name(safe.rpartition("/")[2]) else f"{safe}.jpg"


def sample_key(name: str) -> str:
    """Return the key of a WebDataset sample: the path of the image without its suffix, its base name without dots."""
    folder, slash, base = image_path(name).rpartition("/")
    return folder + slash + base.rpartition(".")[0].replace(".", "_")


def with_digest(path: str, name: str) -> str:
    """Add to a path, before its suffix, some digits of the SHA-256 of the name that it stands for."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]
    folder, slash, base = path.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return f"{folder}{slash}{stem}~{digest}.{suffix}" if dot and stem else f"{path}~{digest}"


def class_folders(classes: Iterable[str]) -> Mapping[str, str]:
    """Return the folder of each class; those that differ in case alone get some digits of a digest."""
    folders = {name: _safe_part(name.replace("/", "_")) for name in classes}
    taken = Repeated(folders.values())
    return {name: with_digest(path, name) if path in taken else path for name, path in folders.items()}


class Repeated:
    """The paths that are in a collection more than once, where case does not count.

    It holds 8 bytes for each path while it is made, and then only the repeated ones.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        hashes = np.sort(np.fromiter(map(_hash, paths), np.uint64))
        self._hashes = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())

    def __contains__(self, path: str) -> bool:
        return bool(self._hashes) and _hash(path) in self._hashes


def _hash(path: str) -> int:
    folded = unicodedata.normalize("NFC", path).casefold()  # macOS does not tell composed letters apart
    return int.from_bytes(hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
