"""The folders around a conversion: ``<out>.partial`` while it is at work, ``<out>`` once it is whole.

One process at a time holds ``<out>.partial.lock``. In ``.partial`` lie the files under their final names and ``.work``:
the plan, notes of finished shards, and shards in hand. The manifest is written last, so a ``.partial`` with one only
lacks its name, and gets it by the protocol of :mod:`imnet_prep.records.publish`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from imnet_prep.build.plan import Plan
from imnet_prep.build.shard_task import PLAN_DATABASE, PLAN_NOTE
from imnet_prep.errors import ImnetError, IntegrityError, PlanError
from imnet_prep.files import exclusive_lock, sync, write_atomically
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

PLAN_FRESH = "plan.new"  # in .work: a plan that is not begun yet
DIGESTS = "digests.json"  # in .work: of archives, so that resuming does not read 148 GB again
_OURS = frozenset({MANIFEST, REJECTED, BUILD_WORK, DAMAGED_FOLDER, *SPLITS})  # what a records folder holds


class Workspace:
    """Where a conversion works and where its result goes; absolute paths.

    Attributes:
        out: The finished folder.
        partial: The folder while it is not whole.
        work: What is needed until it is whole.
        database: The plan that was begun.
        note: Which plan was begun; a ``.partial`` without it holds nothing worth keeping.
        lock: Held by the process at work.
        journal: Notes how the finished folder gets its name.
        old: A finished folder that was replaced, while it is being deleted.
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
        """Return the note of the plan that was begun (or carried out, and only the name is missing), or None."""
        with suppress(OSError, ValueError):
            return dict(json.loads(self.note.read_bytes()))
        with suppress(ImnetError):
            return {"plan": RecordsFolder.open(self.partial).manifest.plan, "inputs": None}
        return None


def check_out(out: Path, sources: Sequence[Path], *, force: bool) -> Workspace:
    """Make sure that a folder may be made, or replaced, at ``out``; nothing is written.

    Raises:
        PlanError: It, or a folder that is needed beside it, is a source, holds one, or holds what no conversion made.
        RecordsError: It lies in another records folder.
    """
    try:
        target = out.resolve()
        if not target.name:
            raise PlanError(f"{out}: cannot be the records folder", expected="the name of a folder to be made")
        space = Workspace(target)
        for source in sources:
            places = {source.resolve(), *source.resolve().parents} & {target, space.partial, space.old}
            if source.exists() and places:
                raise PlanError(f"{out}: the source {source} lies in {places.pop()}", remedy="choose another --out")
        refuse_inside_records(target)
        if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
            if os.path.ismount(target):
                raise PlanError(
                    f"{out}: is a mount point", remedy="choose a folder inside it, as it gets its name at the end"
                )
        elif not target.is_dir() or not (target / MANIFEST).is_file():
            raise PlanError(f"{out}: is there already and holds no records", remedy="choose another --out")
        elif force and (not _is_ours(target) or _is_adopted(target)):
            raise PlanError(
                f"{out}: holds files that no conversion made", remedy="choose another --out, or delete it yourself"
            )
        return space
    except (OSError, RuntimeError) as error:  # not to be listed, or a link that leads to itself
        raise PlanError(f"{out}: cannot be the records folder", got=str(error)) from error


@contextmanager
def hold(space: Workspace) -> Iterator[bool]:
    """Take the workspace for this process alone; leave nothing behind where nothing was begun.

    Yields:
        Whether a finished folder, interrupted while it got its name, has got it now.

    Raises:
        PlanError: Another process holds it, or the folder cannot be made.
    """
    made = [folder for folder in space.out.parents if not folder.exists()]
    try:
        space.out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(space.lock):
            published = finish(space.journal, among=(space.partial, space.out, space.old))
            if not _is_ours(space.partial):
                raise PlanError(f"{space.partial}: holds files that no conversion made", remedy="choose another --out")
            if os.path.lexists(space.old):
                raise PlanError(f"{space.old}: is in the way of the old folder", remedy="move it away")
            space.work.mkdir(parents=True, exist_ok=True)
            try:
                yield published
            finally:
                with suppress(OSError):
                    (space.work / PLAN_FRESH).unlink()
                if not space.note.exists() and space.work.exists():
                    shutil.rmtree(space.work, ignore_errors=True)
                    if not (space.partial / MANIFEST).exists():
                        shutil.rmtree(space.partial, ignore_errors=True)
    except BlockingIOError as error:
        raise PlanError(f"{space.partial}: another conversion is at work", remedy="wait for it, or stop it") from error
    finally:
        with suppress(OSError):  # until one is not empty
            for folder in made:
                folder.rmdir()


def _is_ours(folder: Path) -> bool:
    """Tell what a conversion made, finished or not, from what someone else put there: only that may be deleted."""
    if folder.is_symlink() or not folder.is_dir():
        return not os.path.lexists(folder)
    names = [item.name for item in folder.iterdir() if item.name not in _OURS]
    if not all(name.startswith((MANIFEST, REJECTED)) for name in names):  # as earlier versions left while writing them
        return False
    files = [path for split in SPLITS if (folder / split).is_dir() for path in (folder / split).iterdir()]
    if not is_records_folder(folder):  # made, and nothing in it yet
        return not any(path.is_file() for path in folder.rglob("*"))
    return all(".mindrecord" in path.name or path.name.startswith(RECORDS) for path in files)


def _is_adopted(folder: Path) -> bool:
    with suppress(ImnetError):
        return not RecordsFolder.open(folder).manifest.plan
    return False


def finished_before(space: Workspace, plan: Plan, *, force: bool) -> Manifest | None:
    """Return the manifest of a finished folder that this plan made, now or before; None where there is work to do.

    Raises:
        PlanError: The folder is another plan's.
        IntegrityError: It is this plan's, and not whole.
    """
    there = (space.out / MANIFEST).exists()
    waiting = _manifest_of(space.partial, plan)  # stopped before it got its name
    if waiting is not None and (force or not there or RecordsFolder.open(space.out).manifest.plan == plan.digest):
        publish_folder(space)
        return waiting
    if force or not there:
        return None
    manifest = RecordsFolder.open(space.out).manifest
    if manifest.plan != plan.digest:
        raise PlanError(
            f"{space.out}: holds the result of another plan (other images, options or version)",
            expected=f"plan {plan.digest[:12]}",
            got=f"plan {manifest.plan[:12] or 'none'}",
            remedy="choose another --out, or --force to replace it once the new one is whole",
        )
    if missing := _missing(space.out, manifest):
        raise IntegrityError(
            f"{space.out}: was finished by this plan, but {missing} is not there or has another size",
            remedy="restore it, or --force to convert again",
        )
    return manifest


def _manifest_of(folder: Path, plan: Plan) -> Manifest | None:
    """Return the manifest of a whole folder of this plan, or None."""
    with suppress(ImnetError):
        manifest = RecordsFolder.open(folder).manifest
        return manifest if manifest.plan == plan.digest and not _missing(folder, manifest) else None
    return None


def _missing(folder: Path, manifest: Manifest) -> str:
    """Return the name of the first file that is not there in its size, or an empty string."""
    return next((name for name, size, _ in listed_files(manifest) if check_size(folder, name, size)), "")


def check_begun(space: Workspace, plan: Plan, *, force: bool) -> None:
    """Make sure that what was begun is this plan, or forget it.

    Raises:
        PlanError: Another plan was begun, and it is not to be forced.
    """
    begun = space.begun()
    if begun is not None and begun["plan"] == plan.digest:
        return
    if begun is not None and not force:
        raise PlanError(
            f"{space.partial}: holds an unfinished conversion with another plan (other images, options or version)",
            expected=f"plan {plan.digest[:12]}",
            got=f"plan {begun['plan'][:12]}",
            remedy="repeat its command to go on with it, or --force to start over",
        )
    _forget(space, plan)


def begin(space: Workspace, plan: Plan, state: dict[str, Any], *, force: bool) -> Plan:
    """Note that a plan is begun, or go on with it.

    Args:
        space: Where.
        plan: The plan, its database anywhere in ``.work``.
        state: To be kept in the note; its ``inputs`` say what the sources are, so that another archive of the same
            names and sizes is noticed.
        force: Start over where it was begun from other archives.

    Returns:
        The plan, its database in place.

    Raises:
        PlanError: It was begun from other archives.
    """
    begun = space.begun()
    if begun is not None and begun["inputs"] != state["inputs"]:
        if not force:
            raise PlanError(
                f"{space.partial}: was begun from other archives of the same names and sizes",
                remedy="give those again, or --force to start over",
            )
        _forget(space, plan)
        begun = None
    if plan.database != space.database:
        os.replace(plan.database, space.database)
    remove(space.work / "tmp")
    for folder in (space.work / "tmp", space.work / "done", *(space.partial / split for split in plan.splits)):
        folder.mkdir(exist_ok=True)
    if begun is None:
        write_atomically(space.note, json.dumps({"plan": plan.digest, **state}).encode())
    return replace(plan, database=space.database)


def _forget(space: Workspace, plan: Plan) -> None:
    """Delete what was begun; its note first, so that a kill meanwhile leaves nothing that looks begun."""
    remove(space.note)
    for item in (*space.partial.iterdir(), *space.work.iterdir()):
        if item not in (space.work, plan.database, space.work / DIGESTS):
            remove(item)


def publish_folder(space: Workspace) -> None:
    """Move the whole folder to its name; an older one is deleted after that."""
    remove(space.work)
    sync(space.partial)
    publish(space.journal, [Move(space.partial, space.out, aside=space.old)], discard=[space.old])
