"""A folder of WebDataset tars, such as ``imagenet1k-train-0000.tar`` and its siblings."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.sources.archives import safe_files, walk_whole
from imnet_prep.sources.base import Found, Source, is_hidden, printable
from imnet_prep.sources.layout import SPLIT_FOLDERS
from imnet_prep.sources.samples import Samples, split_of
from imnet_prep.types import Rejected

_INFO = "_info.json"  # of timm: the tars of each split, and their numbers of samples
_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_NUMBER = re.compile(r"(.*?)(\d+)")


def tars_in(folder: Path) -> list[tuple[Path, str]]:
    """Return the tars in a folder and in folders named after splits, with the split that their names tell (or '').

    Raises:
        SourceError: Some tell their split and others do not; there are archives that would be passed over.
        OSError: A folder cannot be read.
    """
    tars: list[tuple[Path, str]] = []
    for item in sorted(folder.iterdir()):
        if _is_tar(item):
            tars.append((item, split_of(item.stem)))
        elif item.is_dir() and (split := SPLIT_FOLDERS.get(item.name.lower())):
            tars += ((tar, split) for tar in sorted(item.iterdir()) if _is_tar(tar))
    if tars and (lost := _passed_over(folder, {tar for tar, _ in tars})):
        raise SourceError(
            f"{folder}: {printable(lost)} would be passed over",
            expected="uncompressed tars in the folder itself, or in train/, val/ and test/",
            remedy="unpack it, give it or its folder as another source, or move it away",
        )
    silent = [tar.name for tar, split in tars if not split]
    if silent and len(silent) < len(tars):
        telling = next(tar.name for tar, split in tars if split)
        raise SourceError(
            f"{folder}: the name of {printable(silent[0])} tells no split, and that of {printable(telling)} does",
            expected="train, val or test in every name, or in none",
            remedy="rename it, or give the tars of each split in a folder of their own",
        )
    return tars


def _passed_over(folder: Path, known: set[Path]) -> str:
    """Return the path of an archive in or below a folder that is not among its tars, or an empty string."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            if name.lower().endswith(_ARCHIVES) and not is_hidden(name) and (path := Path(here, name)) not in known:
                return str(path.relative_to(folder))
    return ""


def _is_tar(path: Path) -> bool:
    return path.suffix == ".tar" and not is_hidden(path.name) and path.is_file()


class WebDatasetFolder(Source):
    """A folder of tars of samples.

    Args:
        path: The folder.
        tars: Each tar, and the split that its name tells (or an empty string).
        split: Selects one split where the names tell them; names it where they do not, else train.

    Raises:
        SourceError: No tar is of that split.
    """

    def __init__(self, path: Path, tars: Sequence[tuple[Path, str]], split: str) -> None:
        super().__init__(path, "webdataset", split)
        named = SPLIT_FOLDERS.get(path.resolve().name.lower(), "train")
        self._tars = [(tar, told or split or named) for tar, told in tars if split in ("", told or split)]
        if not self._tars:
            have = " and ".join(sorted({told for _, told in tars}))
            raise SourceError(f"{path} has no {split} split", expected=f"tars named {split}", got=have)

    def archives(self) -> Sequence[Path]:
        """Return its tars."""
        return [path for path, _ in self._tars]

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        samples = Samples()
        for path, split in self._tars:
            file = PlainFile(path)
            samples.begin(path, file, split)
            for found in safe_files(walk_whole(self, file, path), split):
                if isinstance(found, Rejected):
                    yield found
                else:
                    *folders, base = found.parts
                    samples.add(found, folders, base)
            samples.end()
        if not samples.are_there:
            raise SourceError(
                f"{self.path}: its tars hold no WebDataset samples",
                expected="images with a label beside each in the tar: KEY.jpg and KEY.cls, KEY.json or KEY.txt",
                got=f"{samples.images.total()} images without",
                remedy="if each tar is a class, unpack each into a folder of its name, and give the folder around them",
            )
        self._check_info(samples)
        notes += _gaps([path for path, _ in self._tars])
        yield from samples.found_in(self, notes, ignored)

    def _check_info(self, samples: Samples) -> None:
        """Compare the tars with timm's ``_info.json``.

        Raises:
            SourceError: A tar is missing, or has another number of samples.
        """
        found = {path.name: samples.images[str(path)] for path, _ in self._tars}
        for split, wanted in _listed(self.path / _INFO).items():
            if self.split in ("", SPLIT_FOLDERS.get(split.lower(), split)):
                missing = [name for name in wanted if name not in found]
                wrong = [name for name, count in wanted.items() if name in found and count not in (None, found[name])]
                if missing or wrong:
                    name = (missing or wrong)[0]
                    raise SourceError(
                        f"{self.path}: {len(missing or wrong)} of {len(wanted)} tars of {split} "
                        + ("are missing" if missing else "have another number of samples"),
                        expected=f"{printable(name)} with {wanted[name]} samples, by {_INFO}",
                        got="no such file" if missing else str(found[name]),
                        remedy=f"download them (again); without {_INFO}, what is there is taken",
                    )


def _listed(path: Path) -> dict[str, dict[str, int | None]]:
    """Return the tars of each split and their numbers of samples, by timm's list; nothing without one."""
    try:
        splits = json.loads(path.read_bytes())["splits"]
        return {
            str(split): dict(
                zip(info["filenames"], info.get("shard_lengths") or [None] * len(info["filenames"]), strict=True)
            )
            for split, info in splits.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _gaps(tars: Sequence[Path]) -> list[str]:
    """Return a note on each series of numbered tars with numbers left out."""
    series = defaultdict[tuple[Path, str, str], list[int]](list)
    for tar in tars:
        if match := _NUMBER.match(tar.stem[::-1]):  # the last number in the name
            series[tar.parent, match[1], tar.stem[::-1][match.end() :]].append(int(match[2][::-1]))
    notes = []
    for (folder, end, start), numbers in series.items():
        lowest, highest, there = min(numbers), max(numbers), set(numbers)
        absent = highest + 1 - lowest - len(there)
        if 0 < absent < len(numbers):  # more are no series
            first = next(number for number in range(lowest, highest) if number not in there)
            name = printable(f"{start[::-1]}*{end[::-1]}.tar")
            notes.append(f"{folder.name}/{name}: {absent} of the series are missing, the first is number {first}")
    return notes
