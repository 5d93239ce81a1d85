"""Publish finished files and folders under their final names: all or none, even when interrupted.

New files are written and flushed under other names first. Then a journal lists the renames, and the renames follow. If
they are interrupted after the journal is written, the next command finishes them. Before each rename the file or folder
is flushed, and after it the folder that holds its new name. Plain renames suffice, so this works on every system.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imnet_prep.errors import RecordsError
from imnet_prep.files import exclusive_lock, open_plain, patiently, rename, sync, write_atomically
from imnet_prep.records.manifest import FORMAT, MANIFEST

WORK = ".imnet-prep"  # in a records folder while `adopt` or `repair-index` changes it
WORK_JOURNAL, WORK_LOCK = f"{WORK}.publish", f"{WORK}.lock"
DAMAGED_FOLDER = ".damaged"  # in a records folder: the files that `repair-index` replaced
BUILD_WORK = ".work"  # in a `.partial` folder during a conversion
AGAIN = "run the interrupted command again: it resumes"


@dataclass(frozen=True, slots=True)
class Move:
    """A rename of a finished file or folder to its final name.

    Attributes:
        new: The finished file or folder. place: Its final name.
        aside: Where to move what has this name now, unless something is there already; None replaces a file.
    """

    new: Path
    place: Path
    aside: Path | None = None


def publish(journal: Path, moves: Sequence[Move], discard: Sequence[Path] = (), *, stage: Path | None = None) -> None:
    """Carry out moves in order; after an interruption :func:`finish` completes them.

    Args:
        journal: The file that lists them; all paths lie in its folder or below it.
        moves: The moves; the files are flushed already.
        discard: Paths to delete afterwards, if they exist.
        stage: Where the journal is written first, see :func:`~imnet_prep.files.write_atomically`.

    Raises:
        OSError: The disk fails. Once the journal is written, :func:`finish` completes the moves.
    """
    base = journal.parent
    document = {
        "moves": [[path and path.relative_to(base).as_posix() for path in (m.new, m.place, m.aside)] for m in moves],
        "discard": [path.relative_to(base).as_posix() for path in discard],
    }
    write_atomically(journal, json.dumps(document).encode(), stage=stage)
    _carry_out(journal, moves, discard)


def finish(journal: Path, among: Collection[Path] | None = None) -> bool:
    """Complete the moves of an interrupted :func:`publish`.

    Args:
        journal: The file that lists them. It may be forged, so nothing outside its folder is touched.
        among: The only paths that it may name; None allows any path in the folder.

    Returns:
        Whether there was a journal.

    Raises:
        RecordsError: The journal is invalid.
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
            continue  # already moved
        if move.aside is not None and os.path.lexists(move.place) and not os.path.lexists(move.aside):
            move.aside.parent.mkdir(parents=True, exist_ok=True)
            rename(move.place, move.aside)
            sync(move.aside.parent)
        if not move.place.parent.exists():
            move.place.parent.mkdir()
            sync(move.place.parent.parent)
        rename(move.new, move.place)
        sync(move.place.parent)
    for path in discard:
        remove(path)
    remove(journal)
    sync(journal.parent)


def _parse(journal: Path, data: bytes, among: Collection[Path] | None) -> tuple[list[Move], list[Path]]:
    base = journal.parent

    def inside(name: str) -> Path:
        path = base / name
        through_links = path.parent.resolve()
        if not name or ".." in path.parts or not (among is None or path in among):
            raise ValueError(f"a path that it may not name: {name}")
        if base.resolve() not in (through_links, *through_links.parents):
            raise ValueError(f"a path outside the folder: {name}")
        return path

    try:
        document = json.loads(data)
        moves = [
            Move(inside(new), inside(place), None if aside is None else inside(aside))
            for new, place, aside in document["moves"]
        ]
        return moves, [inside(name) for name in document["discard"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordsError(
            f"{journal}: is not the journal of an interrupted change",
            got=str(error),
            remedy="delete it if it is not yours",
        ) from error


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists.

    Raises:
        OSError: It cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        patiently(lambda: shutil.rmtree(path))
    else:
        patiently(lambda: path.unlink(missing_ok=True))


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a records folder in progress.

    Attributes:
        folder: The records folder. work: A folder in it for temporary files, deleted at the end of the change.
        resumed: Whether an earlier, interrupted change was finished first.
    """

    folder: Path
    work: Path
    resumed: bool

    def stage(self, place: Path) -> Path:
        """Return where to write the new file for ``place``: a path with the same base name, whose folder exists."""
        path = self.work / "new" / place.relative_to(self.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, places: Sequence[Path], *, aside: Path | None = None) -> None:
        """Move staged files to their final names, in order.

        Args:
            places: The final names; each file is staged and flushed.
            aside: A folder to which replaced files are moved, but never over a file there. None replaces them.

        Raises:
            RecordsError: A file cannot get its name. Nothing is changed then, as the journal could never be finished.
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
                    raise RecordsError(
                        f"{parent}: cannot be written", expected=f"a folder on the disk of {self.folder}"
                    )
        for folder in {move.new.parent for move in moves}:
            sync(folder)
        publish(self.folder / WORK_JOURNAL, moves, stage=self.work)


@contextmanager
def changing(folder: Path) -> Iterator[Change]:
    """Lock a records folder for a change, finish an earlier interrupted change, and delete temporary files at the end.

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
                if not os.path.lexists(folder / WORK_JOURNAL):  # otherwise the next run needs what is in it
                    remove(work)
    except BlockingIOError as error:
        raise RecordsError(f"{folder}: another command is changing it", remedy="wait for it, or stop it") from error
    except OSError as error:
        raise RecordsError(
            f"{error.filename or folder}: cannot be written or read",
            got=error.strerror or str(error),
            remedy="fix this and run the same command again",
        ) from error


def refuse_interrupted(folder: Path) -> None:
    """Check that no change of a folder was interrupted.

    Raises:
        RecordsError: A change was interrupted.
    """
    if os.path.lexists(folder / WORK_JOURNAL):
        raise RecordsError(f"{folder}: `adopt` or `repair-index` was interrupted while it changed it", remedy=AGAIN)


def refuse_inside_records(*paths: Path | None) -> None:
    """Check that new files or folders are not in a records folder, finished or not; None is ignored.

    Raises:
        RecordsError: A path is in a records folder.
    """
    for path in filter(None, paths):
        named = Path(os.path.realpath(path.parent), path.name)
        for folder in (*named.parents, *Path(os.path.realpath(path)).parents):  # a link may be replaced or followed
            if is_records_folder(folder):
                raise RecordsError(
                    f"{path}: lies in the records folder {folder}, which may hold only its own files",
                    remedy="choose a place outside it",
                )


def is_records_folder(folder: Path) -> bool:
    """Return whether a folder is a records folder, including one in progress or with a damaged manifest."""
    if folder.name.endswith(".partial") and (folder / BUILD_WORK).is_dir():
        return True
    try:
        with open_plain(folder / MANIFEST) as file:
            return FORMAT.encode() in file.read(1 << 22)
    except OSError:
        return False
