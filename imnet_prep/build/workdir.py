"""The folders of a conversion: ``<out>.partial`` while it runs, ``<out>`` once it is finished.

One process at a time holds ``<out>.partial.lock``. ``.partial`` holds the files under their final names, and ``.work``:
the plan, the notes of finished shards, and the shards in progress. The manifest is written last, so a ``.partial`` with
a manifest is whole. It is renamed by the protocol of :mod:`imnet_prep.records.publish`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from imnet_prep.build.differences import Made, begun_plan, differences, options_of
from imnet_prep.build.plan import Plan
from imnet_prep.build.shard_task import PLAN_DATABASE, PLAN_NOTE
from imnet_prep.errors import ImnetError, IntegrityError, Interrupted, PlanError, RemoteError
from imnet_prep.files import exclusive_lock, rename, sync, write_atomically
from imnet_prep.records.check import check_size, listed_files
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import MANIFEST, Manifest
from imnet_prep.records.publish import (
    BUILD_WORK,
    DAMAGED_FOLDER,
    Move,
    finish,
    is_records_folder,
    publish,
    refuse_inside_records,
    remove,
)
from imnet_prep.records.record_list import RECORDS, REJECTED
from imnet_prep.types import SPLITS

PLAN_FRESH = "plan.new"  # in .work: a plan that has not begun
STAGED = "staged"  # in .work: copies of what cannot be read in place
DIGESTS = "digests.json"  # in .work: of the archives, as reading 148 GB again would take long
_OURS = frozenset({MANIFEST, REJECTED, BUILD_WORK, DAMAGED_FOLDER, *SPLITS})  # everything in a records folder


class Workdir:
    """The paths of a conversion, all absolute.

    Attributes:
        out: The finished folder.
        partial: The folder while it is unfinished.
        work: In ``partial``, what is needed until it is finished.
        database: The plan that was begun.
        note: Names the plan that was begun; a ``.partial`` without it holds nothing worth keeping.
        lock: Held by the running process.
        journal: Lists the renames that publish the folder.
        old: A replaced folder while it is deleted.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.partial, self.lock, self.journal, self.old = (
            out.with_name(out.name + ending)
            for ending in (".partial", ".partial.lock", ".partial.publish", ".partial.replaced")
        )
        self.work = self.partial / BUILD_WORK
        self.database, self.note = self.work / PLAN_DATABASE, self.work / PLAN_NOTE

    def begun(self) -> dict[str, Any] | None:
        """Return the note of the plan that was begun, or one of a finished but unnamed folder, or None."""
        with suppress(OSError, ValueError):
            return dict(json.loads(self.note.read_bytes()))
        manifest = _manifest_of(self.partial)
        return None if manifest is None else {"plan": manifest.plan, "inputs": None}


def refuse_url(out: Path) -> None:
    """Raise an error if a folder to write is a URL: nothing is written there, and ``s3:`` would be made a folder.

    Raises:
        PlanError: It is.
    """
    if re.fullmatch(r"[a-z][a-z0-9+.-]+:", out.parts[0] if out.parts else "") and not Path(out.parts[0]).exists():
        raise PlanError(
            f"{out}: cannot be a URL", expected="a folder on this machine", remedy="write there, and copy the result"
        )


def check_out(out: Path, sources: Sequence[Path], *, force: bool) -> Workdir:
    """Check that a folder may be created or replaced at ``out``, and return its paths; nothing is written.

    Raises:
        PlanError: It or a folder needed beside it is a source, holds one, or holds files that no conversion made; it is
            a URL.
        RecordsError: It is inside another records folder.
    """
    refuse_url(out)
    try:
        target = out.resolve()
        if not target.name:
            raise PlanError(f"{out}: cannot be the records folder", expected="the name of a new folder")
        workdir = Workdir(target)
        for source in sources:
            places = {source.resolve(), *source.resolve().parents} & {target, workdir.partial, workdir.old}
            if source.exists() and places:
                raise PlanError(f"{out}: the source {source} lies in {places.pop()}", remedy="choose another --out")
        refuse_inside_records(target)
        if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
            if os.path.ismount(target):
                raise PlanError(
                    f"{out}: is a mount point", remedy="choose a folder inside it, as a mount point cannot be renamed"
                )
        elif not target.is_dir() or not (target / MANIFEST).is_file():
            raise PlanError(f"{out}: already exists and holds no records", remedy="choose another --out")
        elif force and not (_is_ours(target) and ((manifest := _manifest_of(target)) is None or manifest.plan)):
            raise PlanError(
                f"{out}: holds files that no conversion made", remedy="choose another --out, or delete it yourself"
            )
        return workdir
    except (OSError, RuntimeError) as error:  # an unreadable folder, or a link to itself
        raise PlanError(f"{out}: cannot be the records folder", got=str(error)) from error


@contextmanager
def hold(workdir: Workdir) -> Iterator[bool]:
    """Lock the folders for this process; remove them afterwards if no plan was begun.

    Yields:
        Whether an interrupted renaming of a finished folder was completed.

    Raises:
        PlanError: Another process holds the lock, or a folder cannot be created.
    """
    made = [folder for folder in workdir.out.parents if not folder.exists()]
    try:
        workdir.out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(workdir.lock):
            published = finish(workdir.journal, among=(workdir.partial, workdir.out, workdir.old))
            if not _is_ours(workdir.partial):
                raise PlanError(
                    f"{workdir.partial}: holds files that no conversion made", remedy="choose another --out"
                )
            if os.path.lexists(workdir.old):
                raise PlanError(f"{workdir.old}: is in the way of the old folder", remedy="move it away")
            workdir.work.mkdir(parents=True, exist_ok=True)
            keep = False
            try:
                yield published
            except (Interrupted, RemoteError):
                keep = any((workdir.work / STAGED).glob("*.json"))  # brought in hours, perhaps
                raise
            finally:
                with suppress(OSError):
                    remove(workdir.work / PLAN_FRESH)
                if not keep and not workdir.note.exists() and workdir.work.exists():
                    shutil.rmtree(workdir.work, ignore_errors=True)
                    if not (workdir.partial / MANIFEST).exists():
                        shutil.rmtree(workdir.partial, ignore_errors=True)
    except BlockingIOError as error:
        raise PlanError(
            f"{workdir.partial}: another conversion is at work", remedy="wait for it, or stop it"
        ) from error
    finally:
        with suppress(OSError):  # up to the first that is not empty
            for folder in made:
                folder.rmdir()


def _is_ours(folder: Path) -> bool:
    """Return whether a conversion made the folder, finished or not; only then may it be deleted."""
    if folder.is_symlink() or not folder.is_dir():
        return not os.path.lexists(folder)
    names = [item.name for item in folder.iterdir() if item.name not in _OURS]
    if not all(name.startswith((MANIFEST, REJECTED)) for name in names):  # left by earlier versions
        return False
    files = [path for split in SPLITS if (folder / split).is_dir() for path in (folder / split).iterdir()]
    if not is_records_folder(folder):  # created, but still empty
        return not any(path.is_file() for path in folder.rglob("*"))
    return all(".mindrecord" in path.name or path.name.startswith(RECORDS) for path in files)


def _manifest_of(folder: Path) -> Manifest | None:
    with suppress(ImnetError):
        return RecordsFolder.open(folder).manifest
    return None


def finished_before(workdir: Workdir, plan: Plan, *, force: bool) -> Manifest | None:
    """Return the manifest of a folder that this plan has finished; None if there is work to do.

    Raises:
        PlanError: The folder belongs to another plan.
        IntegrityError: It belongs to this plan, but is not whole.
    """
    there = None if force or not (workdir.out / MANIFEST).exists() else RecordsFolder.open(workdir.out).manifest
    waiting = _manifest_of(workdir.partial)  # stopped before the rename
    if (
        waiting is not None
        and waiting.plan == plan.digest
        and not _missing(workdir.partial, waiting)
        and (there is None or there.plan == plan.digest)
    ):
        publish_folder(workdir)
        return waiting
    if there is None:
        return None
    if there.plan != plan.digest:
        raise PlanError(
            f"{workdir.out}: holds the result of another plan: {differences(Made.of_manifest(there), plan)}",
            remedy="choose another --out, or --force to replace it once the new one is whole",
        )
    if missing := _missing(workdir.out, there):
        raise IntegrityError(
            f"{workdir.out}: was finished by this plan, but {missing} is missing or has another size",
            remedy="restore it, or --force to convert again",
        )
    return there


def _missing(folder: Path, manifest: Manifest) -> str:
    """Return the name of the first file that is missing or has another size, or an empty string."""
    return next((name for name, size, _ in listed_files(manifest) if check_size(folder, name, size)), "")


def check_begun(workdir: Workdir, plan: Plan, *, force: bool) -> None:
    """Check that this plan was begun; delete what another one began.

    Raises:
        PlanError: Another plan was begun, and ``force`` is False.
    """
    begun = workdir.begun()
    if begun is None or (force and begun["plan"] != plan.digest):
        _forget(workdir, plan)
    elif begun["plan"] != plan.digest:
        raise PlanError(
            f"{workdir.partial}: holds an unfinished conversion with another plan: "
            f"{differences(begun_plan(workdir.database, begun, plan), plan)}",
            remedy="repeat its command to continue it, or --force to start over",
        )


def begin(workdir: Workdir, plan: Plan, note: dict[str, Any], *, force: bool) -> Plan:
    """Begin a plan, or continue it.

    Args:
        workdir: The folders.
        plan: The plan, its database anywhere in ``.work``.
        note: What to record; its ``inputs`` describe the sources, so that other archives with the same names and sizes
            are noticed.
        force: Start over if it was begun from other archives.

    Returns:
        The plan, its database in place.

    Raises:
        PlanError: It was begun from other archives, and ``force`` is False.
    """
    begun = workdir.begun()
    if begun is not None and begun["inputs"] != note["inputs"]:
        if not force:
            raise PlanError(
                f"{workdir.partial}: was begun from other archives of the same names and sizes",
                remedy="give the first ones again, or --force to start over",
            )
        _forget(workdir, plan)
        begun = None
    if plan.database != workdir.database:
        rename(plan.database, workdir.database)
    remove(workdir.work / "tmp")
    for folder in (workdir.work / "tmp", workdir.work / "done", *(workdir.partial / split for split in plan.splits)):
        folder.mkdir(exist_ok=True)
    if begun is None:
        document = {"plan": plan.digest, "options": options_of(plan), **note}
        write_atomically(workdir.note, json.dumps(document).encode())
    return replace(plan, database=workdir.database)


def _forget(workdir: Workdir, plan: Plan) -> None:
    """Delete what was begun, its note first: a kill in between then leaves nothing that looks begun."""
    remove(workdir.note)
    for item in (*workdir.partial.iterdir(), *workdir.work.iterdir()):
        if item not in (workdir.work, plan.database, workdir.work / DIGESTS, workdir.work / STAGED):
            remove(item)


def publish_folder(workdir: Workdir) -> None:
    """Rename the finished folder, then delete the one that it replaces."""
    remove(workdir.work)
    sync(workdir.partial)
    publish(workdir.journal, [Move(workdir.partial, workdir.out, aside=workdir.old)], discard=[workdir.old])
