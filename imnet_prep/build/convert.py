"""Archives and folders to a records folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imnet_prep.build.job import ConvertOptions, ConvertResult, Job, carry_out
from imnet_prep.build.plan import PLAN_VERSION, Plan, PlanOptions, load_plan
from imnet_prep.build.planner import make_plan
from imnet_prep.build.workdir import DIGESTS, PLAN_FRESH, Workspace
from imnet_prep.files import write_atomically
from imnet_prep.sources import detect, merge
from imnet_prep.types import ProgressCallback, Stop

LOG = logging.getLogger(__name__)


def convert(
    paths: Sequence[Path],
    out: Path,
    split: str | None,
    plan_options: PlanOptions,
    options: ConvertOptions,
    progress: ProgressCallback,
    stop: Stop,
) -> ConvertResult:
    """Convert sources to a records folder.

    Args:
        paths: Archives and folders, in any order.
        out: The records folder to make.
        split: Where a source does not say which split it is.
        plan_options: What shapes the result.
        options: How it is carried out.
        progress: Told of images found, hashed and stored.
        stop: Asked between shards whether to leave after those in hand.

    Raises:
        SourceError: A source is missing, empty, damaged or of no known layout.
        PlanError: ``out`` is in use, or holds something else; the disk is full; a worker was killed.
        BudgetError: More images were rejected than ``options.max_rejected``.
        Interrupted: ``stop`` said so; what is finished is kept.
    """
    return carry_out(_Sources(paths, split, plan_options), out, options, progress, stop)


class _Sources(Job):
    """Archives and folders to be converted; see :class:`Job`."""

    def __init__(self, paths: Sequence[Path], split: str | None, options: PlanOptions) -> None:
        self.paths, self._options = paths, options
        self._sources = detect(paths, split)
        self._key = None  # what a plan of archives depends on; of a folder nothing is known, and it is listed again
        states = [_file_state(source.path) for source in self._sources]
        if None not in states:
            depends = [PLAN_VERSION, states, split, options.content(), options.seed, options.label_names()]
            self._key = json.dumps(depends, sort_keys=True)

    def plan(self, space: Workspace, progress: ProgressCallback) -> Plan:
        begun = space.begun()
        if self._key is not None and begun is not None and begun.get("key") == self._key:
            plan = load_plan(space.database, self._options)
            if plan is not None and plan.digest == begun["plan"]:
                return plan
        return make_plan(merge(self._sources), space.work / PLAN_FRESH, self._options, progress)

    def state(self, space: Workspace, progress: ProgressCallback) -> dict[str, Any]:
        """Describe the sources; the digests of an archive are remembered while it is not touched."""
        known: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            known = json.loads((space.work / DIGESTS).read_bytes())
        infos: list[dict[str, Any]] = []
        notes: list[str] = []
        for source in self._sources:
            state = json.dumps([source.kind, _file_state(source.path)])
            if state not in known or source.path.is_dir():
                known[state] = {"info": asdict(source.info(progress)), "notes": list(source.notes)}
                write_atomically(space.work / DIGESTS, json.dumps(known).encode())
            infos.append(known[state]["info"])
            notes += known[state]["notes"]
        for note in notes:
            LOG.warning("%s", note)
        return {"inputs": infos, "infos": infos, "key": self._key, "notes": notes}


def _file_state(path: Path) -> list[Any] | None:
    """Return a fingerprint of a file that detects a replaced one; None for a folder."""
    state = path.stat()
    return None if path.is_dir() else [str(path.absolute()), state.st_size, state.st_mtime_ns, state.st_ino]
