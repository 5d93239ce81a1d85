"""Conversions as the tests run them, in this process or in one that can be killed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imnet_prep.build.convert import convert
from imnet_prep.build.job import ConvertOptions, ConvertResult
from imnet_prep.build.plan import PlanOptions
from imnet_prep.images.check import ValidateOptions
from imnet_prep.types import Progress

COMMAND = (sys.executable, "-c", "from cli.prep import main; main()")


def quiet(_: Progress) -> None:
    """A progress callback that says nothing."""


def run(
    sources: Path | Sequence[Path],
    out: Path,
    *,
    split: str | None = None,
    short_side: int | None = None,
    workers: int = 1,
    max_rejected: str = "100%",
    force: bool = False,
    **plan: Any,
) -> ConvertResult:
    """Convert, with the options that differ from the defaults."""
    return convert(
        [sources] if isinstance(sources, Path) else list(sources),
        out,
        split,
        PlanOptions(store=ValidateOptions(short_side=short_side), **plan),
        ConvertOptions(workers=workers, max_rejected=max_rejected, force=force),
        quiet,
        lambda: False,
    )


def command(*arguments: object) -> list[str]:
    """The command line of ``imnet-prep`` in this interpreter."""
    return [*COMMAND, *map(str, arguments)]


def prep(*arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``imnet-prep`` to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False)


def prep_json(*arguments: object) -> dict[str, Any]:
    """Run ``imnet-prep ... --json`` that must succeed, and give its object."""
    done = prep(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by relative name of every file in a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> set[str]:
    """What lies directly in a folder."""
    return {path.name for path in folder.iterdir()}
