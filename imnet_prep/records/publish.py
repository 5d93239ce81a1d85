"""How finished files and folders get their names: all of them, whatever interrupts it, by plain renames.

What is new is written and flushed under other names first. Then a journal says what goes where, and the renames follow;
from the journal on, whoever comes next finishes them. Of each rename the file (or folder) is on the disk before it, and
the folder of its name after it. No system call is needed that Windows and macOS have not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imnet_prep.errors import RecordsError
from imnet_prep.files import exclusive_lock, open_plain, sync, write_atomically
from imnet_prep.records.manifest import FORMAT, MANIFEST

WORK = ".imnet-prep"  # in a records folder while `adopt` or `repair-index` changes it
WORK_JOURNAL, WORK_LOCK = f"{WORK}.publish", f"{WORK}.lock"
DAMAGED_FOLDER = ".damaged"  # in a records folder: files that `repair-index` replaced
BUILD_WORK = ".work"  # in a `.partial` folder while it is made
AGAIN = "run the command that was interrupted again: it goes on"


@dataclass(frozen=True, slots=True)
class Move:
    """A file or folder that gets its name.

    Attributes:
        new: What is finished. place: The name it gets.
        aside: The name that what stood there gets, where there is nothing yet; None lets a file be replaced.
    """

    new: Path
    place: Path
    aside: Path | None = None


def publish(journal: Path, moves: Sequence[Move], discard: Sequence[Path] = (), *, stage: Path | None = None) -> None:
    """Carry out moves, in order, all of them or, after an interruption, when :func:`finish` is called.

    Args:
        journal: Where to note them; all paths lie in its folder or below it.
        moves: What gets which name; on the disk already.
        discard: What is deleted afterwards, where it is there.
        stage: Where the journal is written first, see :func:`~imnet_prep.files.write_atomically`.

    Raises:
        OSError: The disk fails; once the journal is there, :func:`finish` goes on.
    """
    base = journal.parent
    document = {
        "moves": [[path and path.relative_to(base).as_posix() for path in (m.new, m.place, m.aside)] for m in moves],
        "discard": [path.relative_to(base).as_posix() for path in discard],
    }
    write_atomically(journal, json.dumps(document).encode(), stage=stage)
    _carry_out(journal, moves, discard)


def finish(journal: Path, among: Collection[Path] | None = None) -> bool:
    """Carry out what an interrupted :func:`publish` left to do.

    Args:
        journal: Where it was noted. It may come from someone else, so nothing outside its folder is touched.
        among: The only paths that it may name; None for any in the folder.

    Returns:
        Whether there was something.

    Raises:
        RecordsError: The journal is not one.
        OSError: The disk fails.
    """
    try:
        with open_plain(journal) as file:
            moves, discard = _parse(journal, file.read(), among)
    except FileNotFoundError:
        return False
    _carry_out(journal, moves, discard)
    return True


def _carry_out(journal: Path, moves: Sequence[Move], discard: Sequence[Path]) -> None:
    for move in moves:
        if not os.path.lexists(move.new):
            continue  # it has its name already
        if move.aside is not None and os.path.lexists(move.place) and not os.path.lexists(move.aside):
            move.aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(move.place, move.aside)
            sync(move.aside.parent)
        if not move.place.parent.exists():
            move.place.parent.mkdir()
            sync(move.place.parent.parent)
        os.replace(move.new, move.place)
        sync(move.place.parent)
    for path in discard:
        remove(path)
    journal.unlink()
    sync(journal.parent)


def _parse(journal: Path, data: bytes, among: Collection[Path] | None) -> tuple[list[Move], list[Path]]:
    base = journal.parent

    def inside(name: str) -> Path:
        path = base / name
        through_links = path.parent.resolve()
        if not name or ".." in path.parts or not (among is None or path in among):
            raise ValueError(f"a path that it may not name: {name}")
        if base.resolve() not in (through_links, *through_links.parents):
            raise ValueError(f"a path out of the folder: {name}")
        return path

    try:
        document = json.loads(data)
        moves = [
            Move(inside(new), inside(place), None if aside is None else inside(aside))
            for new, place, aside in document["moves"]
        ]
        return moves, [inside(name) for name in document["discard"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "delete it if it is none of yours"
        raise RecordsError(
            f"{journal}: is not the journal of an interrupted change", got=str(error), remedy=remedy
        ) from error


def remove(path: Path) -> None:
    """Delete a file or a folder, where it is there.

    Raises:
        OSError: It cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a records folder that is being made.

    Attributes:
        folder: The records folder. work: A folder in it for what is being written; it goes away with the change.
        resumed: An earlier change that was interrupted was finished first.
    """

    folder: Path
    work: Path
    resumed: bool

    def stage(self, place: Path) -> Path:
        """Return where to write what will get the name ``place``; the base name is the same, its folder is there."""
        path = self.work / "new" / place.relative_to(self.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, places: Sequence[Path], *, aside: Path | None = None) -> None:
        """Move staged files to their names, in this order.

        Args:
            places: The names; each was staged, and is flushed.
            aside: A folder that gets what stood there, but never over what it has. None lets it be replaced.

        Raises:
            RecordsError: A name cannot be given: nothing is changed, where a journal would wait for ever.
        """
        moves = [
            Move(self.stage(place), place, None if aside is None else aside / place.relative_to(self.folder))
            for place in places
        ]
        for move in moves:
            if move.place.is_dir() and (move.aside is None or os.path.lexists(move.aside)):
                raise RecordsError(f"{move.place}: is a folder", expected="a file", remedy="move it away")
            for path in (move.place, move.aside or move.place):
                parent = next(folder for folder in path.parents if os.path.lexists(folder))
                effective = os.access in os.supports_effective_ids
                writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK, effective_ids=effective)
                if not writable or parent.stat().st_dev != self.folder.stat().st_dev:
                    expected = f"a folder on the disk of {self.folder}"
                    raise RecordsError(f"{parent}: cannot be written", expected=expected)
        for folder in {move.new.parent for move in moves}:
            sync(folder)
        publish(self.folder / WORK_JOURNAL, moves, stage=self.work)


@contextmanager
def changing(folder: Path) -> Iterator[Change]:
    """Change a records folder alone; what was interrupted before is finished, and nothing is left behind.

    Raises:
        RecordsError: There is no such folder, another process is changing it, or it cannot be written.
    """
    if not folder.is_dir():
        raise RecordsError(f"{folder}: no such folder", expected="a folder of MindRecord files")
    work = folder / WORK
    try:
        with exclusive_lock(folder / WORK_LOCK):
            resumed = finish(folder / WORK_JOURNAL)
            remove(work)
            work.mkdir()
            try:
                yield Change(folder, work, resumed)
            finally:
                if not os.path.lexists(folder / WORK_JOURNAL):  # else what is in it waits for the next run
                    remove(work)
    except BlockingIOError as error:
        raise RecordsError(f"{folder}: another command is changing it", remedy="wait for it, or stop it") from error
    except OSError as error:
        where = f"{error.filename or folder}: cannot be written or read"
        remedy = "mend that and run the same command again"
        raise RecordsError(where, got=error.strerror or str(error), remedy=remedy) from error


def refuse_interrupted(folder: Path) -> None:
    """Check that no change of a folder was interrupted half-way.

    Raises:
        RecordsError: One was.
    """
    if os.path.lexists(folder / WORK_JOURNAL):
        raise RecordsError(f"{folder}: `adopt` or `repair-index` was interrupted while it changed it", remedy=AGAIN)


def refuse_inside_records(*paths: Path | None) -> None:
    """Check that files or folders to be made lie in no records folder, finished or not; None is passed over.

    Raises:
        RecordsError: One does.
    """
    for path in filter(None, paths):
        named = Path(os.path.realpath(path.parent), path.name)
        for folder in (*named.parents, *Path(os.path.realpath(path)).parents):  # a link is replaced, or followed
            if is_records_folder(folder):
                raise RecordsError(
                    f"{path}: lies in the records folder {folder}, which holds its own files alone",
                    remedy="choose a place outside it",
                )


def is_records_folder(folder: Path) -> bool:
    """Tell a records folder from other folders, also one that is in work or whose manifest is damaged."""
    if folder.name.endswith(".partial") and (folder / BUILD_WORK).is_dir():
        return True
    try:
        with open_plain(folder / MANIFEST) as file:
            return FORMAT.encode() in file.read(1 << 22)
    except OSError:
        return False
